"""Batches of preference pairs: pairs of like length together, all tensors ready, little padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from rlhf.ppo.packing import EXACT, Sizes

EXTRA = ("prompt_length", "margin")  # columns of a pair, beside its ids, that the objective may read
POOL = 32  # batches whose pairs are sorted together: more of them leave less padding and less chance


class LengthSampler(Sampler[int]):
    """Rows in a random order in which those of one batch are of like length.

    The order is a function of the seed and the epoch, so a resumed run continues it. Each pool of `POOL` random batches
    is sorted by length and cut into batches again; then the batches are shuffled. The short batch comes last.

    Args:
        lengths: of each row; a pair is as long as the longer of its two.
        batch: pairs of one optimizer step on all ranks.
        seed: of the order.
        epoch: gives the pass that begins. (Accelerate's `set_epoch` reaches a sampler in one process only.)
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch()}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        pools = [sorted(part, key=lambda row: -self.lengths[row]) for part in _cut(order, POOL * self.batch)]
        batches = [batch for pool in pools for batch in _cut(pool, self.batch)]
        draw.shuffle(batches)
        batches.sort(key=lambda batch: len(batch) < self.batch)
        return (row for batch in batches for row in batch)


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def pair_lengths(pairs: Iterable[dict[str, Sequence[int]]]) -> list[int]:
    """Tokens of the longer sequence of each pair."""
    return [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]


class PairCollator:
    """Pairs -> one batch for one forward: all chosen sequences, then all rejected ones, padded on the right.

    Args:
        pad_id: of the tokenizer.
        columns: lengths that batches are rounded up to.
    """

    def __init__(self, pad_id: int, columns: Sizes = EXACT.columns) -> None:
        self.pad_id, self.columns = pad_id, columns

    def __call__(self, pairs: list[dict[str, Sequence[int] | Tensor]]) -> dict[str, Tensor]:
        """`input_ids` [2n,T], `lengths` [2n], their sum `tokens`, and the columns of `EXTRA` [n] that pairs have."""
        rows = [torch.as_tensor(pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        ids = torch.nn.functional.pad(ids, (0, self.columns(ids.shape[1]) - ids.shape[1]), value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        extra = {key: torch.stack([torch.as_tensor(pair[key]) for pair in pairs]) for key in EXTRA if key in pairs[0]}
        return {"input_ids": ids, "lengths": lengths, "tokens": lengths.sum()} | extra
