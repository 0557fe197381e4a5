"""Intervals: how sure are we of a mean, of a win rate, of an accuracy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import UserError

# Indices drawn at once: 2 million int64 are 16 MB, whatever the number of prompts.
_INDICES_PER_BLOCK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits and the number of independent units (prompts, pairs) behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    values: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a percentile-bootstrap interval.

    Prompts are resampled, not responses: several responses to one prompt are not independent. For a paired comparison
    pass the differences, which resamples both policies by the same prompts.

    Args:
        values: [N] finite numbers, one per response.
        clusters: [N] what each value belongs to (its prompt); None where every value is a unit of its own.
        confidence: in (0, 1).
        num_resamples: bootstrap samples, at least 1.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        Mean, limits, and the number of clusters. The interval has no width where all values are equal.

    Raises:
        UserError: no values, a value that is not finite, clusters of another length, confidence out of range.
    """
    array = finite(values, "bootstrap values")
    _check_confidence(confidence)
    if num_resamples < 1:
        raise UserError(f"bootstrap: num_resamples is {num_resamples}; give at least 1")
    sums, counts = _cluster_totals(array, clusters)
    means = _resampled_means(sums, counts, num_resamples, np.random.default_rng(seed))
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(float(array.mean()), float(low), float(high), len(sums))


def t_interval(values: ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95) -> Interval:
    """Mean of `values` with Student's interval over clusters, for a confidence that no bootstrap can resolve.

    The ends of a percentile bootstrap are among its resamples: of 2,000 none says where the outer 0.01 % begin. For
    the differences of a paired comparison; with clusters of unequal size the mean is a ratio, and its standard error
    that of the linearised one (Cochran 1977, *Sampling Techniques*, section 6.3).

    Args:
        values, clusters, confidence: as in `bootstrap_interval`.

    Returns:
        Mean, limits, and the number of clusters. One cluster alone says nothing of its spread: its limits are infinite.

    Raises:
        UserError: what `bootstrap_interval` refuses.
    """
    from scipy.stats import t as student

    array = finite(values, "t interval: values")
    _check_confidence(confidence)
    sums, counts = _cluster_totals(array, clusters)
    n, mean = len(sums), float(array.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    residuals = (sums - mean * counts) / counts.mean()
    error = math.sqrt(float(residuals @ residuals) / (n * (n - 1)))
    half = float(student.isf((1.0 - confidence) / 2.0, n - 1)) * error
    return Interval(mean, mean - half, mean + half, n)


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Share of prompts on which `a` scores above `b`, ties counting one half, with a bootstrap interval over prompts.

    Args:
        a: [N] scores of the policy asked about.
        b: [N] scores of the baseline on the same prompts, in the same order.
        clusters, confidence, num_resamples, seed: as in `bootstrap_interval`.

    Raises:
        UserError: different lengths, and what `bootstrap_interval` refuses.
    """
    first, second = finite(a, "win rate: first scores"), finite(b, "win rate: second scores")
    if first.shape != second.shape:
        raise UserError(f"win rate: got {len(first)} and {len(second)} scores; score both policies on the same prompts")
    wins = (first > second) + 0.5 * (first == second)
    return bootstrap_interval(wins, clusters=clusters, confidence=confidence, num_resamples=num_resamples, seed=seed)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Accuracy `successes / n` with the Wilson score interval, which keeps its coverage near 0 and 1 (Wilson 1927).

    Args:
        successes: in [0, n]; halves are allowed, a tie counts one half.
        n: number of independent trials, at least 1.
        confidence: in (0, 1).

    Raises:
        UserError: `n` below 1, successes outside [0, n], confidence out of range.
    """
    _check_confidence(confidence)
    if n < 1:
        raise UserError(f"Wilson interval: n is {n}; at least 1 trial is needed")
    if not 0 <= successes <= n:
        raise UserError(f"Wilson interval: successes is {successes} of n = {n}; give a number from 0 to n")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    p = successes / n
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact at the ends, where rounding would leave 2e-17 instead of 0.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(p, low, high, n)


def _cluster_totals(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values of each cluster, clusters in order of first appearance."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise UserError(f"interval: got {len(clusters)} clusters for {len(values)} values; give one per value")
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(cluster, len(position)) for cluster in clusters])
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """[num_resamples] means, each over as many clusters as there are, drawn with replacement."""
    n = len(sums)
    block = max(1, _INDICES_PER_BLOCK // n)
    means = []
    for start in range(0, num_resamples, block):
        drawn = rng.integers(n, size=(min(block, num_resamples - start), n))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    """[N] float64 of what was given.

    Raises:
        UserError: not one-dimensional, empty, or a number that is not finite; `what` names it.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise UserError(f"{what}: got shape {array.shape}; give a non-empty list of numbers, one per response")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{what}: entry {index} is {array[index]}; give finite numbers only")
    return array


def check_same_length(lists: Mapping[str, NDArray[np.float64]]) -> None:
    """Refuse lists that do not belong to the same responses.

    Raises:
        UserError: lengths differ.
    """
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"statistics: lengths differ: {lengths}; give one number per response in each")


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise UserError(f"interval: confidence is {confidence}; give a fraction between 0 and 1, such as 0.95")
