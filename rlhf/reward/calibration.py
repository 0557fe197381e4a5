"""Is a margin of a reward model worth its probability? Under Bradley-Terry, P(chosen is better) = sigmoid(margin)."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.reward.slices import correct

BINS = 10


def calibration(margins: np.ndarray) -> dict[str, Any]:
    """Curve, expected calibration error and the temperature that fits best.

    A pair has no side of its own, so the confidence is that in the answer which the model prefers, 0.5 to 1, and a pair
    counts as right where that is the chosen one.

    Args:
        margins: [N], chosen minus rejected score.

    Returns:
        bins: {confidence, accuracy, n} of each of 10 equal-width bins from 0.5 to 1 that is not empty.
        ece: mean |confidence - accuracy| over pairs, binned (Naeini et al. 2015; Guo et al. 2017).
        nll: nats per pair; ln 2 is a coin's.
        temperature: divides the margins to minimise the nll; above 1 = the model is too sure of itself.
        ece_after, nll_after: the same with margins divided by a temperature that the other half of the pairs gave.
    """
    scaled = margins.copy()
    if len(margins) > 1:
        scaled[::2] /= fit_temperature(margins[1::2])
        scaled[1::2] /= fit_temperature(margins[::2])
    bins = confidence_bins(margins)
    return {
        "bins": bins,
        "ece": expected_error(bins),
        "nll": nll(margins),
        "temperature": fit_temperature(margins),
        "ece_after": expected_error(confidence_bins(scaled)),
        "nll_after": nll(scaled),
    }


def confidence_bins(margins: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of pairs of each bin that is not empty."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    index = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    right = correct(margins)
    return [
        {
            "confidence": float(confidence[index == number].mean()),
            "accuracy": float(right[index == number].mean()),
            "n": int((index == number).sum()),
        }
        for number in range(BINS)
        if (index == number).any()
    ]


def expected_error(bins: list[dict[str, float]]) -> float:
    """Mean |confidence - accuracy| of bins, weighted by their pairs."""
    pairs = sum(item["n"] for item in bins)
    return sum(item["n"] * abs(item["confidence"] - item["accuracy"]) for item in bins) / pairs


def nll(margins: np.ndarray) -> float:
    """-mean(log sigmoid(margin)) in nats."""
    return float(np.logaddexp(0, -margins).mean())


def fit_temperature(margins: np.ndarray) -> float:
    """The divisor T in [0.01, 100] of margins [N] with the smallest nll. At 100 the margins say nothing."""
    from scipy.optimize import minimize_scalar

    # The nll is convex in 1/T, so it has one minimum over log T, too.
    found = minimize_scalar(
        lambda log: nll(margins * np.exp(-log)), bounds=(np.log(0.01), np.log(100)), method="bounded"
    )
    return float(np.exp(found.x))
