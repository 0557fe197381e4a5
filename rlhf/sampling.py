"""Sampling responses from a published model: EOS rates, reward statistics, evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.graphs import PARAMETERS_LORA
from rlhf.models import position_ids, response_logprobs, special_attention
from rlhf.ppo.generation import CompiledGenerator, Generator, PlainGenerator
from rlhf.ppo.generation.plain import left_pad
from rlhf.ppo.rollout import uniforms

FEWEST_ROWS, MOST_ROWS = 64, 256  # sampled at once
SLOTS_FROM = 16  # prompts: copying the weights and recording a graph take as long as a few responses
# Settings of `ppo` that decide what a reward model's statistics are measured on; PPO says so where its own are others.
SAMPLED_WITH = ("temperature", "top_p", "response_length", "max_prompt_length", "stop_strings")


@dataclass
class Samples:
    """Responses to prompts: text, unpadded ids (EOS included), and whether each ended by itself.

    `logprobs`: of each response that was sampled, in nats, as it was sampled: with temperature, top-p and penalty.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    responses: list[str]
    response_ids: list[list[int]]
    has_eos: list[bool]
    logprobs: list[float] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens per response, EOS included."""
        return [len(ids) for ids in self.response_ids]

    @property
    def eos_rate(self) -> float:
        """Share of responses that ended by themselves."""
        return sum(self.has_eos) / len(self.has_eos)


def fitting_rows(rows: list[dict], renderer: Renderer, max_length: int | None, room: str | None = None) -> list[dict]:
    """Rows whose prompt has at most `max_length` tokens (None = all): what PPO trains on is what gets measured.

    `room` says what they do not fit and what to do, for the message; None = ppo.max_prompt_length.

    Raises:
        UserError: no row fits.
    """
    if max_length is None:
        fits = rows
    else:
        lengths = map(len, renderer.all_prompt_ids([row["prompt"] for row in rows]))
        fits = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    if not fits:
        room = room or f"ppo.max_prompt_length {max_length}: raise it"
        raise UserError(f"none of {len(rows)} prompts fits {room}")
    return fits


def sample_responses(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: list,
    length: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    stop_strings: list[str] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    repetition_penalty: float = 1.0,
    draw: int = 0,
) -> Samples:
    """One response per prompt; response i depends on the model, the prompt, the seed, `draw` and i alone.

    `batch_size` None: `rows_at_once`.
    """
    ids = renderer.all_prompt_ids(prompts)
    noise = uniforms(len(ids), length, seed, *([draw] if draw else []))
    batch_size = batch_size or rows_at_once(model, max(map(len, ids)) + length)
    generator: Generator
    if len(ids) >= SLOTS_FROM and samples_in_slots(model, stop_strings, repetition_penalty):
        pad, eos = renderer.tokenizer.pad_token_id, renderer.tokenizer.eos_token_id
        generator = CompiledGenerator(model, pad, eos, batch_size, dtype)
        generator.sync()
    else:
        generator = PlainGenerator(
            model, renderer.tokenizer, stop_strings or [], autocast=dtype, repetition_penalty=repetition_penalty
        )
    response_ids, finished, logprobs = [], [], []
    for first in range(0, len(ids), batch_size):
        part = slice(first, first + batch_size)
        with default_generation_config(model):
            out = generator.generate(ids[part], noise[part], temperature, top_p)
        rows = zip(out.response_ids.cpu(), out.response_mask.cpu(), strict=True)
        response_ids += [row[keep].tolist() for row, keep in rows]
        finished += out.finished.tolist()
        logprobs += out.logprobs.sum(dim=1).tolist()
    texts = [renderer.decode_response(row) for row in response_ids]
    return Samples([renderer.prompt_text(p) for p in prompts], ids, texts, response_ids, finished, logprobs)


def samples_in_slots(model: PreTrainedModel, stop_strings: list[str] | None, repetition_penalty: float) -> bool:
    """Whether the back end with CUDA graphs samples: some 5 ms a token where `plain` takes 22 (135M).

    It holds one more set of weights, and gains little where the GPU takes longer than the launches.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    merged = not hasattr(model, "peft_config")
    small = sum(parameter.numel() for parameter in model.parameters()) <= PARAMETERS_LORA
    knobs = bool(stop_strings) or repetition_penalty != 1
    return on_gpu and merged and small and not knobs and not special_attention(model)


def rows_at_once(model: PreTrainedModel, tokens: int) -> int:
    """Responses that are sampled together: 64; on a GPU, which waits for launches at 64 rows (22 ms a step), up to 256.

    As many, in steps of 64, as a quarter of the free memory holds float32 keys and values of `tokens` tokens for.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return FEWEST_ROWS
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * 4 * config.num_hidden_layers * heads * width * tokens
    fits = torch.cuda.mem_get_info(device)[0] // 4 // row
    return max(FEWEST_ROWS, min(MOST_ROWS, fits // FEWEST_ROWS * FEWEST_ROWS))


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Sample without the model's own top-k or repetition penalty, which would make another policy; then restore it."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def response_logprob_sums(
    model: PreTrainedModel, samples: Samples, temperature: float, pad_id: int, batch_size: int = 32
) -> list[float]:
    """Log-probability of each response under `model`, in nats, summed over its tokens."""
    device = next(model.parameters()).device
    sums: list[float] = []
    for first in range(0, len(samples.prompt_ids), batch_size):
        part = slice(first, first + batch_size)
        input_ids, attention_mask, length = _join(samples.prompt_ids[part], samples.response_ids[part], pad_id)
        logprobs, _, _ = response_logprobs(
            model, input_ids.to(device), attention_mask.to(device), length, temperature, entropy=False
        )
        keep = attention_mask[:, -length:].bool().to(device)
        sums += torch.where(keep, logprobs, 0).sum(dim=1).tolist()
    return sums


def perplexity(model: PreTrainedModel, texts: Samples, pad_id: int) -> float:
    """exp of the mean loss in nats per token of given responses, at temperature 1, the EOS among their tokens."""
    total = sum(response_logprob_sums(model, texts, 1.0, pad_id))
    return math.exp(-total / sum(texts.lengths))


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, sequences: list[list[int]], pad_id: int, batch_size: int = 32
) -> list[float]:
    """Raw reward of each sequence of ids (prompt and response), read at its last token."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # little padding
    scores = [0.0] * len(sequences)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        input_ids, attention_mask = left_pad([sequences[i] for i in rows], pad_id)
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        positions = position_ids(attention_mask)
        out = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        values = model.score(out.last_hidden_state[:, -1].to(model.score.weight.dtype)).squeeze(-1).float()
        for row, value in zip(rows, values.tolist(), strict=True):
            scores[row] = value
    return scores


def _join(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor, int]:
    """Left-padded prompts and right-padded responses [b,P+R], the attention mask, and R."""
    ids, mask = left_pad(prompts, pad_id)
    length = max(len(row) for row in responses)
    tail = torch.tensor([row + [pad_id] * (length - len(row)) for row in responses])
    keep = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in responses])
    return torch.cat([ids, tail], dim=1), torch.cat([mask, keep], dim=1), length
