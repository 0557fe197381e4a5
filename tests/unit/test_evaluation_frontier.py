"""Best-of-n: against enumeration of subsets, and with typed numbers."""

import itertools
import math

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.evaluation import frontier
from tests.tolerances import assert_close


def by_enumeration(chosen_by, measured, n):
    """Mean over all subsets of n samples of the measured score of the best; the best of equals counts as their mean."""
    means = []
    for subset in itertools.combinations(range(len(chosen_by)), n):
        top = max(chosen_by[index] for index in subset)
        means.append(np.mean([measured[index] for index in subset if chosen_by[index] == top]))
    return np.mean(means)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    random = np.random.default_rng(n)
    chosen_by, measured = random.normal(size=(4, 6)), random.normal(size=(4, 6))
    expected = [by_enumeration(a, b, n) for a, b in zip(chosen_by, measured, strict=True)]
    assert_close(frontier.best_of_n(chosen_by, measured, n), expected, atol=1e-12)


def test_typed_expectations():
    # The best of two out of 1, 2, 3: (2 + 3 + 3) / 3. With two equal ones on top, either is taken.
    assert frontier.best_of_n([[3.0, 1.0, 2.0]], [[3.0, 1.0, 2.0]], 2)[0] == pytest.approx(8 / 3)
    assert frontier.best_of_n([[1.0, 5.0, 5.0]], [[0.0, 10.0, 20.0]], 3)[0] == pytest.approx(15.0)
    assert frontier.best_of_n([[1.0, 5.0]], [[7.0, 9.0]], 1)[0] == pytest.approx(8.0)


def test_weights_of_64_samples_stay_exact():
    scores = np.arange(64.0)[None]
    # The mean of the largest of n out of 0..N-1 is n (N + 1) / (n + 1) - 1.
    for n in (1, 2, 16, 63, 64):
        assert_close(frontier.best_of_n(scores, scores, n)[0], n * 65 / (n + 1) - 1, atol=1e-10)


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_kl_bound(n, kl):
    assert frontier.best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)


def test_ladder():
    assert frontier.ladder(1) == [1]
    assert frontier.ladder(16) == [1, 2, 4, 8, 16]
    assert frontier.ladder(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize(("n", "seen"), [(0, "n is 0"), (4, "take 1 to 3")])
def test_n_out_of_range(n, seen):
    with pytest.raises(UserError, match=seen):
        frontier.best_of_n([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], n)


def test_shapes_that_differ():
    with pytest.raises(UserError, match=r"shapes \(1, 2\) and \(2, 1\)"):
        frontier.best_of_n([[1.0, 2.0]], [[1.0], [2.0]], 1)


def test_what_the_knobs_cost_comes_on_top_of_best_of_n():
    """With top-p the SFT model is not the reference any more: the chosen samples' own log-ratio is paid, too."""
    trained, kl = np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[0.5, 1.5], [0.25, 2.25]])
    rows = frontier.frontier(trained, {"reward": trained}, kl, num_resamples=100)
    assert [row["n"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == pytest.approx((0.5 + 1.5 + 0.25 + 2.25) / 4)
    assert rows[1]["kl"] == pytest.approx(math.log(2) - 0.5 + (1.5 + 0.25) / 2)


def test_prompts_that_occur_twice_are_one_unit():
    scores = np.array([[0.0], [0.0], [1.0], [1.0]])
    (alone,) = frontier.frontier(scores, {"reward": scores}, num_resamples=2000)
    (twice,) = frontier.frontier(scores, {"reward": scores}, clusters=["p", "p", "q", "q"], num_resamples=2000)
    assert (alone["scores"]["reward"]["low"], twice["scores"]["reward"]["low"]) == (0.0, 0.0)
    assert twice["scores"]["reward"]["by_prompt"] == [0.0, 0.0, 1.0, 1.0]
    point = frontier.policy_point(1, [0.0] * 4, {"reward": [0.0, 0.0, 1.0, 1.0]}, clusters=["p"] * 4,
                                  num_resamples=100, seed=0)  # fmt: skip
    assert point["scores"]["reward"]["low"] == point["scores"]["reward"]["high"] == 0.5
