"""Is the published policy better than what it started from, and is it the step to keep? Pass, warn or fail, in words.

What PPO maximised rises also where the text gets worse, so only scores that it did not see count here. A line is said
only where the interval of the difference, paired by prompt, leaves no doubt.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.frontier import as_dict
from rlhf.evaluation.statistics import Interval, t_interval
from rlhf.reward.gate import Check, Verdict

Row = Mapping[str, Any]

DOUBT = 0.05  # that any of the intervals of one gate misses
VERDICTS: dict[str, Verdict] = {
    "worse_than_sft": "fail",
    "over_optimised": "fail",
    "no_gain": "warn",
    "beaten_by_best_of_n": "warn",
}
REMEDIES = {
    "worse_than_sft": "serve the SFT model; raise ppo.kl_coef, or mend the reward, which pays for something else",
    "over_optimised": "keep the earlier step, raise ppo.kl_coef or set ppo.kl_target",
    "no_gain": "a larger evaluate.frontier_prompts shows smaller gains; else another reward model",
    "beaten_by_best_of_n": "train longer at a higher ppo.kl_coef, or serve best-of-n",
}
# Of the same where the policy is below the SFT model: more of this training would lead further away.
BELOW_SFT = "raise ppo.kl_coef, or serve best-of-n"


def opponents(rows: Sequence[Row], points: Sequence[Row], published: int) -> dict[str, list[Row]]:
    """What the published step is held against, by the name of what is found: one that has more of a score.

    Args:
        rows: from `frontier`, the SFT model first.
        points: the kept steps of PPO, from `policy_point`, the published one among them.
        published: its step; 0 is the SFT model itself, which is held against nothing.
    """
    if published == 0:
        return {"worse_than_sft": [], "over_optimised": [], "beaten_by_best_of_n": []}
    policy = _published(points, published)
    return {
        "worse_than_sft": [row for row in rows if row["n"] == 1],
        "over_optimised": [point for point in points if point["step"] < published],
        "beaten_by_best_of_n": [row for row in rows if row["n"] > 1 and row["kl"] <= policy["kl"]],
    }


def judge_published(
    rows: Sequence[Row],
    points: Sequence[Row],
    published: int,
    unseen: Sequence[str],
    *,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """The published step against the SFT model, the steps before it and best-of-n, by every score that PPO did not see.

    The best of many looks good by luck. So there is one family of comparisons, those of all kinds and scores, and each
    interval is so wide that 95 % hold for all of them together (Bonferroni): Student's over prompts, because a tail of
    0.05 / (2 x comparisons) is thinner than a bootstrap can show.

    - `worse_than_sft`: the SFT model has more of a score.
    - `over_optimised`: a kept step before it has.
    - `beaten_by_best_of_n`: some best-of-n pays no more KL and has.
    - `no_gain`: no score is surely above the SFT model's, and none surely below.

    Args:
        rows, points, published: see `opponents`.
        unseen: scores that PPO did not maximise.
        clusters: what each prompt is one of, see `t_interval`.

    Returns:
        `findings`, each with its kind and a line in words, all but `no_gain` with score and interval; `gained`: scores
        that are surely above the SFT model's; `comparisons`: how many there were.
    """
    against = opponents(rows, points, published)
    policy = _published(points, published)
    comparisons = len(unseen) * sum(map(len, against.values()))
    confidence = 1 - DOUBT / max(comparisons, 1)
    findings, gained, changes = [], [], []
    for score in unseen:
        for kind, others in against.items():
            lost = [(other, _lost(other, policy, score, clusters, confidence)) for other in others]
            sure = [(other, interval) for other, interval in lost if interval.low > 0]
            if sure:
                other, interval = max(sure, key=lambda pair: pair[1].value)
                findings.append(_finding(kind, score, other, policy, interval, rows))
            if kind == "worse_than_sft":
                gained += [score for _, interval in lost if interval.high < 0]
                changes += [f"{score} {-i.value:+z.3f} [{-i.high:+z.3f}, {-i.low:+z.3f}]" for _, i in lost]
    if unseen and not gained and not any(finding["kind"] == "worse_than_sft" for finding in findings):
        text = f"no score that PPO did not see is surely above the SFT model's: {', '.join(changes)}"
        if published == 0:
            text = "the SFT model itself is published: no step was better by ppo.best_metric"
        findings.append({"kind": "no_gain", "text": text})
    return {"findings": findings, "gained": gained, "comparisons": comparisons}


def _lost(other: Row, policy: Row, score: str, clusters: Sequence[Hashable] | None, confidence: float) -> Interval:
    """How much more of a score the other has, paired by prompt."""
    theirs, mine = (row["scores"][score]["by_prompt"] for row in (other, policy))
    return t_interval(np.subtract(theirs, mine), clusters=clusters, confidence=confidence)


def _finding(kind: str, score: str, other: Row, policy: Row, interval: Interval, rows: Sequence[Row]) -> dict[str, Any]:
    what = f"step {other['step']}" if "step" in other else "the SFT model"
    if other.get("n", 1) > 1:
        what = f"best-of-{other['n']} of the SFT model"
    text = (
        f"{score} of {what} is {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}] above that of the "
        f"published step {policy['step']}, for {other['kl']:.2f} nats instead of {policy['kl']:.2f}"
    )
    below = policy["scores"][score]["value"] < rows[0]["scores"][score]["value"]
    return {"kind": kind, "score": score, "text": text, "below_sft": below, **as_dict(interval)}


def policy_gate(curve: Mapping[str, Any]) -> list[Check]:
    """What is to be said of the published policy. What was compared with nothing is no check: see `not_measured`.

    Args:
        curve: from `rlhf.evaluation.stage.reward_against_kl`; one without steps of PPO gives no checks.
    """
    if not curve["steps"]:
        return []
    if not curve["unseen"]:
        reason = "every score is one that PPO maximised, which rises also where the text gets worse"
        return [Check("held-back score", "warn", reason, "add one to evaluate.judges")]
    checks = []
    passed = _passed(curve)
    for kind, verdict in VERDICTS.items():
        found = [finding for finding in curve["findings"] if finding["kind"] == kind]
        checks += [
            Check(kind, verdict, finding["text"].removeprefix(f"{kind}: "), _remedy(finding)) for finding in found
        ]
        if not found and kind in passed:
            checks.append(Check(kind, "pass", passed[kind]))
    return checks


def _remedy(finding: Mapping[str, Any]) -> str:
    below = finding["kind"] == "beaten_by_best_of_n" and finding.get("below_sft")
    return BELOW_SFT if below else REMEDIES[finding["kind"]]


def _passed(curve: Mapping[str, Any]) -> dict[str, str]:
    """What is said of each comparison that was made, where it found nothing."""
    against = opponents(curve["best_of_n"], curve["steps"], curve["published"])
    places = {
        "worse_than_sft": "with the SFT model",
        "over_optimised": "at an earlier kept step",
        "beaten_by_best_of_n": "with best-of-n for no more KL",
    }
    said = "no score that PPO did not see was surely higher"
    passed = {kind: f"{said} {place}" for kind, place in places.items() if against[kind]}
    if "comparisons" not in curve:  # an evaluation from before the SFT model was among them
        passed.pop("worse_than_sft", None)
    if curve.get("gained"):
        passed["no_gain"] = f"surely above the SFT model's: {', '.join(curve['gained'])}"
    return passed


def not_measured(curve: Mapping[str, Any]) -> dict[str, str]:
    """What the gate cannot say, by name, and what to set so that it can."""
    if not curve["steps"] or not curve["unseen"] or curve["published"] == 0:
        return {}
    against = opponents(curve["best_of_n"], curve["steps"], curve["published"])
    missing = {}
    if "comparisons" not in curve:
        missing["worse_than_sft"] = "run make evaluate again"
    if not against["over_optimised"]:
        missing["over_optimised"] = "set ppo.keep_policies_every"
        if len(curve["steps"]) > 1:
            missing["over_optimised"] += f" below {curve['published']}, the step that is published"
    if not against["beaten_by_best_of_n"]:
        one = len(curve["best_of_n"]) == 1
        missing["beaten_by_best_of_n"] = "set evaluate.best_of_n" if one else "best-of-2 pays more KL than the policy"
    return missing


def _published(points: Sequence[Row], published: int) -> Row:
    return next(point for point in points if point["step"] == published)
