"""Splits: disjoint, repeatable, independent of row order."""

from collections import Counter

import pytest

from rlhf.data.recipe import SplitSpec
from rlhf.data.splits import assign_splits, group_key
from rlhf.errors import UserError

KEYS = [f"row {i}" for i in range(4000)]


def test_fractions_are_met_and_pinned():
    sides = assign_splits(KEYS, SplitSpec(fractions={"train": 0.8, "test": 0.1}, seed=3))
    counts = Counter(sides)
    assert abs(counts["train"] - 3200) < 100  # standard deviation 25
    assert abs(counts["test"] - 400) < 80
    assert abs(counts[None] - 400) < 80
    # Typed in: a change of the hash would move rows of every published run.
    assert sides[:12] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        None,
        "test",
        "train",
        "train",
        "train",
        "train",
    ]


def test_a_side_depends_on_key_and_seed_alone():
    spec = SplitSpec(seed=3)
    sides = dict(zip(KEYS, assign_splits(KEYS, spec), strict=True))
    assert assign_splits(KEYS[::-1], spec) == [sides[key] for key in KEYS[::-1]]
    assert assign_splits(KEYS[7:9], spec) == [sides[key] for key in KEYS[7:9]]
    other = assign_splits(KEYS, SplitSpec(seed=4))
    assert other != list(sides.values())


def test_full_shares_leave_no_row_out():
    shares = dict.fromkeys("abcdefghij", 0.1)  # sums to 0.9999999999999999
    assert None not in assign_splits(KEYS, SplitSpec(fractions=shares))


def test_counts_are_exact_and_order_independent():
    spec = SplitSpec(rows={"train": 1500, "judge": 1000}, seed=5)
    sides = assign_splits(KEYS, spec)
    assert Counter(sides) == {"train": 1500, "judge": 1000, None: 1500}
    assert assign_splits(KEYS[::-1], spec) == sides[::-1]


def test_duplicates_stay_on_one_side():
    keys = [f"group {i // 2}" for i in range(1000)]
    for spec in (SplitSpec(), SplitSpec(rows={"a": 501, "b": 400, "c": 99 - 1 + 1})):
        if spec.rows:
            with pytest.raises(UserError, match=r"split\.rows\.a: 501 rows wanted, but 1 are missing"):
                assign_splits(keys, spec)
            continue
        sides: dict = {}
        for key, side in zip(keys, assign_splits(keys, spec), strict=True):
            assert sides.setdefault(key, side) == side
    odd = [*keys, "single"]
    assert Counter(assign_splits(odd, SplitSpec(rows={"a": 501, "b": 500}))) == {"a": 501, "b": 500}


def test_too_few_rows():
    with pytest.raises(UserError, match=r"split.rows.b: 3000 rows wanted, but 1000 are missing"):
        assign_splits(KEYS, SplitSpec(rows={"a": 2000, "b": 3000}))


def test_max_rows_keeps_whole_groups():
    spec = SplitSpec(max_rows=100, fractions={"train": 1.0}, seed=1)
    keys = [f"group {i // 3}" for i in range(900)]
    kept = Counter(key for key, side in zip(keys, assign_splits(keys, spec), strict=True) if side)
    assert sum(kept.values()) == 99
    assert set(kept.values()) == {3}


def test_group_keys_ignore_case_spacing_and_unicode_form():
    assert group_key("  Ａ  Film\n") == group_key("a film") == "a film"
    assert group_key("电影") != group_key("电视")
    assert group_key([{"role": "user", "content": "你好"}]) == '[{"content": "你好", "role": "user"}]'
    assert group_key({"b": 1, "a": 2}) == group_key({"a": 2, "b": 1})
