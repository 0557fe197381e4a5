"""Which unlabelled pairs teach a reward model most: selection on frozen features. NumPy and scikit-learn alone.

A pair is the difference of its responses' features, x = phi(a) - phi(b). Which response is called A is chance, so every
method gives the same pairs for x and -x. The model is Bradley-Terry on x: P(a preferred) = sigmoid(w x), with a
Gaussian prior on w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of the prior on each weight, where pairs have length 1 on average. Of 0.1 to 100 it did best with random labels on
# ukp_convarg1_dev, and about as well as any on rmb_harmless_dev (docs/label_efficiency.md).
PRIOR_VARIANCE = 1.0
NEWTON_STEPS = 50  # it takes 5 to 10
DIMENSIONS = 128
LENGTH_SCALE = 0.3  # root mean square of the length difference, where that of the other features together is 1
HEADS = 10  # of the ensemble


@dataclass(frozen=True)
class Pool:
    """What a method may look at.

    Attributes:
        pairs: [N,D] feature differences of the unlabelled pairs; `prepared` makes them.
        labelled: [M,D] the same of the pairs that have a label, the preferred response first.
        probabilities: [N] P(a preferred) by a reward model; None = a head fitted on `labelled`.
        ensemble: [K,N] the same by K reward models; None = heads fitted on resampled `labelled`.
    """

    pairs: Array
    labelled: Array
    probabilities: Array | None = None
    ensemble: Array | None = None


@dataclass(frozen=True)
class Selection:
    """Rows of the pool in the order of selection, and each one's score when it was picked; its method says of what."""

    rows: NDArray[np.int64]
    scores: Array


def prepared(pairs: Array, longer: Array) -> Array:
    """[N,<= DIMENSIONS + 1] what the methods work on: principal directions of the pairs, and the difference in length.

    Nothing here looks at labels. The mean square length of a pair becomes 1, as `PRIOR_VARIANCE` expects.

    Args:
        pairs: [N,D] feature differences, of pool and labelled pairs together.
        longer: [N] log length of the first response minus that of the second: averaged features do not tell it.
    """
    pairs = pairs / max(float(np.sqrt((pairs**2).sum(axis=1).mean())), 1e-12)
    if pairs.shape[1] > DIMENSIONS:
        _, directions = np.linalg.eigh(pairs.T @ pairs)  # not centred: a pair and its mirror are the same
        pairs = pairs @ directions[:, : -DIMENSIONS - 1 : -1]
    pairs = np.column_stack([pairs, LENGTH_SCALE * longer / max(float(np.sqrt((longer**2).mean())), 1e-12)])
    return pairs / max(float(np.sqrt((pairs**2).sum(axis=1).mean())), 1e-12)


