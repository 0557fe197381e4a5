"""Does the score follow the length or the form of an answer, more than the labels do?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.statistics import bootstrap_interval

FEWEST_PAIRS = 20  # with fewer pairs that differ in a feature, nothing is said about it

# What can be counted in an answer without understanding it. Length in tokens is added by the caller.
FEATURES: dict[str, Callable[[str], int]] = {
    "commas and stops": lambda text: len(re.findall(r"[,.;:，。；：、]", text)),
    "exclamation marks": lambda text: len(re.findall(r"[!！]", text)),
    "question marks": lambda text: len(re.findall(r"[?？]", text)),
    "digits": lambda text: len(re.findall(r"\d", text)),
    "capital letters": lambda text: sum(letter.isupper() for letter in text),
    "line breaks": lambda text: text.count("\n"),
    "list items": lambda text: len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)、])\s", text)),
    "bold or headings": lambda text: len(re.findall(r"\*\*|(?m:^#+ )", text)),
    "thanks": lambda text: len(re.findall(r"(?i)\bthank|谢谢|感谢", text)),
}


def biases(
    texts: Sequence[tuple[str, str]], lengths: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """Of every feature: its correlation with the score, and how often more of it wins.

    Args:
        texts: chosen and rejected response of each of N pairs.
        lengths: [N,2], their tokens.
        chosen, rejected: [N], their scores.
        seed: of the bootstrap.

    Returns:
        Rows {feature, n: pairs that differ in it, correlation: Spearman's with the score over all answers,
        model: share of those pairs in which the model prefers the answer with more of it, labels: the share in which
        the labels do, excess: model - labels with its 95 % bootstrap interval}. A model of no bias of its own has an
        excess near 0, whatever the labels like. Features in which fewer than 20 pairs differ are left out.
    """
    counts = {"length in tokens": lengths} | {
        name: np.array([[count(side) for side in pair] for pair in texts]) for name, count in FEATURES.items()
    }
    rows = []
    for name, values in counts.items():
        more = np.sign(values[:, 0] - values[:, 1]).astype(float)  # 1: the chosen answer has more of it
        differs = more != 0
        if differs.sum() < FEWEST_PAIRS:
            continue
        prefers = np.sign(chosen - rejected)[differs] * more[differs]
        model, labels = 0.5 + prefers / 2, 0.5 + more[differs] / 2
        excess = bootstrap_interval(model - labels, seed=seed)
        rows.append(
            {
                "feature": name,
                "n": int(differs.sum()),
                "correlation": spearman(values.T.ravel(), np.concatenate([chosen, rejected])),
                "model": float(model.mean()),
                "labels": float(labels.mean()),
                "excess": {"value": excess.value, "low": excess.low, "high": excess.high, "n": excess.n},
            }
        )
    return rows


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two rows of numbers, ties at their mean rank; 0 where one of them is constant."""
    from scipy.stats import rankdata

    first, second = rankdata(a), rankdata(b)
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
