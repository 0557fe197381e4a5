"""Cut a mini-batch into micro-batches that fit a token budget and hold little padding.

`plan_micro_batches` gives each response a row; `pack_rows` puts several side by side into one.

Lengths in, row indices out; no torch. Every rank computes the same plan from the same lengths and takes its own
part, so no plan has to be exchanged. The losses do not depend on it (they divide by the token count of the mini-batch).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy

from rlhf.errors import UserError


class Sizes(NamedTuple):
    """Sizes that something is rounded up to.

    Multiples of `smallest` or, with `per_octave`, of the octave's step where that is larger: at most so many between n
    and 2n. `largest` is one for what lies between the last of them below it and itself; nothing is expected above it.
    """

    smallest: int = 1
    per_octave: int | None = None
    largest: int | None = None

    def __call__(self, size: int) -> int:
        """The least of them that is not below `size` >= 1."""
        unit = self.smallest
        if self.per_octave and size > unit:
            unit = max(unit, 2 ** ((size - 1).bit_length() - 1) // self.per_octave)
        rounded = -(-size // unit) * unit
        return max(size, min(rounded, self.largest)) if self.largest else rounded


class Shapes(NamedTuple):
    """How micro-batches are cut.

    Attributes:
        overhead: what a micro-batch costs beside its area, in tokens: Python and launches while the device waits.
        rows, columns, responses: sizes of a micro-batch, and of its response columns.
    """

    overhead: int = 0
    rows: Sizes = Sizes()
    columns: Sizes = Sizes()
    responses: Sizes = Sizes()


EXACT = Shapes()
CPU = Shapes(64)
GPU = Shapes(8192)  # an estimate: at 135M the host needs as long for a micro-batch as the GPU for 26,000 tokens


def graph_shapes(max_tokens: int, longest: int, response_length: int, mini_batch_size: int) -> Shapes:
    """How micro-batches are cut for CUDA graphs, each of which holds one shape: few shapes, which come again.

    Recording one takes 0.7 s where the host is slow, as long as replaying ten: over real prompts, finer sizes hold 37
    instead of 45 % of padding and 163 instead of 26 shapes in 300 updates, which takes longer in all, even then.

    Args:
        max_tokens: see `plan_micro_batches`. The least number of rows keeps to it.
        longest: tokens of the longest prompt and of a response, together.
        response_length: most tokens of a response.
        mini_batch_size: rows of a mini-batch.
    """
    widest = -(-longest // 32) * 32
    rows = max(1, min(16, mini_batch_size, max_tokens // widest))
    return Shapes(
        overhead=2048,
        rows=Sizes(1 << (rows.bit_length() - 1), 1),
        columns=Sizes(96, 4, widest),
        responses=Sizes(64, 1, response_length),
    )


class Packed(NamedTuple):
    """How responses, each after its prompt, are put side by side into rows.

    Attributes:
        width: columns of a row; no response and its prompt are longer.
        rows, tokens: sizes of a micro-batch, and of the number of its response tokens.
    """

    width: int
    rows: Sizes = Sizes()
    tokens: Sizes = Sizes()


def packed_shapes(max_tokens: int, longest: int, graphs: bool, asked_for: bool) -> Packed | None:
    """Rows as wide as the longest response with its prompt; for CUDA graphs in few shapes. See `graph_shapes`.

    None where `max_tokens` holds no row, and packing is not asked for.

    Raises:
        UserError: it is asked for.
    """
    width = -(-longest // 32) * 32
    if width > max_tokens and not asked_for:
        return None
    if width > max_tokens:
        raise UserError(
            f"ppo.packing on: a row holds {width} tokens, the longest prompt and a response: raise "
            f"ppo.max_tokens_per_micro_batch {max_tokens} or lower ppo.max_prompt_length"
        )
    if not graphs:
        return Packed(width)
    return Packed(width, Sizes(min(2, max_tokens // width), 8), Sizes(256, 4))


def pack_rows(lengths: Sequence[int], max_tokens: int, packed: Packed) -> list[list[list[int]]]:
    """Micro-batches of rows of several entries: the longest first, each into the first row with room (FFD).

    Args:
        lengths: tokens of each entry; >= 1 and at most `packed.width`.
        max_tokens: largest area of a micro-batch; a single row is always allowed.
        packed: the width of rows, and the sizes that their number is rounded up to.

    Returns:
        plan[micro_batch][row] = indices of entries. Every entry appears once.

    Raises:
        ValueError: an entry that is longer than a row, or shorter than a token.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for entry in sorted(range(len(lengths)), key=lambda entry: (-lengths[entry], entry)):
        if not 1 <= lengths[entry] <= packed.width:
            raise ValueError(f"lengths[{entry}] is {lengths[entry]}; a row holds 1 to {packed.width} tokens")
        fits = next((row for row, left in enumerate(room) if left >= lengths[entry]), len(rows))
        if fits == len(rows):
            rows.append([])
            room.append(packed.width)
        rows[fits].append(entry)
        room[fits] -= lengths[entry]
    most = max_tokens // packed.width
    most = next((count for count in range(most, 0, -1) if packed.rows(count) <= most), 1)
    parts = -(-len(rows) // most)
    each = -(-len(rows) // max(parts, 1))
    return [rows[first : first + each] for first in range(0, len(rows), each or 1)]


def plan_micro_batches(
    lengths: Sequence[int], max_tokens: int, num_ranks: int, shapes: Shapes = EXACT
) -> list[list[list[int]]]:
    """Spread rows over ranks, balanced by tokens, and pack each rank's rows into micro-batches.

    Rows of like length go together, and a batch is cut where that saves more padding than a batch costs. Every rank
    gets the same number of micro-batches, because the collectives of FSDP must match; where a rank has too few rows
    for that, some of its micro-batches are empty and the caller runs a dummy forward and backward for them. Longest
    first: a budget that is too large for the device fails at once and not after an hour.

    Args:
        lengths: tokens of each row (prompt and response, without padding); >= 1.
        max_tokens: largest padded area of a micro-batch: its rows times the longest of them. A row that is longer
            than that gets a micro-batch of its own.
        num_ranks: number of processes; >= 1.
        shapes: what a micro-batch costs, and the sizes that it is rounded up to.

    Returns:
        plan[rank][micro_batch] = row indices, longest first. Every row appears exactly once. The token sums of any
        two ranks differ by no more than the longest row. The same input always gives the same plan.

    Raises:
        ValueError: a budget, a number of ranks or a length below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; set ppo.max_tokens_per_micro_batch to at least 1")
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; there is at least one process")
    lengths = [int(length) for length in lengths]  # numpy's small integers would overflow in rows * longest
    for row, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{row}] is {length}; a row holds at least one token")

    plans = [_pack(rows, lengths, max_tokens, shapes) for rows in _spread(lengths, num_ranks)]
    n_micro_batches = max(len(plan) for plan in plans)
    for plan in plans:
        _stretch(plan, lengths, n_micro_batches)
    return plans


def _spread(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Longest row first, each to the rank with the fewest tokens so far (Graham 1969, LPT)."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = tokens.index(min(tokens))
        ranks[rank].append(row)
        tokens[rank] += lengths[row]
    return ranks


def _pack(rows: list[int], lengths: Sequence[int], max_tokens: int, shapes: Shapes) -> list[list[int]]:
    """Cut rows, longest first, where padded area and overhead sum to the least (dynamic programming over the cuts)."""
    widths = numpy.array([shapes.columns(lengths[row]) for row in rows], dtype=numpy.int64)
    heights = numpy.array([shapes.rows(count) for count in range(1, len(rows) + 1)], dtype=numpy.int64)
    least = numpy.zeros(len(rows) + 1)  # of the first n rows
    cuts = [0] * (len(rows) + 1)  # where the last micro-batch of the first n rows begins
    for end in range(1, len(rows) + 1):
        area = heights[end - 1 :: -1] * widths[:end]  # of the rows from each start on
        total = numpy.where(area <= max_tokens, least[:end] + area + shapes.overhead, numpy.inf)
        total[-1] = least[end - 1] + area[-1] + shapes.overhead  # a row alone is always allowed
        cuts[end] = int(total.argmin())
        least[end] = total[cuts[end]]
    micro_batches, end = [], len(rows)
    while end:
        micro_batches.append(rows[cuts[end] : end])
        end = cuts[end]
    return micro_batches[::-1]


def _stretch(micro_batches: list[list[int]], lengths: Sequence[int], count: int) -> None:
    """Bring a rank up to `count` micro-batches: halve the largest while it has two rows, then add empty ones.

    Halving first, because a dummy pass costs as much time as a real one and does no work.
    """
    while len(micro_batches) < count:
        divisible = [i for i, rows in enumerate(micro_batches) if len(rows) > 1]
        if not divisible:
            micro_batches.append([])
            continue
        largest = max(divisible, key=lambda i: len(micro_batches[i]) * lengths[micro_batches[i][0]])
        rows = micro_batches[largest]
        half = (len(rows) + 1) // 2
        micro_batches[largest : largest + 1] = [rows[:half], rows[half:]]
