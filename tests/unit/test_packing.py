"""Micro-batch plans: hand-typed plans and the promises of the docstring as properties."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import UserError
from rlhf.ppo.packing import Packed, Shapes, Sizes, graph_shapes, pack_rows, packed_shapes, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
BUDGETS = st.integers(1, 300)
RANKS = st.integers(1, 5)
FEW = Shapes(10**6)  # a micro-batch costs so much that no cut ever pays


def greedy_count(lengths, max_tokens):
    """Fewest micro-batches for these rows, by dynamic programming over the sorted rows."""
    ordered = sorted(lengths, reverse=True)
    best = [0] + [len(ordered)] * len(ordered)
    for end in range(1, len(ordered) + 1):
        for start in range(end):
            if end - start == 1 or (end - start) * ordered[start] <= max_tokens:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


def test_by_hand_one_rank():
    # 9 alone (2 * 9 > 16); 8 and 7 (2 * 8 = 16); 3, 2, 2 (3 * 3 = 9)
    assert plan_micro_batches([2, 9, 7, 3, 8, 2], max_tokens=16, num_ranks=1, shapes=FEW) == [[[1], [4, 2], [3, 0, 5]]]


def test_a_cut_is_made_where_it_saves_more_than_it_costs():
    lengths = [9, 9, 4, 4, 4, 1]
    # One batch has an area of 54. Cutting after the nines saves 20, after the fours 3 more.
    assert plan_micro_batches(lengths, 100, 1, Shapes(21)) == [[[0, 1, 2, 3, 4, 5]]]
    assert plan_micro_batches(lengths, 100, 1, Shapes(19)) == [[[0, 1], [2, 3, 4, 5]]]
    assert plan_micro_batches(lengths, 100, 1, Shapes(2)) == [[[0, 1], [2, 3, 4], [5]]]


def test_by_hand_two_ranks():
    # longest first to the lighter rank: 9 | 8; 9 | 8 + 7; 9 + 3 | 15; 12 + 2 | 15; 14 + 2 | 15
    assert plan_micro_batches([2, 9, 7, 3, 8, 2], max_tokens=16, num_ranks=2, shapes=FEW) == [
        [[1], [3, 0, 5]],
        [[4], [2]],  # [4, 2] would fit, but rank 0 has two micro-batches: halved
    ]


def test_a_rank_with_too_few_rows_gets_empty_micro_batches():
    assert plan_micro_batches([5, 1, 1, 1], max_tokens=1, num_ranks=2) == [[[0], [], []], [[1], [2], [3]]]
    assert plan_micro_batches([4], max_tokens=8, num_ranks=3) == [[[0]], [[]], [[]]]
    assert plan_micro_batches([3, 3, 2, 2, 2], max_tokens=1, num_ranks=2) == [[[0], [2], [4]], [[1], [3], []]]


def test_halving_takes_the_largest_padded_area_and_keeps_the_order():
    # Rank 0 needs three, rank 1 two. Areas on rank 1: [4, 3, 2] 12 against [5, 5] 10, though the latter is wider.
    assert plan_micro_batches([8, 5, 5, 5, 4, 3, 3, 3, 2], max_tokens=12, num_ranks=2, shapes=FEW) == [
        [[0], [3], [5, 7]],
        [[1, 2], [4, 6], [8]],
    ]
    # [6, 5] 12 and [4, 3, 1] 12, though the latter has more rows: the first of equals
    assert plan_micro_batches([9, 6, 5, 5, 4, 4, 3, 2, 1], max_tokens=13, num_ranks=2, shapes=FEW) == [
        [[0], [3, 5], [7]],
        [[1], [2], [4, 6, 8]],
    ]


def test_an_oversized_row_stands_alone():
    assert plan_micro_batches([100, 2, 2], max_tokens=10, num_ranks=1, shapes=FEW) == [[[0], [1, 2]]]


def test_no_rows():
    assert plan_micro_batches([], max_tokens=10, num_ranks=2) == [[], []]


def test_equal_lengths_keep_their_order():
    assert plan_micro_batches([3, 3, 3, 3], max_tokens=6, num_ranks=1) == [[[0, 1], [2, 3]]]


def test_small_numpy_integers_do_not_overflow():
    lengths = np.array([100, 100, 100], dtype=np.int8)
    assert plan_micro_batches(lengths, max_tokens=199, num_ranks=1) == [[[0], [1], [2]]]
    assert plan_micro_batches(lengths, max_tokens=300, num_ranks=1) == [[[0, 1, 2]]]


@given(LENGTHS, BUDGETS, RANKS)
def test_every_row_exactly_once(lengths, max_tokens, num_ranks):
    plan = plan_micro_batches(lengths, max_tokens, num_ranks)
    assert len(plan) == num_ranks
    assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(len(lengths)))


@given(LENGTHS, BUDGETS, RANKS)
def test_padded_area_fits_the_budget_unless_one_row_alone_exceeds_it(lengths, max_tokens, num_ranks):
    for rank in plan_micro_batches(lengths, max_tokens, num_ranks):
        for rows in rank:
            assert len(rows) <= 1 or len(rows) * max(lengths[row] for row in rows) <= max_tokens


@given(LENGTHS, BUDGETS, RANKS)
def test_all_ranks_take_part_equally_often_and_empty_ones_only_for_want_of_rows(lengths, max_tokens, num_ranks):
    plan = plan_micro_batches(lengths, max_tokens, num_ranks)
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1
    for rank in plan:
        if [] in rank:
            assert all(len(rows) <= 1 for rows in rank)
            assert rank == sorted(rank, key=lambda rows: not rows)  # the empty ones come last


@given(LENGTHS, BUDGETS, RANKS)
def test_no_more_micro_batches_than_needed(lengths, max_tokens, num_ranks):
    plan = plan_micro_batches(lengths, max_tokens, num_ranks, shapes=FEW)
    needed = [greedy_count([lengths[row] for rows in rank for row in rows], max_tokens) for rank in plan]
    assert len(plan[0]) == max(needed)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 80), st.integers(0, 30))
def test_no_cutting_of_the_sorted_rows_costs_less(lengths, max_tokens, overhead):
    ordered = sorted(lengths, reverse=True)

    def cost(sizes):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        areas = [size * ordered[start] for size, start in zip(sizes, starts, strict=True)]
        fits = all(area <= max_tokens or size == 1 for area, size in zip(areas, sizes, strict=True))
        return sum(areas) + overhead * len(sizes) if fits else float("inf")

    def compositions(n):
        return [[first, *rest] for first in range(1, n + 1) for rest in compositions(n - first)] if n else [[]]

    (plan,) = plan_micro_batches(lengths, max_tokens, 1, Shapes(overhead))
    assert cost([len(rows) for rows in plan]) == min(map(cost, compositions(len(lengths))))


@given(LENGTHS, BUDGETS, RANKS)
def test_ranks_differ_by_at_most_the_longest_row(lengths, max_tokens, num_ranks):
    plan = plan_micro_batches(lengths, max_tokens, num_ranks)
    tokens = [sum(lengths[row] for rows in rank for row in rows) for rank in plan]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@given(LENGTHS, BUDGETS, RANKS)
def test_each_rank_goes_from_long_to_short(lengths, max_tokens, num_ranks):
    for rank in plan_micro_batches(lengths, max_tokens, num_ranks):
        walked = [lengths[row] for rows in rank for row in rows]
        assert walked == sorted(walked, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], 0, 1), "max_tokens is 0; set ppo.max_tokens_per_micro_batch"),
        (([1], 8, 0), "num_ranks is 0"),
        (([0], 8, 1), r"lengths\[0\] is 0"),
        (([3, 0], 8, 1), r"lengths\[1\] is 0; a row holds at least one token"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(*arguments)


def test_sizes_by_hand():
    every, fours = Sizes(), Sizes(32, 4)
    assert [every(n) for n in (1, 7, 1000)] == [1, 7, 1000]
    assert [Sizes(1, 2)(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [fours(n) for n in (1, 33, 128, 129, 256, 257, 320, 321, 513)] == [32, 64, 128, 160, 256, 320, 320, 384, 640]


@given(st.integers(1, 10_000), st.sampled_from([1, 2, 32, 64]), st.sampled_from([1, 2, 4, 8]))
def test_a_size_is_the_least_that_is_large_enough(size, smallest, per_octave):
    sizes = Sizes(smallest, per_octave)
    rounded = sizes(size)
    assert size <= rounded < size + max(smallest, size / per_octave)
    assert rounded % smallest == 0 and sizes(rounded) == rounded


def test_nothing_is_rounded_above_the_largest():
    sizes = Sizes(96, 4, 576)
    assert [sizes(n) for n in (1, 97, 480, 481, 577)] == [96, 192, 480, 576, 577]  # without it 640 for the last two
    assert [Sizes(64, 1, 192)(n) for n in (64, 65, 129, 192)] == [64, 128, 192, 192]


@pytest.mark.parametrize(("max_tokens", "longest"), [(16_384, 640), (4096, 640), (100, 640), (10_000, 620)])
def test_shapes_for_graphs_are_few_and_fit_the_budget(max_tokens, longest):
    shapes, draw, seen = graph_shapes(max_tokens, longest, 512, 256), random.Random(0), set()
    for _ in range(30):
        lengths = [min(longest, 128 + int(draw.lognormvariate(4, 1))) for _ in range(256)]
        (plan,) = plan_micro_batches(lengths, max_tokens, 1, shapes)
        for rows in plan:
            shape = shapes.rows(len(rows)), shapes.columns(max(lengths[row] for row in rows))
            assert shape[0] * shape[1] <= max_tokens or shape[0] == 1
            seen.add(shape)
    assert len(seen) <= 20


def test_shapes_for_graphs_hold_no_more_rows_than_a_mini_batch():
    assert [graph_shapes(16_384, 640, 512, size).rows(1) for size in (1, 4, 12, 64)] == [1, 4, 8, 16]


# ------------------------------------------------------------------------------------------- several responses in a row
def test_rows_of_several_by_hand():
    lengths = [3, 9, 4, 6, 2, 1]
    # Longest first, each into the first row with room: 9 1 | 6 4 | 3 2
    assert pack_rows(lengths, 100, Packed(10)) == [[[1, 5], [3, 2], [0, 4]]]
    assert pack_rows(lengths, 20, Packed(10)) == [[[1, 5], [3, 2]], [[0, 4]]]
    assert pack_rows(lengths, 39, Packed(10, Sizes(2))) == [[[1, 5], [3, 2]], [[0, 4]]]  # 3 rows would be 4
    assert pack_rows(lengths, 5, Packed(10)) == [[[1, 5]], [[3, 2]], [[0, 4]]]  # a row alone is always allowed
    assert pack_rows([], 100, Packed(10)) == []


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(1, 1000), st.sampled_from([Sizes(), Sizes(2, 8)]))
def test_rows_of_several_hold_each_entry_once(lengths, max_tokens, sizes):
    packed = Packed(64, sizes)
    plan = pack_rows(lengths, max_tokens, packed)
    assert sorted(entry for part in plan for row in part for entry in row) == list(range(len(lengths)))
    rows = [row for part in plan for row in part]
    assert all(row and sum(lengths[entry] for entry in row) <= 64 for row in rows)
    assert all(len(part) == 1 or sizes(len(part)) * 64 <= max_tokens for part in plan)
    assert sum(sum(lengths[entry] for entry in row) <= 32 for row in rows) <= 1  # two such rows would be one


@pytest.mark.parametrize(("lengths", "value"), [([3, 0], "0"), ([3, 11], "11")])
def test_what_is_longer_than_a_row_is_said(lengths, value):
    with pytest.raises(ValueError, match=rf"lengths\[1\] is {value}; a row holds 1 to 10 tokens"):
        pack_rows(lengths, 100, Packed(10))


def test_a_budget_that_holds_no_row_is_said():
    assert packed_shapes(608, 600, graphs=True, asked_for=False) == Packed(608, Sizes(1, 8), Sizes(256, 4))
    assert packed_shapes(608, 600, graphs=False, asked_for=True) == Packed(608)
    with pytest.raises(
        UserError, match=r"a row holds 608 tokens, .*: raise ppo.max_tokens_per_micro_batch 607 or lower"
    ):
        packed_shapes(607, 600, graphs=True, asked_for=True)
    assert packed_shapes(607, 600, graphs=True, asked_for=False) is None


def test_packed_shapes_are_few_and_hold_little_padding():
    draw, seen, area, tokens = random.Random(0), set(), 0, 0
    packed = packed_shapes(16_384, 576, graphs=True, asked_for=True)
    for _ in range(60):
        pairs = [
            (min(384, int(draw.lognormvariate(4.6, 0.7))), min(192, int(draw.lognormvariate(3.8, 0.6)) + 1))
            for _ in range(32)
        ]
        (part,) = pack_rows([max(2, p) + r for p, r in pairs], 16_384, packed)
        seen.add((packed.rows(len(part)), packed.tokens(sum(r for _, r in pairs))))
        area += packed.rows(len(part)) * packed.width
        tokens += sum(max(2, p) + r for p, r in pairs)
    assert len(seen) <= 20 and tokens / area > 0.85
