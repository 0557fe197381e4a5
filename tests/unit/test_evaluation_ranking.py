"""Length-controlled win rate and Bradley-Terry: against scikit-learn, closed forms, and planted truths."""

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.evaluation.ranking import at_equal_length, bradley_terry, length_controlled_win_rate
from rlhf.evaluation.statistics import win_rate


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def planted(quality: float, per_length: float, n: int = 4000, seed: int = 0):
    """Scores and lengths of a policy whose answers are longer, and of a judge that also likes length."""
    random = np.random.default_rng(seed)
    lengths, baseline = random.normal(30, 8, n), random.normal(20, 8, n)
    difference = lengths - baseline
    x = np.tanh(difference / difference.std())
    won = random.random(n) < sigmoid(quality + per_length * x)
    return won.astype(float), np.full(n, 0.5), lengths, baseline


def test_a_judge_that_only_likes_length_gives_no_lead():
    scores = planted(quality=0.0, per_length=2.0)
    plain = win_rate(scores[0], scores[1], num_resamples=200)
    controlled = length_controlled_win_rate(*scores, num_resamples=200)
    assert plain.low > 0.6  # longer, so it wins
    assert controlled.low < 0.5 < controlled.high and controlled.high - controlled.low < 0.1


def test_a_lead_that_length_hides_is_found():
    controlled = length_controlled_win_rate(*planted(quality=1.0, per_length=-2.0), num_resamples=200)
    assert controlled.low < sigmoid(1.0) < controlled.high


def test_it_is_a_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    won, half, lengths, baseline = planted(quality=0.4, per_length=0.9, n=300, seed=1)
    difference = lengths - baseline
    x = np.tanh(difference / difference.std())
    # Half a win and half a loss at 0, and the same ridge on the slope alone: a second copy of the constant column.
    columns, labels = np.append(x, [0, 0])[:, None], np.append(won, [1, 0])
    weights = np.append(np.ones(300), [0.5, 0.5])
    model = linear_model.LogisticRegression(C=1 / 0.1, tol=1e-10).fit(columns, labels, sample_weight=weights)
    value = length_controlled_win_rate(won, half, lengths, baseline, num_resamples=2).value
    assert value == pytest.approx(float(sigmoid(model.intercept_[0])), abs=1e-6)


def test_equal_lengths_leave_the_win_rate():
    a, b = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0]
    # Two wins and a tie of four; half a win and half a loss more: 3 of 5.
    assert length_controlled_win_rate(a, b, [7] * 4, [7] * 4).value == pytest.approx(3 / 5)


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4], [9, 9, 9, 8]])
def test_a_policy_that_always_wins_has_a_finite_rate(lengths):
    rate = length_controlled_win_rate([1.0] * 4, [0.0] * 4, lengths, [2, 2, 2, 2])
    assert 0.5 < rate.value < 1 and rate.low <= rate.value <= rate.high


def test_intervals_resample_prompts():
    won, half, lengths, baseline = planted(0.5, 0.5, n=100)
    many = [np.tile(values, 10) for values in (won, half, lengths, baseline)]
    prompts = list(range(100)) * 10
    single = length_controlled_win_rate(won, half, lengths, baseline, num_resamples=500)
    repeated = length_controlled_win_rate(*many, clusters=prompts, num_resamples=500)
    naive = length_controlled_win_rate(*many, num_resamples=500)
    assert (single.n, repeated.n, naive.n) == (100, 100, 1000)
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.15)
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_two_policies_have_a_closed_form():
    # 30 wins of 40 and the half win and half loss: the log-odds of 30.5 to 10.5.
    first, second = [0.0] * 40, [1.0] * 30 + [-1.0] * 10
    strengths = bradley_terry([first, second], num_resamples=300)
    assert (strengths[0].value, strengths[0].low, strengths[0].high) == (0.0, 0.0, 0.0)
    assert strengths[1].value == pytest.approx(np.log(30.5 / 10.5), abs=1e-6)
    assert 0 < strengths[1].low < strengths[1].value < strengths[1].high < 2.5


def test_planted_strengths_are_found_and_ranked():
    # Scores with Gumbel noise are won with the Bradley-Terry probabilities (Yellott 1977).
    random, truth = np.random.default_rng(0), np.array([0.0, 1.0, -0.5, 2.0])
    scores = [strength + random.gumbel(size=5000) for strength in truth]
    strengths = bradley_terry(scores, num_resamples=200)
    assert [interval.value for interval in strengths] == pytest.approx(truth, abs=0.12)
    assert np.argsort([interval.value for interval in strengths]).tolist() == [2, 0, 1, 3]
    assert max(interval.high - interval.low for interval in strengths) < 0.2


def test_all_ties_are_equal_strength():
    assert [interval.value for interval in bradley_terry([[1.0] * 5] * 3)] == pytest.approx([0.0] * 3)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: bradley_terry([[1.0]]), "got 1 policies"),
        (lambda: bradley_terry([[1.0], [1.0, 2.0]]), "lengths differ"),
        (lambda: length_controlled_win_rate([1.0], [1.0, 2.0], [1], [1]), "lengths differ"),
        (lambda: length_controlled_win_rate([1.0], [2.0], [1, 2], [1, 2]), "lengths differ"),
        (lambda: length_controlled_win_rate([np.nan], [2.0], [1], [1]), "entry 0 is nan"),
    ],
)
def test_bad_input_is_one_line(call, seen):
    with pytest.raises(UserError, match=seen) as error:
        call()
    assert "\n" not in str(error.value)


def test_half_a_verdict_is_half_a_win():
    """A judge that says A once and tie once gives 0.75: not a whole win."""
    wins = [0.75, 0.25, 0.5, 0.75] * 50
    plain = at_equal_length(wins, [5] * 200, [5] * 200, num_resamples=50)
    assert plain.value == pytest.approx(np.mean(wins), abs=0.003)
    assert plain.low < plain.value < plain.high
    sure = length_controlled_win_rate(wins, [0.5] * 200, [5] * 200, [5] * 200, num_resamples=50)
    assert sure.value > plain.value + 0.05  # what scores, of which only the order counts, would give
