"""Our measures as `evaluate.Metric` objects, for people whose tooling speaks that interface.

`evaluate.load` fetches a script from the Hub; these classes are built directly and work offline. Nothing in the
pipelines needs them: importing `evaluate` pulls in torch and datasets, so import this module only where wanted.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from rlhf.evaluation import statistics, text_metrics

_RESPONSES = {"predictions": datasets.Value("string")}
_SCORES = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}


class _InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that keeps its inputs in memory and leaves no files behind."""

    _description: str
    _inputs: str
    _features: dict[str, Any]

    def __init__(self, **kwargs: Any) -> None:
        # A seed keeps the base class from reading numpy's global random state.
        super().__init__(keep_in_memory=True, seed=0, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes a folder under ~/.cache/huggingface even where everything stays in memory.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation="",
            inputs_description=self._inputs,
            features=datasets.Features(self._features),
        )


class DistinctN(_InMemoryMetric):
    """`compute(predictions=responses, n=2)` -> `{"distinct_n": float}`; see `text_metrics.distinct_n`."""

    _description = "Unique n-grams over all n-grams of the pooled responses."
    _inputs = "predictions: list of str; n: int, size of the n-grams (default 2)"
    _features = _RESPONSES

    def _compute(self, predictions: list[str], n: int = 2) -> dict[str, float]:
        return {"distinct_n": text_metrics.distinct_n(predictions, n)}


class RepetitionRate(_InMemoryMetric):
    """`compute(predictions=responses, n=4)` -> `{"repetition_rate": float}`; see `text_metrics.repetition_rate`."""

    _description = "Mean share of n-grams that occurred earlier in the same response."
    _inputs = "predictions: list of str; n: int, size of the n-grams (default 4)"
    _features = _RESPONSES

    def _compute(self, predictions: list[str], n: int = 4) -> dict[str, float]:
        return {"repetition_rate": text_metrics.repetition_rate(predictions, n)}


class MeanLength(_InMemoryMetric):
    """`compute(predictions=responses)` -> `{"mean_length": float}`, in whitespace/CJK tokens."""

    _description = "Mean number of tokens of a response."
    _inputs = "predictions: list of str"
    _features = _RESPONSES

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        return {"mean_length": text_metrics.mean_length(predictions)}


class WinRate(_InMemoryMetric):
    """`compute(predictions=scores, references=baseline_scores)` -> `win_rate`, `win_rate_low`, `win_rate_high`.

    Scores are paired by prompt, ties count one half, and the limits are those of the 95 % bootstrap interval.
    """

    _description = "Share of prompts on which the first policy scores above the second; ties count one half."
    _inputs = "predictions, references: lists of float scores, one per prompt, in the same order; seed of the bootstrap"
    _features = _SCORES

    def _compute(self, predictions: list[float], references: list[float], seed: int = 0) -> dict[str, float]:
        rate = statistics.win_rate(predictions, references, seed=seed)
        return {"win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high}
