"""How much of the machine a run uses: floating-point operations counted from shapes, against a measured peak."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from rlhf.models import ActorCritic, trunk_of
from rlhf.ppo.packing import pack_rows
from rlhf.ppo.rollout import Rollout, lengths_of, plan


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here: the best of a few, after a warm-up.

    Measured and not looked up: it holds for every device, and it is what a program can get.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = now(device)
        torch.mm(a, b)
        best = min(best, now(device) - started)
    return 2 * size**3 / best


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done what it was given."""
    _wait(device)
    return time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class FlopCounter:
    """Operations of an update (Kaplan et al. 2020: 2 per weight and token forward, 4 backward; attention beside it).

    The output embedding is counted at response tokens alone, and with LoRA no gradient of the base's weights.
    """

    def __init__(self, model: ActorCritic) -> None:
        trunks = [_matmul_weights(trunk_of(model.policy), "policy")]
        if model.critic is not None:
            trunks.append(_matmul_weights(trunk_of(model.critic)))
        elif model.critic_adapter is not None:  # one trunk, run once for each adapter
            trunks.append(_matmul_weights(trunk_of(model.policy), model.critic_adapter))
        policy: Any = model.policy
        config = policy.config.get_text_config()
        self.weights = sum(trunks)
        self.attention = 4 * config.num_hidden_layers * config.hidden_size * len(trunks)  # times the mean context
        self.head = config.vocab_size * config.hidden_size
        self.backward = 1 if model.has_adapters else 2

    def training(self, prompt_lengths: list[int], response_lengths: list[int]) -> float:
        """Operations of one pass, forward and backward, over these episodes; padding does not count."""
        total = 0.0
        for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
            tokens = prompt + response
            products = 2 * self.weights * tokens + 2 * self.head * response
            # Attention has no weights: its backward pass is two of it with LoRA, too.
            total += products * (1 + self.backward) + self.attention * tokens * tokens / 2 * 3
        return total


def _matmul_weights(trunk: nn.Module, adapter: str = "") -> int:
    """Weights that a forward multiplies by: no embeddings, and of the adapters this one alone."""
    embeddings = {id(module.weight) for module in trunk.modules() if isinstance(module, nn.Embedding)}
    return sum(
        parameter.numel()
        for name, parameter in trunk.named_parameters()
        if parameter.dim() == 2 and id(parameter) not in embeddings and ("lora_" not in name or f".{adapter}." in name)
    )


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far; it has to stop growing after the first steps."""
    return counters["stats"]["unique_graphs"]


def padding_share(rollout: Rollout, mini_batches: Sequence[Sequence[int]], max_tokens: int, ranks: int) -> float:
    """Share of one pass of updates over the rollout, in these mini-batches, that is spent on padding, in [0,1)."""
    lengths = lengths_of(rollout, range(len(rollout.prompt_lengths)))
    rows, columns, packed = rollout.shapes.rows, rollout.shapes.columns, rollout.packed
    area = 0
    for mini_batch in mini_batches:
        if packed is not None:
            plans = pack_rows(lengths_of(rollout, mini_batch), max_tokens, packed)
            area += sum(packed.rows(len(part)) * packed.width for part in plans)
            continue
        for rank in plan(rollout, mini_batch, max_tokens, ranks):
            # The rows of an empty micro-batch are none, and a rank that has one computes a row for nothing.
            parts = [[lengths[mini_batch[at]] for at in micro] or [lengths[mini_batch[0]]] for micro in rank]
            area += sum(rows(len(part)) * columns(max(part)) for part in parts)
    return 1 - sum(lengths[row] for mini_batch in mini_batches for row in mini_batch) / area
