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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.ppo.generation import Generated, Generator
from rlhf.ppo.generation.plain import left_pad
from rlhf.ppo.packing import EXACT, Packed, Shapes, pack_rows, plan_micro_batches


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
        packed: how responses are put side by side for the policy and the critic; None = each has a row of its own.
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
    packed: Packed | None = None

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

    def packed_batch(self, rows: Sequence[Sequence[int]], packed: Packed) -> PackedBatch:
        """Several rows of the rollout in each row of a batch, every prompt next to its response, padded at the end."""
        width, budget = self.prompt_ids.shape[1], self.response_ids.shape[1]
        source = np.zeros((packed.rows(len(rows)), packed.width), dtype=np.int64)  # in prompt and response side by side
        segments, before, place = np.zeros_like(source), [], []
        for row, members in enumerate(rows):
            end = 0
            for number, member in enumerate(members, start=1):
                prompt, response = self.prompt_lengths[member], self.response_lengths[member]
                start, end = end, end + prompt + response
                source[row, start:end] = member * (width + budget) + width - prompt + np.arange(prompt + response)
                segments[row, start:end] = number
                before.append(row * packed.width + start + prompt - 1 + np.arange(response))
                place.append(member * budget + np.arange(response))
        count = sum(map(len, before))
        flat = np.zeros((2, packed.tokens(count)), dtype=np.int64)
        flat[:, :count] = np.concatenate(before), np.concatenate(place)
        device = self.prompt_ids.device
        ids = torch.cat([self.prompt_ids, self.response_ids], dim=1).flatten()
        return PackedBatch(
            input_ids=ids[torch.from_numpy(source).to(device)],
            attention_mask=torch.from_numpy(segments).to(device),
            before=(torch.from_numpy(flat[0]).to(device),),
            place=torch.from_numpy(flat[1]).to(device),
            count=count,
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
    before: tuple[Tensor, ...] = ()  # the responses are the last columns

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


@dataclass
class PackedBatch:
    """Rows that hold several responses, each after its prompt. W columns, N response tokens of all rows.

    Attributes:
        input_ids: [n,W].
        attention_mask: [n,W]; 0 = padding, k = the k-th prompt with its response in that row.
        before: one tensor [N], where in the flattened rows the token before each response token is.
        place: [N], where in the flattened [B,R] of the rollout each response token is.
        count: how many of the N are real; those after them are the first token of all, and count nowhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    before: tuple[Tensor]
    place: Tensor
    count: int
    length: int = 0  # a graph's key: the shape of `before` says it

    def fit(self, x: Tensor) -> Tensor:
        """`x` [B,R] at the response tokens [N]; 0 after the real ones."""
        return x.flatten()[self.place].masked_fill(torch.arange(len(self.place), device=x.device) >= self.count, 0)

    def put(self, x: Tensor, into: Tensor, mask: Tensor) -> None:
        """The other way round: write `x` [N] into `into` [B,R]."""
        into.view(-1)[self.place[: self.count]] = x[: self.count]


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
    packed: Packed | None = None,
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
        packed=packed,
    )


def _tensors(generated: Generated) -> tuple[Tensor, ...]:
    return generated.response_ids, generated.response_mask, generated.finished, generated.logprobs


def lengths_of(rollout: Rollout, rows: Sequence[int]) -> list[int]:
    """Real tokens of prompt and response together, of each of these rows."""
    return [rollout.prompt_lengths[row] + rollout.response_lengths[row] for row in rows]


def plan(rollout: Rollout, rows: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """`plan_micro_batches` of these rows, as positions in `rows`."""
    return plan_micro_batches(lengths_of(rollout, rows), max_tokens, ranks, rollout.shapes)


def micro_batches(
    rollout: Rollout, rows: Sequence[int], max_tokens: int, accelerator: Accelerator
) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of the given global rows.

    Yields:
        A batch and whether it counts: where this rank has fewer than others, it repeats a row that must not count.
    """
    for micro in plan(rollout, rows, max_tokens, accelerator.num_processes)[accelerator.process_index]:
        yield rollout.batch([rows[i] for i in micro] or [rows[0]]), bool(micro)


def token_batches(
    rollout: Rollout, rows: Sequence[int], max_tokens: int, accelerator: Accelerator
) -> Iterator[tuple[Batch | PackedBatch, bool]]:
    """As `micro_batches`, for what is computed of each token: packed where the rollout is."""
    if rollout.packed is None:
        yield from micro_batches(rollout, rows, max_tokens, accelerator)
        return
    for part in pack_rows(lengths_of(rollout, rows), max_tokens, rollout.packed):
        yield rollout.packed_batch([[rows[i] for i in row] for row in part], rollout.packed), True


@torch.no_grad()
def evaluate_tokens(
    rollout: Rollout,
    forward: Callable[[Any], Sequence[Tensor]],
    width: int,
    max_tokens: int,
    accelerator: Accelerator,
) -> list[Tensor]:
    """Run `forward` over all rows, each rank its share; every rank gets `width` tensors [B,R], 0 on padding.

    `forward` returns `width` tensors [b,R'] for a batch, [N] for a packed one.
    """
    mask = rollout.response_mask
    results = [torch.zeros(mask.shape, device=mask.device) for _ in range(width)]
    for batch, counts in token_batches(rollout, range(mask.shape[0]), max_tokens, accelerator):
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
        lambda batch: read(batch.input_ids, batch.attention_mask, *batch.before, length=batch.length),
        4,
        max_tokens,
        accelerator,
    )