def fit(labelled: Array, variance: float = PRIOR_VARIANCE) -> Array:
    """Weights [D]: the most probable ones of Bradley-Terry with the prior N(0, variance); zeros without labels.

    Newton's method, which needs no second class as scikit-learn does: a pair in both orders is the same pair twice.

    Args:
        labelled: [M,D], the preferred response's features minus the other's.
        variance: of the prior on each weight.
    """
    weights = np.zeros(labelled.shape[1])
    prior = np.eye(labelled.shape[1]) / variance
    for _ in range(NEWTON_STEPS):
        wrong = sigmoid(-(labelled @ weights))
        hessian = (labelled * (wrong * (1 - wrong))[:, None]).T @ labelled + prior
        step = np.linalg.solve(hessian, labelled.T @ wrong - weights / variance)
        weights += step
        if np.abs(step).max() < 1e-8 * max(1.0, np.abs(weights).max()):
            break
    return weights


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def entropy(p: Array) -> Array:
    """Nats of a coin with probability p."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def select(method: str, pool: Pool, count: int, seed: int) -> Selection:
    """Picks `count` pairs (all, where the pool has fewer) by one of `METHODS`, none of them twice.

    The same pool, count and seed give the same pairs.
    """
    rng = np.random.default_rng([seed, len(pool.labelled)])
    count = min(count, len(pool.pairs))
    found = METHODS[method](pool, count, rng)
    assert len(set(found.rows.tolist())) == len(found.rows) == len(found.scores) == count, method
    return found


def _random(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """Every pair equally likely; score 0. The baseline."""
    return Selection(rng.permutation(len(pool.pairs))[:count], np.zeros(count))


def _uncertainty(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """The pairs whose preference the model knows least; score: entropy in nats, at most ln 2 (Lewis & Gale 1994)."""
    return _highest(entropy(_probabilities(pool)), count, rng)


def _disagreement(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """The pairs about which an ensemble disagrees; score: mutual information in nats (BALD, Houlsby et al. 2011)."""
    votes = pool.ensemble if pool.ensemble is not None else _ensemble(pool, rng)
    return _highest(entropy(votes.mean(axis=0)) - entropy(votes).mean(axis=0), count, rng)


def _diversity(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """Each time the pair farthest from all labelled and picked ones (k-center, Sener & Savarese 2018); score: distance.

    The distance of x and y is the smaller of |x - y| and |x + y|.
    """
    squares = (pool.pairs**2).sum(axis=1)
    nearest = squares.copy()  # an equal pair of responses, x = 0, teaches nothing: as if it was labelled
    for start in range(0, len(pool.labelled), 1024):
        block = pool.labelled[start : start + 1024]
        inner = np.abs(pool.pairs @ block.T)
        nearest = np.minimum(nearest, (squares[:, None] + (block**2).sum(axis=1) - 2 * inner).min(axis=1))
    rows, scores = [], []
    order = rng.random(len(squares)) * 1e-9  # breaks ties
    for _ in range(count):
        row = int(np.argmax(nearest + order))
        rows.append(row)
        scores.append(float(np.sqrt(max(nearest[row], 0.0))))
        distance = squares + squares[row] - 2 * np.abs(pool.pairs @ pool.pairs[row])
        nearest = np.minimum(nearest, distance)
        nearest[row] = -np.inf
    return Selection(np.array(rows, dtype=np.int64), np.array(scores))


def _mix(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """Uncertain pairs that differ from each other: k-means++ on loss gradients (BADGE, Ash et al. 2020).

    The gradient is that of the loss with respect to w if the model's own guess were the label. Score: its length.
    """
    from sklearn.cluster import kmeans_plusplus

    p = _probabilities(pool)
    # Which side the model guesses; where it has no idea (no labels yet), one that does not depend on which is A.
    guess = np.where(p == 0.5, _heavier(pool.pairs), p > 0.5)
    gradients = (p - guess)[:, None] * pool.pairs
    _, drawn = kmeans_plusplus(gradients, count, random_state=int(rng.integers(2**31)))
    rows = drawn.astype(np.int64)
    if len(set(drawn.tolist())) < count:  # it ran out of gradients that differ, and drew some again
        rows = _first_of_each(gradients, rows)
        rows = np.concatenate([rows, _more_of_each(gradients, rows)[: count - len(rows)]])
    return Selection(rows, np.linalg.norm(gradients[rows], axis=1))


def _heavier(pairs: Array) -> NDArray[np.bool_]:
    """[N] whether x, not -x, is the side of the longer response; of equal ones, that of the largest feature."""
    largest = pairs[np.arange(len(pairs)), np.abs(pairs).argmax(axis=1)]
    return np.where(pairs[:, -1] != 0, pairs[:, -1], largest) > 0


def _first_of_each(gradients: Array, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """The drawn rows without those whose gradient is, but for rounding, that of one drawn earlier."""
    same = 1e-9 * np.linalg.norm(gradients[drawn], axis=1).max()
    gaps = (np.linalg.norm(gradients[drawn[:n]] - gradients[row], axis=1) for n, row in enumerate(drawn))
    return drawn[[not (gap <= same).any() for gap in gaps]]


def _more_of_each(gradients: Array, picked: NDArray[np.int64]) -> NDArray[np.int64]:
    """All other rows: of every picked one's kin the longest gradient, then of each the second longest, and so on."""
    from sklearn.metrics import pairwise_distances_argmin

    rest = np.setdiff1d(np.arange(len(gradients)), picked)
    rest = rest[np.argsort(-np.linalg.norm(gradients[rest], axis=1), kind="stable")]
    turn, met = np.empty(len(rest), dtype=np.int64), np.zeros(len(picked), dtype=np.int64)
    for place, kin in enumerate(pairwise_distances_argmin(gradients[rest], gradients[picked])):
        turn[place] = met[kin]
        met[kin] += 1
    return rest[np.argsort(turn, kind="stable")]


