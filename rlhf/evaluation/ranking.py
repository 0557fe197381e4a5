"""Who is better, with the length taken out, and among more than two: logistic regressions on wins."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import UserError
from rlhf.evaluation.statistics import Interval, check_same_length, finite

_NUMBERS_PER_BLOCK = 4_000_000  # float64 of a block of resamples: 32 MB, whatever the number of responses
_NEWTON_STEPS, _MM_STEPS, _CONVERGED = 50, 200, 1e-9
_RIDGE = 0.1  # on the length coefficient: finite where length alone decides every win


def length_controlled_win_rate(
    a: ArrayLike,
    b: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """What the win rate of `a` over `b` would be if both were equally long.

    After AlpacaEval 2 (Dubois et al. 2024, *Length-Controlled AlpacaEval*): a logistic regression of the wins (ties one
    half) on a constant and on tanh(length difference / its standard deviation), and the prediction at difference 0.
    Their term for the difficulty of an instruction is left out: it takes many models to estimate. Half a win and half
    a loss at difference 0, and a small ridge on the coefficient of the length, keep it finite where one side always
    wins. Where length and wins rise together because longer answers are better, that is taken out as well.

    Args:
        a, b: [N] scores of the policy and of the baseline on the same prompts.
        lengths_a, lengths_b: [N] their lengths, in any unit.
        clusters, confidence, num_resamples, seed: as in `bootstrap_interval`; whole prompts are resampled.

    Raises:
        UserError: different lengths, no values, a value that is not finite.
    """
    given = {"scores": a, "baseline scores": b}
    lists = {name: finite(values, f"length-controlled win rate: {name}") for name, values in given.items()}
    check_same_length(lists)
    first, second = lists.values()
    wins = (first > second) + 0.5 * (first == second)
    options: dict[str, Any] = {"clusters": clusters, "confidence": confidence}
    return at_equal_length(wins, lengths_a, lengths_b, num_resamples=num_resamples, seed=seed, **options)


def at_equal_length(
    wins: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`length_controlled_win_rate` of verdicts: `wins` [N] are 1, 0, or between where a judge was of two minds."""
    given = {"wins": wins, "lengths": lengths_a, "baseline lengths": lengths_b}
    lists = {name: finite(values, f"length-controlled win rate: {name}") for name, values in given.items()}
    check_same_length(lists)
    wins, own, others = lists.values()
    difference = own - others
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    estimate = _at_equal_length(np.ones((1, len(wins))), wins, x)[0]
    drawn = [_at_equal_length(counts, wins, x) for counts in _resamples(len(wins), clusters, num_resamples, seed)]
    return _interval(float(estimate), np.concatenate(drawn), confidence, len(set(clusters or range(len(wins)))))


def _at_equal_length(
    weights: NDArray[np.float64], wins: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[R] P(win) at x = 0, by Newton's method for each row of `weights` [R, N]."""
    constant, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(constant[:, None] + slope[:, None] * x)
        error, curvature = weights * (wins - p), weights * p * (1 - p)
        p0 = _sigmoid(constant)  # of the half win and the half loss
        g0, g1 = error.sum(1) + 0.5 - p0, error @ x - _RIDGE * slope
        h00, h01 = curvature.sum(1) + p0 * (1 - p0), curvature @ x
        h11 = curvature @ (x * x) + _RIDGE
        determinant = h00 * h11 - h01 * h01
        # A step of at most 2 logits: the first ones overshoot where wins are all on one side.
        steps = np.clip([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0] / determinant, -2, 2)
        constant, slope = constant + steps[0], slope + steps[1]
        if np.abs(steps).max() < _CONVERGED:
            break
    return _sigmoid(constant)


def bradley_terry(
    scores: Sequence[ArrayLike],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """Strength of each policy in logits against the first, whose strength is 0: P(i beats j) = sigmoid(s_i - s_j).

    Every policy plays every other one on each prompt by its score, ties counting half (Bradley and Terry 1952), fitted
    by minorisation-maximisation (Hunter 2004). Half a win and half a loss for each pair keep it finite where one always
    wins.

    Args:
        scores: K lists [N] of scores on the same prompts, the baseline first.
        clusters, confidence, num_resamples, seed: as in `bootstrap_interval`; whole prompts are resampled.

    Returns:
        K intervals.

    Raises:
        UserError: fewer than two policies, different lengths, no values, a value that is not finite.
    """
    if len(scores) < 2:
        raise UserError(f"Bradley-Terry: got {len(scores)} policies; give at least two")
    rows = [finite(values, f"Bradley-Terry: scores {index}") for index, values in enumerate(scores)]
    check_same_length({f"scores {index}": values for index, values in enumerate(rows)})
    table = np.stack(rows)
    wins = (table[:, None] > table[None]) + 0.5 * (table[:, None] == table[None])  # [K, K, N]
    flat = wins.reshape(-1, table.shape[1]).T.astype(np.float64)
    estimate = _strengths(flat.sum(0)[None], len(rows))[0]
    drawn = [_strengths(counts @ flat, len(rows)) for counts in _resamples(len(flat), clusters, num_resamples, seed)]
    sampled = np.concatenate(drawn)
    n = len(set(clusters or range(len(flat))))
    return [_interval(float(estimate[k]), sampled[:, k], confidence, n) for k in range(len(rows))]


def _strengths(wins: NDArray[np.float64], policies: int) -> NDArray[np.float64]:
    """[R, K] log-strengths against the first, from wins [R, K*K] of the row's policy over the column's."""
    wins = wins.reshape(-1, policies, policies) + 0.5
    wins[:, range(policies), range(policies)] = 0.0
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
    strength = np.ones(won.shape)
    for _ in range(_MM_STEPS):
        strength = won / (games / (strength[:, :, None] + strength[:, None, :])).sum(2)
        strength /= strength.mean(1, keepdims=True)
    return np.log(strength / strength[:, :1])


def _resamples(
    size: int, clusters: Sequence[Hashable] | None, num_resamples: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    """Blocks [r, N] of how often each value is drawn when whole clusters are drawn with replacement."""
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(cluster, len(position)) for cluster in (clusters or range(size))])
    count = len(position)
    rng, block = np.random.default_rng(seed), max(1, _NUMBERS_PER_BLOCK // size)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=rows)[:, index].astype(np.float64)


def _interval(value: float, sampled: NDArray[np.float64], confidence: float, n: int) -> Interval:
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(sampled, [tail, 100.0 - tail])
    return Interval(value, float(low), float(high), n)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-logits))
