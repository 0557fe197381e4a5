"""The `evaluate.Metric` wrappers: right numbers, offline, nothing on disk."""

import multiprocessing

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


def test_the_other_measures_through_the_same_interface():
    assert evaluate_metrics.SelfBleu().compute(predictions=["a b c d"] * 2) == {"self_bleu": pytest.approx(1.0)}
    assert evaluate_metrics.RefusalRate().compute(predictions=["As an AI, no.", "Yes."]) == {"refusal_rate": 0.5}
    assert evaluate_metrics.MeanScore().compute(predictions=[1.0, 1.0])["mean_high"] == 1.0
    # Losses 2 and 4 nats over 1 and 2 tokens: 2 nats a token.
    result = evaluate_metrics.Perplexity().compute(predictions=[2.0, 4.0], tokens=[1, 2])
    assert result["perplexity"] == pytest.approx(7.389056)
    controlled = evaluate_metrics.LengthControlledWinRate().compute(
        predictions=[1.0, 2.0, 3.0, 0.0], references=[0.0, 2.0, 1.0, 5.0], lengths=[1] * 4, reference_lengths=[1] * 4
    )
    assert controlled["lc_win_rate"] == pytest.approx(3 / 5)


def share(folder, process, responses):
    """One process of two: adds its part of the responses, and computes."""
    metric = evaluate_metrics.DistinctN(num_process=2, process_id=process, experiment_id="test", cache_dir=folder)
    metric.add_batch(predictions=responses)
    return metric.compute(n=2)


def test_two_processes_measure_their_responses_together(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=share, args=(str(tmp_path), 1, ["a b", "a c"]))
    other.start()
    try:
        result = share(str(tmp_path), 0, ["a b"])
    finally:
        other.join(timeout=100)
    assert other.exitcode == 0
    assert result == {"distinct_n": pytest.approx(2 / 3)}  # of all three responses
    assert not list(tmp_path.rglob("*.arrow"))
