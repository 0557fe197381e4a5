"""Is a reward model good enough for PPO? Pass, warn or fail, each with its reason, from the numbers of its report.

A bound that the whole 95 % interval misses fails; one that the value misses within its interval warns. So a small
held-out set, which cannot tell, warns. Some checks never fail, because PPO can live with what they find. A number that
is NaN holds no bound, so every comparison asks whether the bound holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf.artifacts import Artifact
from rlhf.recipe import RewardGateSection

Verdict = Literal["pass", "warn", "fail"]
Report = Mapping[str, Any]

REPORT = "report.json"
SCHEMA = 1  # of what stands in it
ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")
CHANCE = 0.5
FEW_PAIRS = 10  # a slice with fewer is left out: one of many is below chance by luck
TRIVIAL = "a trivial model does as well: more labels, a larger base, another learning rate"
LENGTH = "pairs of like length, reward.length_decorrelation, or more pairs whose better answer is shorter"
EXPLOIT = "PPO would find this: put such answers among the rejected ones"
OFF_TOPIC = "it hardly reads the prompt, and PPO finds one answer for all: raise reward.mismatched"
# Edit -> name of its check: what the model would have learned to like.
LIKES = {
    "padded": "length",
    "repeated": "length",
    "thanks": "thanks",
    "shuffled": "word order",
    "no EOS": "truncation",
    "cut in half": "truncation",
}


@dataclass(frozen=True)
class Check:
    """One question of the gate.

    Attributes:
        name: what is looked for: accuracy, flipped labels, baselines, length, thanks, padding, ...
        verdict: the answer.
        reason: the numbers, in words.
        remedy: what to do about it; empty where it passes.
    """

    name: str
    verdict: Verdict
    reason: str
    remedy: str = ""


def judge(report: Report, gate: RewardGateSection) -> list[Check]:
    """Every check that the report has numbers for, in the order in which they matter."""
    found = report["accuracy"]
    if found["high"] < CHANCE:  # what asks for the right answer would only say this again
        reason = f"it prefers the worse answer: accuracy {_percent(found)} of {found['n']} held-out pairs"
        flipped = Check("flipped labels", "fail", reason, "check which column of the data is `chosen`")
        return [flipped, *_taste(report, gate), *_gains(report, gate), *_padding(report, gate)]
    checks = [*_accuracy(report, gate), *_shorter(report, gate), *_taste(report, gate), *_gains(report, gate)]
    return [*checks, *_empty(report, gate), *_padding(report, gate), *_softer(report, gate)]


def judge_artifact(artifact: Artifact, gate: RewardGateSection) -> list[Check] | None:
    """The checks of a reward artifact by these thresholds; None where it has no report of this version."""
    path = artifact.path / REPORT
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return judge(report, gate) if report.get("schema") == SCHEMA else None


def verdict(checks: list[Check]) -> Verdict:
    """The worst of them."""
    return max((check.verdict for check in checks), key=ORDER.index, default="pass")


def as_json(checks: list[Check], gate: RewardGateSection) -> dict[str, Any]:
    """What the artifact stores."""
    return {
        "verdict": verdict(checks),
        "checks": [asdict(check) for check in checks],
        "thresholds": gate.model_dump(mode="json"),
    }


def lines(checks: list[Check], without: tuple[Verdict, ...] = ("pass",)) -> list[str]:
    """`FAIL length: reason: remedy`, worst first."""
    found = sorted((c for c in checks if c.verdict not in without), key=lambda c: -ORDER.index(c.verdict))
    return [f"{c.verdict.upper()} {c.name}: {c.reason}" + (f"; {c.remedy}" if c.remedy else "") for c in found]


# ------------------------------------------------------------------------------------------------------------- checks
def _at_least(interval: Mapping[str, float], bound: float) -> Verdict:
    return "fail" if not interval["high"] >= bound else "warn" if not interval["value"] >= bound else "pass"


def _at_most(interval: Mapping[str, float], bound: float) -> Verdict:
    return "fail" if not interval["low"] <= bound else "warn" if not interval["value"] <= bound else "pass"


def _check(name: str, found: Verdict, reason: str, remedy: str) -> Check:
    return Check(name, found, reason, "" if found == "pass" else remedy)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _percent(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def _accuracy(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    found = report["accuracy"]
    if gate.min_accuracy is not None:
        reason = f"{_percent(found)} of {found['n']} held-out pairs, asked for {gate.min_accuracy:.0%}"
        remedy = "more or cleaner labels, a larger base, another learning rate"
        yield _check("accuracy", _at_least(found, gate.min_accuracy), reason, remedy)
    leads = report["leads"]
    if gate.min_lead is not None and leads:
        best, lead = min(leads.items(), key=lambda item: _nan_first(item[1]["value"]))
        reason = f"{lead['value']:+.1%} [{lead['low']:+.1%}, {lead['high']:+.1%}] against the {best} baseline"
        reason += f", asked for {gate.min_lead:+.0%}"
        yield _check("baselines", _at_least(lead, gate.min_lead), reason, TRIVIAL)


def _shorter(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    shorter = report["shorter"]
    if gate.min_accuracy_shorter is not None and shorter is not None:
        reason = f"{_percent(shorter)} right of {shorter['n']} pairs whose better answer is shorter"
        reason += f", asked for {gate.min_accuracy_shorter:.0%}"
        yield _check("length", _at_least(shorter, gate.min_accuracy_shorter), reason, LENGTH)


def _taste(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    """Whether it likes long (or short) answers more than the labels do."""
    row = next((row for row in report["biases"] if row["feature"] == "length in tokens"), None)
    if gate.max_length_preference is not None and row is not None:
        excess = row["excess"]
        if excess["value"] < 0:
            excess = {"value": -excess["value"], "low": -excess["high"], "high": -excess["low"]}
        reason = f"prefers the longer answer in {row['model']:.0%} of pairs, the labels do in {row['labels']:.0%}"
        reason += f"; allowed difference {gate.max_length_preference:.0%}"
        yield _check("length", _at_most(excess, gate.max_length_preference), reason, LENGTH)


def _gains(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    """Edits that make no answer better."""
    for row in report["edits"]:
        if row["n"] and row["edit"] in LIKES and gate.max_edit_gain is not None:
            gain, name = row["gain"], LIKES[row["edit"]]
            reason = f"an answer {_how(row)} gains {gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] std"
            reason += f", allowed {gate.max_edit_gain:+.2f}"
            found, remedy = _at_most(gain, gate.max_edit_gain), EXPLOIT
            if name == "truncation":  # PPO has a rule of its own for answers without EOS
                found, remedy = _softened(found), "keep ppo.missing_eos_penalty on, raise reward.truncated"
            yield _check(name, found, reason, remedy)


def _empty(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    """Answers that say nothing, against the good ones."""
    for row in report["edits"]:
        if row["n"] and row["edit"] not in LIKES and gate.max_empty_wins is not None:
            reason = f"an answer {_how(row)} beats {_percent(row['wins'])} of the good ones"
            reason += f", allowed {gate.max_empty_wins:.0%}"
            name = "thanks" if row["edit"] == "thanks alone" else "empty"
            yield _check(name, _at_most(row["wins"], gate.max_empty_wins), reason, EXPLOIT)


def _how(row: Mapping[str, Any]) -> str:
    verb = "" if row["edit"] in ("repeated", "no EOS", "thanks alone", "empty") else "with "
    return f"{verb}{row['meaning']}" if row["edit"] != "cut in half" else f"cut to {row['meaning']}"


def _padding(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    for row in report["padding"]:
        if gate.max_padding_shift is None:
            return
        shift = row["largest"]
        found: Verdict = "pass" if shift <= gate.max_padding_shift else "fail"
        reason = f"{row['way']}: scores move by up to {shift:.2g} std, allowed {gate.max_padding_shift:.2g}"
        remedy = "look at the attention mask, position ids, and pad token of the model's config"
        yield _check("padding", found, reason, remedy)


def _softer(report: Report, gate: RewardGateSection) -> Iterator[Check]:
    """What warns and never fails."""
    off_topic = report.get("relevance", {}).get("off_topic")  # older reports lack it
    if gate.max_off_topic_wins is not None and off_topic:
        reason = f"a good answer to another prompt beats {_percent(off_topic['wins'])} of the good ones"
        reason += f", allowed {gate.max_off_topic_wins:.0%}"
        found = _softened(_at_most(off_topic["wins"], gate.max_off_topic_wins))
        yield _check("off topic", found, reason, OFF_TOPIC)
    for row in report["paraphrases"]:
        if gate.max_paraphrase_flips is not None and row["n"]:
            reason = f"{row['template']!r} turns {_percent(row['flips'])} of the preferences"
            reason += f", allowed {gate.max_paraphrase_flips:.0%}"
            found = _at_most(row["flips"], gate.max_paraphrase_flips)
            yield _check("paraphrase", _softened(found), reason, "it reads the form of the prompt: vary the template")
    if gate.max_ece is not None:
        curve = report["calibration"]
        found = "pass" if curve["ece"] <= gate.max_ece else "warn"
        reason = f"expected calibration error {curve['ece']:.3f}, allowed {gate.max_ece:.3f}"
        remedy = f"margins divided by {curve['temperature']:.2f} would fit better (error {curve['ece_after']:.3f})"
        yield _check("calibration", found, reason, remedy)
    for row in report["ood"]:
        if gate.min_accuracy_ood is not None:
            reason = f"{row['name']}: {_percent(row['accuracy'])} of {row['accuracy']['n']} pairs"
            reason += f", asked for {gate.min_accuracy_ood:.0%}"
            found = _at_least(row["accuracy"], gate.min_accuracy_ood)
            yield _check("out of distribution", _softened(found), reason, "do not let PPO go where it does not hold")
    for row in report["slices"]:
        told = row["slice"] not in ("all", "length", "better answer") and row["accuracy"]["n"] >= FEW_PAIRS
        if told and not row["accuracy"]["high"] >= CHANCE:
            reason = f"{row['slice']} {row['value']}: {_percent(row['accuracy'])} of {row['accuracy']['n']} pairs"
            yield Check("slice", "warn", reason, "below chance there: look at its labels")


def _softened(found: Verdict) -> Verdict:
    return "warn" if found == "fail" else found
