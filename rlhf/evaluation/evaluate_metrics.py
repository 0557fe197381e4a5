"""Our measures as `evaluate.Metric` objects, for people whose tooling speaks that interface.

`evaluate.load` fetches a script from the Hub; these classes are built directly and work offline. Nothing in the
pipelines needs them: importing `evaluate` pulls in torch and datasets, so import this module only where wanted.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from rlhf.evaluation import ranking, statistics, text_metrics

_RESPONSES = {"predictions": datasets.Value("string")}
_NUMBERS = {"predictions": datasets.Value("float64")}
_SCORES = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}


class _LocalMetric(evaluate.Metric):
    """An `evaluate.Metric` that is built here and not fetched.

    In one process it keeps its inputs in memory and leaves no files behind. With several (`num_process`, `process_id`,
    an `experiment_id` and a `cache_dir` that all of them see) each adds its share, and process 0 computes over all of
    it: the others' `compute` gives None. The files in `cache_dir` go when that is done.
    """

    _description: str
    _inputs: str
    _features: dict[str, Any]

    def __init__(self, **kwargs: Any) -> None:
        # A seed keeps the base class from reading numpy's global random state.
        super().__init__(**{"keep_in_memory": kwargs.get("num_process", 1) == 1, "seed": 0} | kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes a folder under ~/.cache/huggingface even where everything stays in memory.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation="",
            inputs_description=self._inputs,
            features=datasets.Features(self._features),
        )


class DistinctN(_LocalMetric):
    """`compute(predictions=responses, n=2)` -> `{"distinct_n": float}`; see `text_metrics.distinct_n`."""

    _description = "Unique n-grams over all n-grams of the pooled responses."
    _inputs = "predictions: list of str; n: int, size of the n-grams (default 2)"
    _features = _RESPONSES

    def _compute(self, predictions: list[str], n: int = 2) -> dict[str, float]:
        return {"distinct_n": text_metrics.distinct_n(predictions, n)}


class RepetitionRate(_LocalMetric):
    """`compute(predictions=responses, n=4)` -> `{"repetition_rate": float}`; see `text_metrics.repetition_rate`."""

    _description = "Mean share of n-grams that occurred earlier in the same response."
    _inputs = "predictions: list of str; n: int, size of the n-grams (default 4)"
    _features = _RESPONSES

    def _compute(self, predictions: list[str], n: int = 4) -> dict[str, float]:
        return {"repetition_rate": text_metrics.repetition_rate(predictions, n)}


class SelfBleu(_LocalMetric):
    """`compute(predictions=responses, n=4)` -> `{"self_bleu": float}`; see `text_metrics.self_bleu`."""

    _description = "Mean BLEU of each response against all others."
    _inputs = "predictions: list of str; n: int, longest n-grams (default 4)"
    _features = _RESPONSES

    def _compute(self, predictions: list[str], n: int = 4) -> dict[str, float]:
        return {"self_bleu": text_metrics.self_bleu(predictions, n)}


class RefusalRate(_LocalMetric):
    """`compute(predictions=responses)` -> `{"refusal_rate": float}`; see `text_metrics.is_refusal`."""

    _description = "Share of responses that refuse, by a list of English and Chinese phrases."
    _inputs = "predictions: list of str"
    _features = _RESPONSES

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        return {"refusal_rate": text_metrics.refusal_rate(predictions)}


class MeanLength(_LocalMetric):
    """`compute(predictions=responses)` -> `{"mean_length": float}`, in whitespace/CJK tokens."""

    _description = "Mean number of tokens of a response."
    _inputs = "predictions: list of str"
    _features = _RESPONSES

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        return {"mean_length": text_metrics.mean_length(predictions)}


class WinRate(_LocalMetric):
    """`compute(predictions=scores, references=baseline_scores)` -> `win_rate`, `win_rate_low`, `win_rate_high`.

    Scores are paired by prompt, ties count one half, and the limits are those of the 95 % bootstrap interval.
    """

    _description = "Share of prompts on which the first policy scores above the second; ties count one half."
    _inputs = "predictions, references: lists of float scores, one per prompt, in the same order; seed of the bootstrap"
    _features = _SCORES

    def _compute(self, predictions: list[float], references: list[float], seed: int = 0) -> dict[str, float]:
        rate = statistics.win_rate(predictions, references, seed=seed)
        return {"win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high}


class LengthControlledWinRate(_LocalMetric):
    """As `WinRate`, at equal length: with `lengths` and `reference_lengths`, one number per response.

    See `ranking.length_controlled_win_rate`.
    """

    _description = "Win rate that a logistic regression on the length difference predicts at equal length."
    _inputs = (
        "predictions, references: float scores; lengths, reference_lengths: of the responses; seed of the bootstrap"
    )
    _features = _SCORES | {
        "lengths": datasets.Value("float64"),
        "reference_lengths": datasets.Value("float64"),
    }

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        lengths: list[float],
        reference_lengths: list[float],
        seed: int = 0,
    ) -> dict[str, float]:
        rate = ranking.length_controlled_win_rate(predictions, references, lengths, reference_lengths, seed=seed)
        return {"lc_win_rate": rate.value, "lc_win_rate_low": rate.low, "lc_win_rate_high": rate.high}


class MeanScore(_LocalMetric):
    """`compute(predictions=numbers)` -> `mean`, `mean_low`, `mean_high`: of scores, KL per response, EOS flags."""

    _description = "Mean with the limits of the 95 % bootstrap interval."
    _inputs = "predictions: list of float, one per response; seed of the bootstrap"
    _features = _NUMBERS

    def _compute(self, predictions: list[float], seed: int = 0) -> dict[str, float]:
        mean = statistics.bootstrap_interval(predictions, seed=seed)
        return {"mean": mean.value, "mean_low": mean.low, "mean_high": mean.high}


class Perplexity(_LocalMetric):
    """`compute(predictions=nats, tokens=counts)` -> `{"perplexity": float}`: exp(sum of losses / sum of tokens).

    `nats` is the loss of each text, summed over its tokens: what each process gets from its share of the texts.
    """

    _description = "exp of the mean loss per token over all texts."
    _inputs = "predictions: list of float, loss of each text in nats; tokens: list of int, its tokens"
    _features = _NUMBERS | {"tokens": datasets.Value("int64")}

    def _compute(self, predictions: list[float], tokens: list[int]) -> dict[str, float]:
        return {"perplexity": math.exp(sum(predictions) / sum(tokens))}
