"""Hygiene of preference pairs: what cannot teach, what contradicts itself, and what is probably labelled wrongly."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, joined, split_result
from rlhf.data.cleaning.duplicates import plain
from rlhf.errors import UserError

_MIN_PAIRS = 50  # fewer teach the scorer nothing
_SCORED_CHARS = 2000  # of each side; bounds the scorer's memory


class PreferenceStep(StepConfig):
    """Drops pairs without signal and reports suspected label flips and length bias."""

    step: Literal["preferences"] = "preferences"
    folds: int = Field(default=5, ge=2, description="Folds of the cross-fitted scorer; rows of a prompt share one.")
    flip_probability: float = Field(
        default=0.1, gt=0, lt=0.5, description="Held-out probability of the label below which a pair is suspected."
    )
    flips: Literal["report", "drop", "swap"] = Field(default="report", description="What is done with suspected pairs.")
    min_accuracy: float = Field(
        default=0.65, ge=0.5, le=1, description="Held-out accuracy below which the scorer accuses nobody."
    )
    max_scored: int = Field(
        default=10_000,
        ge=1,
        description="Pairs that the scorer looks at, drawn by the seed; it holds them all in memory.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the folds, and of what is scored.")


def preference_step(rows: Sequence[Row], config: PreferenceStep) -> StepResult:
    """Cleans rows with the columns prompt, chosen and rejected (texts or messages).

    Empty and identical sides go. So do all pairs of a contradiction, where one prompt has the same two answers in both
    orders: nobody knows which is right. Report: the reasons' counts come from `dropped`; `flips` (held-out accuracy,
    suspected rows by input index) and `length` (see `length_bias`).

    Raises:
        UserError: a column is missing.
    """
    if any(column not in row for row in rows for column in ("prompt", "chosen", "rejected")):
        raise UserError(
            "preferences: a row lacks one of the columns prompt, chosen, rejected; map them, or remove the step"
        )
    pairs = [tuple(joined(row[column]) for column in ("prompt", "chosen", "rejected")) for row in rows]
    reasons = _useless(pairs)
    left = [number for number in range(len(rows)) if number not in reasons]
    scored = left
    if len(left) > config.max_scored:
        scored = sorted(random.Random(config.seed).sample(left, config.max_scored))
    probability = flip_scores([pairs[number] for number in scored], config)
    accuracy = float(np.mean(probability > 0.5)) if len(probability) else None
    trusted = accuracy is not None and accuracy >= config.min_accuracy
    suspects = {
        number: float(p)
        for number, p in zip(scored, probability, strict=len(probability) > 0)
        if trusted and p < config.flip_probability
    }
    if config.flips == "drop":
        reasons |= {number: ("suspected_flip", f"probability of its label {p:.3f}") for number, p in suspects.items()}
    report: dict[str, Any] = {
        "flips": {
            "scored": len(probability),
            "accuracy": accuracy,
            "trusted": trusted,
            "suspected": sorted(suspects),
        },
        "length": length_bias([pairs[number][1:] for number in left]),
    }
    result = split_result(rows, reasons, report)
    if config.flips == "swap":
        result.rows = [
            row | {"chosen": row["rejected"], "rejected": row["chosen"]} if number in suspects else row
            for number, row in zip(result.index, result.rows, strict=True)
        ]
    return result


def _useless(pairs: Sequence[tuple[str, ...]]) -> dict[int, tuple[str, str]]:
    reasons: dict[int, tuple[str, str]] = {}
    seen: dict[tuple[str, ...], list[int]] = defaultdict(list)
    keys = [(plain(prompt), " ".join(chosen.split()), " ".join(rejected.split())) for prompt, chosen, rejected in pairs]
    for number, (prompt, chosen, rejected) in enumerate(keys):
        if not chosen or not rejected:
            reasons[number] = ("empty_side", "chosen" if not chosen else "rejected")
        elif chosen == rejected:
            reasons[number] = ("identical_sides", chosen[:80])
        else:
            seen[prompt, chosen, rejected].append(number)
    for (prompt, chosen, rejected), numbers in seen.items():
        against = seen.get((prompt, rejected, chosen))
        if against:
            reasons |= dict.fromkeys(numbers, ("contradicting_pair", f"row {against[0]} has the sides swapped"))
    return reasons


def flip_scores(pairs: Sequence[tuple[str, ...]], config: PreferenceStep) -> NDArray[np.float64]:
    """Probability of each pair's label under a scorer that never saw its prompt.

    A logistic regression without intercept on TF-IDF(chosen) - TF-IDF(rejected) and the difference of log lengths,
    fitted on the other folds, each pair in both orders: confident learning (Northcutt et al. 2021) with the
    Bradley-Terry model. Characters 1 to 2 for mostly Chinese data, words 1 to 2 otherwise.

    Args:
        pairs: (prompt, chosen, rejected).
        config: folds and seed.

    Returns:
        (pairs,) in [0, 1]; empty with fewer than 50 pairs or fewer prompts than folds.
    """
    from scipy.sparse import csr_matrix, hstack, vstack
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    prompts = [plain(prompt) for prompt, _, _ in pairs]
    numbers = {prompt: number for number, prompt in enumerate(sorted(set(prompts)))}
    groups = [numbers[prompt] for prompt in prompts]
    if len(pairs) < _MIN_PAIRS or len(numbers) < config.folds:
        return np.empty(0)
    chosen, rejected = [pair[1][:_SCORED_CHARS] for pair in pairs], [pair[2][:_SCORED_CHARS] for pair in pairs]
    sizes = np.array([[len(pair[1]), len(pair[2])] for pair in pairs])
    ascii_share = sum(text.isascii() for text in chosen) / len(chosen)
    kind: dict[str, Any] = {"analyzer": "word"} if ascii_share > 0.5 else {"analyzer": "char"}
    lengths = np.log1p(sizes[:, :1]) - np.log1p(sizes[:, 1:])
    words = CountVectorizer(ngram_range=(1, 2), min_df=2, max_features=50_000, **kind)
    counts = words.fit_transform(chosen + rejected)
    out = np.zeros(len(pairs))
    splitter = GroupKFold(config.folds, shuffle=True, random_state=config.seed)
    for train, held in splitter.split(pairs, groups=groups):
        seen = counts[np.r_[train, train + len(pairs)]]
        known = np.flatnonzero(seen.getnnz(axis=0) >= 2)
        weights = TfidfTransformer(sublinear_tf=True).fit(seen[:, known]).transform(counts[:, known])
        features = hstack([weights[: len(pairs)] - weights[len(pairs) :], csr_matrix(lengths)]).tocsr()
        both = vstack([features[train], -features[train]])
        labels = np.r_[np.ones(len(train)), np.zeros(len(train))]
        model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=500).fit(both, labels)
        out[held] = model.predict_proba(features[held])[:, 1]
    return out


def length_bias(sides: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """How far length alone tells the chosen side.

    Args:
        sides: (chosen, rejected).

    Returns:
        pairs; longer_wins: share of pairs with a longer chosen side among those whose sides differ in characters;
        log_ratio: mean log(chosen / rejected) of the lengths + 1. NaN-free: 0.5 and 0 without pairs.
    """
    lengths = np.array([[len(chosen), len(rejected)] for chosen, rejected in sides], dtype=float).reshape(-1, 2)
    differ = lengths[lengths[:, 0] != lengths[:, 1]]
    wins = float(np.mean(differ[:, 0] > differ[:, 1])) if len(differ) else 0.5
    ratio = float(np.mean(np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1]))) if len(lengths) else 0.0
    return {"pairs": len(lengths), "longer_wins": round(wins, 4), "log_ratio": round(ratio, 4)}
