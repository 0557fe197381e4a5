"""The planted failures: reward models that like the wrong thing are flagged by name, in the report and by the gate."""

from __future__ import annotations

import pytest

from rlhf.errors import UserError
from rlhf.recipe import RewardGateSection, RewardReportSection
from rlhf.reward import gate
from rlhf.reward.page import page
from rlhf.reward.report import measure
from tests import reward_toys

SETTINGS = RewardReportSection(edit_pairs=40, learning_curve_pairs=0)
PLANTED = {
    "honest": (lambda row: row, None),
    "length": (reward_toys.longer_wins, "length"),
    "thanks": (reward_toys.thanks_wins, "thanks"),
    "flipped": (reward_toys.flipped, "flipped labels"),
    "padding": (lambda row: row, "padding"),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Name of a planted failure -> its report, judged by the default thresholds."""
    found = {}
    for name, (label, _) in PLANTED.items():
        subject = reward_toys.train(str(tmp_path_factory.mktemp(name)), label)
        if name == "padding":
            reward_toys.read_padding(subject)
        train, test = reward_toys.honest_pairs(200, seed=1), reward_toys.honest_pairs(200, seed=2)
        report = {"run": name, "recipe": "toy", "data": "toy", "seed": 0} | measure(subject, train, test, SETTINGS, 0)
        report["gate"] = gate.as_json(gate.judge(report, RewardGateSection()), RewardGateSection())
        found[name] = report
    return found


def failed(report):
    return {check["name"] for check in report["gate"]["checks"] if check["verdict"] == "fail"}


def test_an_honest_model_passes(reports):
    report = reports["honest"]
    assert failed(report) == set()
    assert report["accuracy"]["low"] > 0.9
    assert report["padding"] and all(row["largest"] < 1e-3 for row in report["padding"])


@pytest.mark.parametrize("planted", [name for name, (_, flag) in PLANTED.items() if flag])
def test_a_planted_failure_is_flagged_by_name(reports, planted):
    report, flag = reports[planted], PLANTED[planted][1]
    assert report["gate"]["verdict"] == "fail"
    assert flag in failed(report)
    text = page(report)
    assert f"<td class=''>{flag}</td>" in text and "class='verdict fail'" in text


def test_what_was_not_planted_is_not_flagged(reports):
    names = {planted: failed(report) for planted, report in reports.items()}
    assert "length" not in names["flipped"] | names["padding"]
    assert "thanks" not in names["length"] | names["flipped"] | names["padding"]
    assert "padding" not in names["length"] | names["thanks"] | names["flipped"]
    assert not any("flipped labels" in names[planted] for planted in ("length", "thanks", "padding"))


def test_the_same_report_gives_the_same_page(reports):
    assert page(reports["length"]) == page(reports["length"])


def test_text_of_a_pair_is_no_markup(reports):
    row = {"kind": "surest", "prompt": "<b>p</b>", "chosen": "<script>x</script>", "rejected": "a & b"}
    row |= {"chosen_score": 0.0, "rejected_score": 1.0}
    text = page(reports["length"] | {"failures": [row]})
    assert "&lt;script&gt;x&lt;/script&gt;" in text and "<script" not in text and "a &amp; b" in text


def test_a_model_that_diverged_is_said_not_measured(tmp_path):
    subject = reward_toys.train(str(tmp_path), lambda row: row)
    subject.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="40 of 40 held-out pairs have no finite score: has the training diverged"):
        measure(subject, [], reward_toys.honest_pairs(40, seed=2), SETTINGS, 0)
