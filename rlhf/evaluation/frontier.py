"""Reward against the KL paid for it: best-of-n, and the steps of PPO. What it says of a policy: `policy_gate.py`.

Best-of-n needs no training and is hard to beat per nat of KL, so it is what a policy should be held against. The
over-optimisation curve is Gao et al. 2022, *Scaling Laws for Reward Model Overoptimization*: as the policy walks away
from its reference, the reward that it maximises keeps rising while one that it never saw turns down.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import UserError
from rlhf.evaluation.statistics import Interval, bootstrap_interval


def best_of_n_kl(n: int) -> float:
    """Largest KL to the base policy, in nats, that the best of `n` samples can have: ln n - (n - 1) / n.

    Exact where no two responses have one score and each is rare; else the true KL is smaller (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(chosen_by: ArrayLike, measured: ArrayLike, n: int) -> NDArray[np.float64]:
    """Expected score of the best of `n` responses to each prompt, from N >= n samples, without bias.

    With the N samples of a prompt in the order of `chosen_by`, the i-th (from 1) is the best of a random subset of n
    with probability C(i-1, n-1) / C(N, n). This averages over all subsets, where sampling anew would take one (Nakano
    et al. 2021, appendix I; the unbiased pass@k of Chen et al. 2021 is the case of scores 0 and 1). Equal scores are
    drawn from at random: each counts as their mean.

    Args:
        chosen_by: [P, N] the scores that the best is chosen by.
        measured: [P, N] the scores that are reported; the same array for the reward itself.
        n: 1 to N.

    Returns:
        [P] expectations.

    Raises:
        UserError: shapes that differ, n out of range.
    """
    order, values = np.asarray(chosen_by, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if order.ndim != 2 or order.shape != values.shape:
        raise UserError(f"best of n: scores of shapes {order.shape} and {values.shape}; give [prompts, samples] twice")
    total = order.shape[1]
    if not 1 <= n <= total:
        raise UserError(f"best of n: n is {n}, and there are {total} samples per prompt; take 1 to {total}")
    # C(i-1, n-1) / C(N, n) by its recursion from the last one, n / N, downwards: no large integers.
    weights = np.zeros(total)
    weight = n / total
    for index in range(total, n - 1, -1):
        weights[index - 1] = weight
        weight *= (index - n) / (index - 1) if index > 1 else 0.0
    return np.array([_expectation(o, v, weights) for o, v in zip(order, values, strict=True)])


def _expectation(order: NDArray[np.float64], values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    ranked = np.argsort(order, kind="stable")
    _, group = np.unique(order[ranked], return_inverse=True)
    means = np.bincount(group, weights=values[ranked]) / np.bincount(group)
    return float(means[group] @ weights)


def ladder(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, which is the last."""
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return powers if powers[-1] == most else [*powers, most]


def frontier(
    trained: ArrayLike,
    scores: Mapping[str, ArrayLike],
    kl: ArrayLike | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Best-of-n on the base policy, one row per n: the KL bound, and every score with its interval over prompts.

    Args:
        trained: [P, N] what the best is chosen by, PPO's reward.
        scores: [P, N] by name.
        kl: [P, N] log pi - log pi_ref of the samples, where they are not from the reference itself but from one with
            top-p or a repetition penalty; None = 0. What best-of-n pays comes on top: the log of its ratio to the
            reference is the sum of the two.
        clusters: [P] what each prompt is one of, see `bootstrap_interval`.
        num_resamples, seed: of the bootstrap.

    Returns:
        `{"n": 4, "kl": 0.64, "scores": {name: {"value": .., "low": .., "high": .., "by_prompt": [P]}}}`, n rising;
        n = 1 is the base policy.
    """
    rows = []
    for n in ladder(np.asarray(trained).shape[1]):
        values = {name: best_of_n(trained, score, n) for name, score in scores.items()}
        points = {name: _point(value, clusters, num_resamples, seed) for name, value in values.items()}
        before = 0.0 if kl is None else float(best_of_n(trained, kl, n).mean())
        rows.append({"n": n, "kl": best_of_n_kl(n) + before, "scores": points})
    return rows


def _point(values: ArrayLike, clusters: Sequence[Hashable] | None, num_resamples: int, seed: int) -> dict[str, Any]:
    interval = bootstrap_interval(values, clusters=clusters, num_resamples=num_resamples, seed=seed)
    return as_dict(interval) | {"by_prompt": np.asarray(values, dtype=np.float64).tolist()}


def policy_point(
    step: int,
    kl: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """A policy as a row like those of `frontier`: its step, its measured KL in nats, and every score by prompt."""
    points = {score: _point(values, clusters, num_resamples, seed) for score, values in scores.items()}
    return {"step": step, "kl": float(np.mean(kl)), "scores": points}


def best_step(points: Sequence[Mapping[str, Any]], score: str) -> int:
    """The step with the largest mean of `score`; the earliest of equals, which paid the least."""
    return max(points, key=lambda point: (point["scores"][score]["value"], -point["step"]))["step"]


def as_dict(interval: Interval) -> dict[str, float]:
    """Value and limits."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
