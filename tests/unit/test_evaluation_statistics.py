"""Intervals against numbers from textbooks, exact enumeration, and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from rlhf.errors import UserError
from rlhf.evaluation.statistics import bootstrap_interval, t_interval, wilson_interval, win_rate


def test_wilson_interval_typed_values():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415, half 1.95996 sqrt(0.016 + 0.0096036) / 1.38415.
    interval = wilson_interval(8, 10)
    assert (interval.value, interval.n) == (0.8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))
    # No successes: the upper limit is z^2 / (n + z^2).
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(0, 10).high == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    assert wilson_interval(10, 10).high == 1.0


def test_win_rate_with_ties():
    rate = win_rate([3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 4.0])
    assert rate.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert rate.n == 4
    assert win_rate([1.0, 1.0], [1.0, 1.0]).value == 0.5


def test_bootstrap_limits_match_the_exact_bootstrap_distribution():
    values = [0.0, 1.0, 2.0, 4.0, 8.0]
    every_mean = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=5)])
    low, high = every_mean[int(0.025 * 3125)], every_mean[int(0.975 * 3125)]
    interval = bootstrap_interval(values, num_resamples=40_000, seed=1)
    assert interval.value == 3.0
    assert interval.low == pytest.approx(low, abs=0.11)  # neighbouring means are 0.2 apart
    assert interval.high == pytest.approx(high, abs=0.21)


def test_bootstrap_is_seeded_and_ordered():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval(values, seed=7) == bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)
    interval = bootstrap_interval(values)
    assert interval.low < interval.value < interval.high
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow.high - narrow.low < interval.high - interval.low


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    wins = rng.random((400, 100)) < 0.7
    covered = 0
    for seed, sample in enumerate(wins):
        interval = bootstrap_interval(sample, num_resamples=400, seed=seed)
        covered += interval.low <= 0.7 <= interval.high
    assert 0.90 <= covered / 400 <= 0.985


def test_repeated_prompts_are_one_unit_and_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 4)
    clusters = [f"prompt {i // 4}" for i in range(160)]
    clustered, naive = bootstrap_interval(values, clusters=clusters), bootstrap_interval(values)
    assert clustered.n == 40
    assert clustered.value == pytest.approx(naive.value)
    # Four copies of a value carry no new information: the width shrinks by 2 where they are taken as independent.
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(2.0, rel=0.15)


def test_clusters_of_unequal_size_keep_the_mean_over_responses():
    interval = bootstrap_interval([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"])
    assert interval.value == 0.25
    assert (interval.low, interval.high, interval.n) == (0.0, 1.0, 2)


def test_blocks_give_the_same_interval(monkeypatch):
    from rlhf.evaluation import statistics

    values = np.random.default_rng(5).normal(size=30)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(statistics, "_INDICES_PER_BLOCK", 70)
    assert bootstrap_interval(values) == whole


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: bootstrap_interval([]), r"shape \(0,\)"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "entry 1 is nan"),
        (lambda: bootstrap_interval([1.0], clusters=["a", "b"]), "2 clusters for 1 values"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence is 95"),
        (lambda: bootstrap_interval([1.0], num_resamples=0), "num_resamples is 0"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "1 and 2 scores"),
        (lambda: wilson_interval(3, 2), "3 of n = 2"),
        (lambda: wilson_interval(0, 0), "n is 0"),
    ],
)
def test_bad_input_is_one_line(call, seen):
    with pytest.raises(UserError, match=seen) as error:
        call()
    assert "\n" not in str(error.value)


def test_t_interval_is_students():
    values = [0.5, -1.0, 2.0, 0.25, 1.5]
    for confidence in (0.95, 0.9999):
        expected = ttest_1samp(values, 0.0).confidence_interval(confidence)
        found = t_interval(values, confidence=confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert (found.value, found.n) == (pytest.approx(0.65), 5)


def test_t_interval_counts_clusters():
    once = t_interval([0.5, -1.0, 2.0], confidence=0.9)
    thrice = t_interval([0.5, -1.0, 2.0] * 3, clusters=["a", "b", "c"] * 3, confidence=0.9)
    assert (thrice.low, thrice.high, thrice.n) == (pytest.approx(once.low), pytest.approx(once.high), 3)
    # Unequal sizes: residuals of the sums (0 - 1 and 4 - 3) by the mean size 2; the quartiles of t(1) are -1 and 1.
    unequal = t_interval([0.0, 2.0, 1.0, 1.0], clusters=["a", "b", "b", "b"], confidence=0.5)
    assert (unequal.value, unequal.low, unequal.high) == (1.0, pytest.approx(0.5), pytest.approx(1.5))


def test_t_interval_of_one_cluster_is_sure_of_nothing():
    found = t_interval([1.0, 1.0], clusters=["a", "a"])
    assert (found.value, found.low, found.high, found.n) == (1.0, -math.inf, math.inf, 1)
    with pytest.raises(UserError, match="confidence"):
        t_interval([1.0, 2.0], confidence=1.0)
