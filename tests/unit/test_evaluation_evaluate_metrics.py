"""The `evaluate.Metric` wrappers: right numbers, offline, nothing on disk."""

import pytest

evaluate_metrics = pytest.importorskip("rlhf.evaluation.evaluate_metrics")


def test_text_metrics_through_the_evaluate_interface():
    responses = ["a b a b", "很好"]
    # Bigrams: ab ba ab 很好, 3 of 4 different.
    assert evaluate_metrics.DistinctN().compute(predictions=responses, n=2) == {"distinct_n": 0.75}
    # The first response repeats 1 of 3, the second none.
    rate = evaluate_metrics.RepetitionRate().compute(predictions=responses, n=2)["repetition_rate"]
    assert rate == pytest.approx(1 / 6)
    assert evaluate_metrics.MeanLength().compute(predictions=responses) == {"mean_length": 3.0}


def test_batches_can_be_added_one_by_one():
    metric = evaluate_metrics.DistinctN()
    metric.add_batch(predictions=["a b"])
    metric.add_batch(predictions=["a b", "a c"])
    assert metric.compute()["distinct_n"] == pytest.approx(2 / 3)


def test_win_rate_counts_a_tie_one_half():
    result = evaluate_metrics.WinRate().compute(predictions=[1.0, 2.0, 3.0, 0.0], references=[0.0, 2.0, 1.0, 5.0])
    assert result["win_rate"] == 0.625
    assert result["win_rate_low"] < 0.625 < result["win_rate_high"]


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate_metrics.MeanLength(cache_dir=str(tmp_path / "cache"))
    metric.compute(predictions=["a"])
    assert list(tmp_path.iterdir()) == []
