"""How much of the machine a run uses: floating-point operations counted from shapes, against a measured peak."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from rlhf.models import ActorCritic, trunk_of
from rlhf.ppo.rollout import Rollout, plan


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here: the best of a few, after a warm-up.

    Measured and not looked up: it holds for every device, and it is what a program can get.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class FlopCounter:
    """Operations of an update (Kaplan et al. 2020: 2 per weight and token forward, 4 backward; attention beside it).

    The output embedding is counted at response tokens alone, and with LoRA no gradient of the base's weights.
    """

    def __init__(self, model: ActorCritic) -> None:
        trunks = [trunk_of(model.policy)]
        if model.critic is not None:
            trunks.append(trunk_of(model.critic))
        elif model.critic_adapter is not None:
            trunks *= 2  # one trunk, run once for each adapter
        policy: Any = model.policy
        config = policy.config.get_text_config()
        self.weights = sum(_matmul_weights(trunk) for trunk in trunks)
        self.attention = 4 * config.num_hidden_layers * config.hidden_size * len(trunks)  # times the mean context
        self.head = config.vocab_size * config.hidden_size
        self.backward = 1 if model.has_adapters else 2

    def training(self, prompt_lengths: list[int], response_lengths: list[int]) -> float:
        """Operations of one pass, forward and backward, over these episodes; padding does not count."""
        forward = 0.0
        for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
            tokens = prompt + response
            forward += 2 * self.weights * tokens + 2 * self.head * response + self.attention * tokens * tokens / 2
        return forward * (1 + self.backward)


def _matmul_weights(model: nn.Module) -> int:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings)


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far; it has to stop growing after the first steps."""
    return counters["stats"]["unique_graphs"]


def padding_share(rollout: Rollout, max_tokens: int, ranks: int) -> float:
    """Share of a forward over the whole rollout that is spent on padding, in [0,1)."""
    lengths = [sum(pair) for pair in zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)]
    batches = [batch for rank in plan(rollout, range(len(lengths)), max_tokens, ranks) for batch in rank if batch]
    rows, columns = rollout.shapes.rows, rollout.shapes.columns
    areas = (rows(len(batch)) * columns(max(lengths[row] for row in batch)) for batch in batches)
    return 1 - sum(lengths) / sum(areas)
