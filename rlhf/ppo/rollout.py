"""The Rollout: what one ppo_step samples, and how it is filled in: sample, score, value.

Every rank holds the whole global rollout (ids and a few numbers per token: small) and computes its share of the
forwards. Whitening, mini-batches and metrics are then global by construction: one process and eight do the same run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.ppo.generation import Generated, Generator
from rlhf.ppo.generation.plain import left_pad
from rlhf.ppo.packing import EXACT, Shapes, plan_micro_batches


@dataclass
class Rollout:
    """B episodes of all ranks. Shapes: P prompt tokens (left-padded), R response tokens (right-padded).

    Attributes:
        prompt_ids, prompt_mask: [B,P]; mask 1 = real token.
        response_ids, response_mask: [B,R]; bool mask, True = counts, EOS included.
        finished: [B] bool; False = cut at the length limit.
        sampler_logprobs: [B,R] as the generator computed them.
        logprobs, ref_logprobs, values, entropy: [B,R] from the training forward, before any update.
        raw_scores: per reward source [B]; scores: [B] what PPO maximises.
        rewards: [B,R] of each token: -kl_coef * KL, and the score on the last one.
        prompts, responses: text, for reward functions and people.
        columns: extra dataset columns, by name.
        shapes: how batches are cut and rounded up.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor
    sampler_logprobs: Tensor
    prompts: list[str]
    responses: list[str]
    columns: dict[str, list]
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    ref_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    raw_scores: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    shapes: Shapes = EXACT

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Real tokens of each prompt, on the host: batches are cut without waiting for the device."""
        return self.prompt_mask.sum(1).tolist()

    @cached_property
    def response_lengths(self) -> list[int]:
        """Real tokens of each response, on the host."""
        return self.response_mask.sum(1).tolist()

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows, each prompt next to its response, padded on the left to the longest of them.

        Where sizes are rounded up, rows without a token that counts are added at the end.
        """
        filled = [*rows, *[rows[0]] * (self.shapes.rows(len(rows)) - len(rows))]
        index = torch.tensor(filled, device=self.prompt_ids.device)
        longest = max(self.response_lengths[row] for row in rows)
        width = max(self.prompt_lengths[row] + self.response_lengths[row] for row in rows)
        # A token's log-probability comes from the position before it.
        width = self.shapes.columns(max(width, longest + 1))
        length = min(self.shapes.responses(longest), width - 1)
        responses = self.response_mask[index].sum(1, keepdim=True)
        tokens = self.prompt_mask[index].sum(1, keepdim=True) + responses
        columns = torch.arange(width, device=index.device) - width
        ends = self.prompt_ids.shape[1] + responses  # of each row in prompt_ids and response_ids side by side
        ids = torch.cat([self.prompt_ids[index], self.response_ids[index]], dim=1)
        shift = length - responses
        shift[len(rows) :] = length
        return Batch(
            index=index,
            count=len(rows),
            input_ids=ids.gather(1, (ends + columns).clamp(min=0)),
            attention_mask=(columns >= -tokens).long(),
            length=length,
            shift=shift,
        )


@dataclass
class Batch:
    """Rows of a rollout as a model takes them, left-padded: T' = longest row, R' = `length` of the longest response.

    Attributes:
        index: [b] rows of the rollout.
        count: how many of them are real; those after them repeat the first, and none of their tokens counts.
        input_ids, attention_mask: [b,T'].
        length: R'; responses end in the last column, where those of a rollout begin in the first.
        shift: [b,1] columns by which each response is moved for that.
    """

    index: Tensor
    count: int
    input_ids: Tensor
    attention_mask: Tensor
    length: int
    shift: Tensor

    def fit(self, x: Tensor) -> Tensor:
        """These rows of `x` [B,R], responses moved to the end, [b,R']; 0 where there is no response."""
        columns = torch.arange(self.length, device=x.device) - self.shift
        return x[self.index].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)

    def put(self, x: Tensor, into: Tensor, mask: Tensor) -> None:
        """The other way round: write `x` [b,R'] to its rows of `into` [B,R]; 0 where `mask` [B,R] is False."""
        index = self.index[: self.count]
        columns = torch.arange(mask.shape[1], device=x.device) + self.shift[: self.count]
        moved = x[: self.count].gather(1, columns.clamp(max=self.length - 1))
        into[index] = torch.where(mask[index], moved, 0)


class PromptStream:
    """An endless, shuffled pass over the prompts; batch k depends on the seed and k alone.

    Fewer prompts than a batch are cycled and reshuffled. There is no state to save: a resumed run asks for batch k.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1:
            raise ValueError("no prompts: the data recipe's split is empty")
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def indices(self, step: int) -> list[int]:
        """Rows of the batch of ppo_step `step` (from 0)."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, list(range(self.count))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[offset]