def _information(pool: Pool, count: int, rng: np.random.Generator) -> Selection:
    """Each time the pair whose label would make the whole pool's margins surest (Bayesian I-optimal design).

    With A = I / variance + sum of p (1 - p) x x^T over labelled and picked pairs, whose inverse is the Laplace
    approximation of the uncertainty about w, and S the pool's mean of x x^T: the fall of trace(S A^-1), the mean
    variance of a margin, which is also the score. Unlike log det A (D-optimal) it does not run after outliers.
    """
    weights = fit(pool.labelled)
    seen, p = sigmoid(pool.labelled @ weights), _probabilities(pool)
    fisher = (pool.labelled * (seen * (1 - seen))[:, None]).T @ pool.labelled
    inverse = np.linalg.inv(fisher + np.eye(pool.pairs.shape[1]) / PRIOR_VARIANCE)
    spread = inverse @ (pool.pairs.T @ pool.pairs / len(pool.pairs)) @ inverse
    x = pool.pairs * np.sqrt(p * (1 - p))[:, None]
    own, gain = (np.einsum("nd,nd->n", x @ matrix, x) for matrix in (inverse, spread))
    left = np.ones(len(x), dtype=bool)
    order = rng.random(len(x)) * 1e-12  # breaks ties
    rows, scores = [], []
    for _ in range(count):
        row = int(np.argmax(np.where(left, gain / (1 + own) + order, -np.inf)))
        rows.append(row)
        scores.append(float(gain[row] / (1 + own[row])))
        left[row] = False
        # Sherman-Morrison for A + x x^T, and what follows from it for the three other terms.
        u, v, scale = inverse @ x[row], spread @ x[row], 1 + own[row]
        xu, xv, c = x @ u, x @ v, x[row] @ v
        own = own - xu**2 / scale
        gain = gain - 2 * xu * xv / scale + xu**2 * c / scale**2
        inverse = inverse - np.outer(u, u) / scale
        spread = spread - (np.outer(u, v) + np.outer(v, u)) / scale + np.outer(u, u) * c / scale**2
    return Selection(np.array(rows, dtype=np.int64), np.array(scores))


METHODS: dict[str, Callable[[Pool, int, np.random.Generator], Selection]] = {
    "random": _random,
    "uncertainty": _uncertainty,
    "disagreement": _disagreement,
    "diversity": _diversity,
    "mix": _mix,
    "information": _information,
}
NEEDS_MODEL = ("uncertainty", "disagreement")  # without labels or a reward model every pair is the same to these


def _probabilities(pool: Pool) -> Array:
    return sigmoid(pool.pairs @ fit(pool.labelled)) if pool.probabilities is None else pool.probabilities


def _ensemble(pool: Pool, rng: np.random.Generator) -> Array:
    """[K,N] by heads that are each fitted on labels drawn with replacement (bagging)."""
    draws = (rng.integers(len(pool.labelled), size=len(pool.labelled)) for _ in range(HEADS))
    return np.stack([sigmoid(pool.pairs @ fit(pool.labelled[draw])) for draw in draws])


def _highest(scores: Array, count: int, rng: np.random.Generator) -> Selection:
    """The rows with the highest scores, ties in a random order."""
    shuffled = rng.permutation(len(scores))
    rows = shuffled[np.argsort(-scores[shuffled], kind="stable")][:count]
    return Selection(rows, scores[rows])
