"""An order of training in which rows of like length go together: little padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

POOL = 32  # batches whose rows are sorted together: more of them leave less padding and less chance


class LengthSampler(Sampler[int]):
    """Rows in a random order in which those of one batch are of like length.

    The order is a function of the seed and the epoch, so a resumed run continues it. Each pool of `POOL` random batches
    is sorted by length and cut into batches again; then the batches are shuffled. The short batch comes last.

    Args:
        lengths: of each row, in tokens.
        batch: rows of one optimizer step on all ranks.
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
