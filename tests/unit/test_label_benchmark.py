"""benchmarks/label_efficiency.py: its sums, its table, and that selection does not see the labels."""

import json

import numpy as np
import pytest

from benchmarks import label_efficiency as bench
from rlhf.labels.selection import METHODS
from tests.builders import build_model, build_tokenizer


def test_labels_needed_between_two_shares():
    shares, curve = (0.1, 0.2, 0.4), np.array([0.5, 0.6, 0.7])
    assert bench.needed(curve, 0.65, shares) == pytest.approx(0.2 * 2**0.5)  # half way in the log
    assert bench.needed(curve, 0.4, shares) == 0.1
    assert bench.needed(curve, 0.8, shares) == 1.0
    assert bench.monotone(np.array([0.5, 0.7, 0.6])) == pytest.approx([0.5, 0.65, 0.65])


def test_intervals_over_seeds():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027: half width 4.3027 / sqrt(3).
    assert bench.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx([2, 2 - 2.48414, 2 + 2.48414], abs=1e-4)


def test_summary_of_a_method_that_needs_half_the_labels():
    # Random reaches at 20 % what the other one reaches at 10 %, for every seed; the target is 0.5 + 0.95 * 0.5.
    shares = (0.05, 0.1, 0.2, 1.0)
    curves = {"random": [[0.6, 0.7, 0.975, 1.0]] * 3, "mix": [[0.7, 0.975, 0.98, 1.0]] * 3}
    found = bench.summary(curves, shares)
    assert found["mix"]["fewer_labels"] == pytest.approx([2, 2, 2])
    assert found["mix"]["labels_to_target"] == pytest.approx([0.1] * 3)
    assert found["random"]["kept_at_goal"][0] == pytest.approx(0.95)
    assert found["mix"]["gain_at_goal"][0] == pytest.approx(0.005)


@pytest.mark.parametrize("method", METHODS)
def test_selection_does_not_see_the_labels(method):
    # Labels of pairs that are not selected may be anything: turned round, the same pairs are selected.
    pairs = np.random.default_rng(0).normal(size=(80, 3))
    first = bench.rounds(pairs, method, 0, (0.1, 0.3))
    assert [len(rows) for rows in first] == [8, 24] and len(set(first[1])) == 24
    turned = pairs * np.where(np.isin(np.arange(80), first[0]), 1.0, -1.0)[:, None]
    assert bench.rounds(turned, method, 0, (0.1, 0.3))[1].tolist() == first[1].tolist()


def test_held_out_groups_are_whole():
    groups = np.repeat(np.arange(8), 5)
    test = bench.held_out(groups, 0)
    assert test.sum() == 10 and all(len(set(test[groups == group])) == 1 for group in range(8))


def test_the_page_shows_the_measured_figures():
    report = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    page = bench.PAGE.read_text(encoding="utf-8")
    assert page == bench.with_tables(page, report), "run `python -m benchmarks.label_efficiency --table`"
    assert "| mix |" in page


def test_whole_reward_models_on_a_toy(tmp_path):
    rows = [
        {"prompt": f"t {i % 8} Stance: x", "chosen": "good " * (1 + i % 3), "rejected": f"bad {i}"} for i in range(48)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "toy.yaml").write_text(f"name: toy\nsource: {{files: {tmp_path / 'rows.jsonl'}}}\nclean: []\n")
    (tmp_path / "rows.jsonl").write_text(lines)
    tokenizer = build_tokenizer()
    for part in (tokenizer, build_model(tokenizer)):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.json"
    command = ["--full", str(tmp_path / "model"), "--data", str(tmp_path / "toy.yaml"), "--out", str(out)]
    bench.main([*command, "--seeds", "2", "--epochs", "3", "--batch", "12", "--learning-rate", "1e-2"])
    found = json.loads(out.read_text())["full"]["sets"][str(tmp_path / "toy.yaml")]
    assert found["pairs"] == 48 and set(found) == {"pairs", "all", "random", "mix"}
    assert found["all"]["accuracy"][0] > 0.9  # "good" against "bad" can be learned
    assert 0 <= found["mix"]["accuracy"][0] <= 1 and len(found["mix"]["by_seed"]) == 2
