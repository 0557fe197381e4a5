"""Batches of preference pairs: pairs of like length together, all tensors ready, little padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.ppo.packing import EXACT, Sizes

EXTRA = ("prompt_length", "margin")  # columns of a pair, beside its ids, that the objective may read


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