def uniforms(rows: int, length: int, *key: int) -> Tensor:
    """[rows, length] uniform numbers that depend on `key` (seed, step) alone, on every device and rank."""
    seed = random.Random("/".join(map(str, key))).getrandbits(63)
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def my_share(count: int, accelerator: Accelerator) -> list[int]:
    """This rank's contiguous share of `count` rows.

    Shares are equally long, as `gather` needs it: the last row is repeated, and what was gathered is cut to `count`.
    """
    each = math.ceil(count / accelerator.num_processes)
    first = each * accelerator.process_index
    return [min(row, count - 1) for row in range(first, first + each)]


def sample(
    generator: Generator,
    prompt_ids: list[list[int]],
    noise: Tensor,
    temperature: float,
    top_p: float,
    pad_id: int,
    accelerator: Accelerator,
    decode: Callable[[Sequence[int]], str],
    prompts: list[str],
    columns: dict[str, list],
    shapes: Shapes = EXACT,
) -> Rollout:
    """Sample one response per prompt, each rank its share, and give every rank the whole."""
    share = my_share(len(prompt_ids), accelerator)
    mine = generator.generate([prompt_ids[row] for row in share], noise[share], temperature, top_p)
    parts = [accelerator.gather(x.contiguous())[: len(prompt_ids)] for x in _tensors(mine)]
    response_ids, response_mask, finished, logprobs = parts
    ids, mask = left_pad(prompt_ids, pad_id)
    device = response_ids.device
    kept = [row[keep].tolist() for row, keep in zip(response_ids.cpu(), response_mask.cpu(), strict=True)]
    return Rollout(
        prompt_ids=ids.to(device),
        prompt_mask=mask.to(device),
        response_ids=response_ids,
        response_mask=response_mask,
        finished=finished,
        sampler_logprobs=logprobs,
        prompts=prompts,
        responses=[decode(row) for row in kept],
        columns=columns,
        shapes=shapes,
    )


def _tensors(generated: Generated) -> tuple[Tensor, ...]:
    return generated.response_ids, generated.response_mask, generated.finished, generated.logprobs


def plan(rollout: Rollout, rows: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """`plan_micro_batches` of these rows, as positions in `rows`."""
    lengths = [rollout.prompt_lengths[row] + rollout.response_lengths[row] for row in rows]
    return plan_micro_batches(lengths, max_tokens, ranks, rollout.shapes)


def micro_batches(
    rollout: Rollout, rows: Sequence[int], max_tokens: int, accelerator: Accelerator
) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of the given global rows.

    Yields:
        A batch and whether it counts: where this rank has fewer than others, it repeats a row that must not count.
    """
    for micro in plan(rollout, rows, max_tokens, accelerator.num_processes)[accelerator.process_index]:
        yield rollout.batch([rows[i] for i in micro] or [rows[0]]), bool(micro)


@torch.no_grad()
def evaluate_tokens(
    rollout: Rollout,
    forward: Callable[[Batch], Sequence[Tensor]],
    width: int,
    max_tokens: int,
    accelerator: Accelerator,
) -> list[Tensor]:
    """Run `forward` over all rows, each rank its share; every rank gets `width` tensors [B,R], 0 on padding.

    `forward` returns `width` tensors [b,R'] for a batch.
    """
    mask = rollout.response_mask
    results = [torch.zeros(mask.shape, device=mask.device) for _ in range(width)]
    for batch, counts in micro_batches(rollout, range(mask.shape[0]), max_tokens, accelerator):
        outputs = forward(batch)
        if not counts:
            continue
        for result, output in zip(results, outputs, strict=True):
            batch.put(output.float(), result, mask)
    # Each row is filled on one rank and zero on the others: the sum is the whole.
    return [accelerator.reduce(result, "sum") for result in results]


def add_logprobs_and_values(
    rollout: Rollout, read: Callable[..., Sequence[Tensor]], max_tokens: int, accelerator: Accelerator
) -> None:
    """Fill in log-probabilities, values, entropy and the reference's log-probabilities, as `read` gives them.

    They come from the forward that training uses, not from the sampler: the first ratio is 1 whatever the back end.
    """
    rollout.logprobs, rollout.values, rollout.entropy, rollout.ref_logprobs = evaluate_tokens(
        rollout,
        lambda batch: read(batch.input_ids, batch.attention_mask, length=batch.length),
        4,
        max_tokens,
        accelerator,
    )
