"""Trivial models of a preference set: a reward model that does not beat them has learned nothing.

Pairs are mappings with `chosen` and `rejected` response strings; whatever else they hold (the prompt) is ignored, so
the baselines show how far the responses alone give the preference away.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.statistics import wilson_interval
from rlhf.evaluation.text_metrics import WORD_PATTERN, cjk_share

if TYPE_CHECKING:
    from sklearn.pipeline import FeatureUnion

logger = logging.getLogger(__name__)

Pair = Mapping[str, Any]

# Above this share of CJK characters the text is taken to be written without spaces.
_CJK_SHARE = 0.1
# Enough for a baseline: more pairs move its accuracy by about a point and cost minutes on a laptop.
_MAX_TRAIN_PAIRS = 20_000


@dataclass(frozen=True)
class BaselineReport:
    """Accuracy of a baseline on held-out pairs.

    Attributes:
        name: of the baseline.
        accuracy: share of test pairs whose chosen response it prefers; ties count one half.
        low, high: 95 % Wilson interval.
        n: number of test pairs.
        rule: what it has learned, in words.
        margins: [n], above 0 where it prefers the chosen response.
    """

    name: str
    accuracy: float
    low: float
    high: float
    n: int
    rule: str
    margins: np.ndarray = field(repr=False, compare=False)


def length_baseline(train_pairs: Sequence[Pair], test_pairs: Sequence[Pair]) -> BaselineReport:
    """Prefers always the longer, or always the shorter response, whichever is right more often on the training pairs.

    Length is counted in characters, which is fair to every script and seldom ties.

    Raises:
        UserError: no pairs, or a pair without string `chosen` and `rejected`.
    """
    _check(train_pairs, "train_pairs")
    _check(test_pairs, "test_pairs")
    direction = np.sign(np.sign(_length_differences(train_pairs)).sum())
    rule = {1.0: "prefers the longer response", -1.0: "prefers the shorter response"}.get(
        float(direction), "undecided: longer and shorter are right equally often in training"
    )
    return _report("length", direction * _length_differences(test_pairs), rule)


def tfidf_baseline(train_pairs: Sequence[Pair], test_pairs: Sequence[Pair]) -> BaselineReport:
    """`fit_tfidf` on the training pairs, measured on the test pairs.

    Raises:
        UserError: no pairs, a pair without string `chosen` and `rejected`, or responses without any words.
    """
    _check(test_pairs, "test_pairs")
    scorer = fit_tfidf(train_pairs)
    chosen, rejected = (scorer([pair[side] for pair in test_pairs]) for side in ("chosen", "rejected"))
    return _report("tfidf", chosen - rejected, f"{len(scorer.weights)} n-gram weights")


@dataclass(frozen=True)
class TfidfScorer:
    """Scores of responses whose differences are the log-odds of a preference.

    Attributes:
        features: fitted `text_features`.
        weights: [n-grams], of the logistic regression.
    """

    features: FeatureUnion
    weights: np.ndarray

    def __call__(self, responses: Sequence[str]) -> np.ndarray:
        """[n] scores."""
        return self.features.transform(responses) @ self.weights


def fit_tfidf(train_pairs: Sequence[Pair]) -> TfidfScorer:
    """Logistic regression without intercept on the difference of the responses' TF-IDF vectors (Bradley-Terry).

    Features are word uni- and bigrams; where the text is Chinese or Japanese, also character 1- to 3-grams. It is
    linear in the two responses, so their scores can be taken apart: w . (x_chosen - x_rejected).

    Raises:
        UserError: no pairs, a pair without string `chosen` and `rejected`, or responses without any words.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    _check(train_pairs, "train_pairs")
    train_pairs = _subsample(train_pairs)
    chosen, rejected = [p["chosen"] for p in train_pairs], [p["rejected"] for p in train_pairs]
    features = text_features(chosen + rejected)
    try:
        features.fit(chosen + rejected)
    except ValueError as error:  # scikit-learn's answer to an empty vocabulary
        raise UserError(f"TF-IDF baseline: no word repeats in {len(train_pairs)} pairs; give real text") from error
    differences = features.transform(chosen) - features.transform(rejected)
    # Both orders of every pair: the two classes are then balanced and the solution is antisymmetric.
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
    with threadpool_limits(limits=1):  # as in judges.py: waiting threads cost more than they bring
        model.fit(vstack([differences, -differences]), np.repeat([1, 0], len(train_pairs)))
    return TfidfScorer(features, model.coef_[0])


def text_features(texts: Sequence[str]) -> FeatureUnion:
    """TF-IDF of words and pairs of words; of mostly Chinese or Japanese texts also of 1 to 3 characters. Not fitted."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    # In a handful of texts, terms that repeat are too few to learn from.
    common = {"sublinear_tf": True, "min_df": 2 if len(texts) >= 200 else 1, "max_features": 50_000}
    parts = [("words", TfidfVectorizer(token_pattern=WORD_PATTERN, ngram_range=(1, 2), **common))]
    if cjk_share(texts) > _CJK_SHARE:
        parts.append(("characters", TfidfVectorizer(analyzer="char", ngram_range=(1, 3), **common)))
    return FeatureUnion(parts)


def _subsample(pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(pairs) <= _MAX_TRAIN_PAIRS:
        return pairs
    logger.info("TF-IDF baseline: fitted on %d of %d training pairs", _MAX_TRAIN_PAIRS, len(pairs))
    picked = np.random.default_rng(0).choice(len(pairs), size=_MAX_TRAIN_PAIRS, replace=False)
    return [pairs[int(i)] for i in picked]


def _length_differences(pairs: Sequence[Pair]) -> np.ndarray:
    return np.array([len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs], dtype=np.float64)


def _report(name: str, margins: np.ndarray, rule: str) -> BaselineReport:
    """From margins [N], positive where the baseline prefers the chosen response."""
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    interval = wilson_interval(right, len(margins))
    return BaselineReport(name, interval.value, interval.low, interval.high, interval.n, rule, margins)


def _check(pairs: Sequence[Pair], what: str) -> None:
    if not len(pairs):
        raise UserError(f"reward baseline: {what} is empty; give at least one preference pair")
    for index, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            value = pair.get(side)
            if not isinstance(value, str):
                shown = repr(value)[:60]
                raise UserError(f"reward baseline: {what}[{index}][{side!r}] is {shown}; give the response as a string")
