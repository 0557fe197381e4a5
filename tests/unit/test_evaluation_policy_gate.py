"""The gate of the policy on typed numbers: what it names, what it leaves open, and how sure it is."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from rlhf.evaluation import frontier, frontier_report
from rlhf.evaluation.policy_gate import judge_published, not_measured, policy_gate

STEPS = (10, 20, 30)


def points(gold, steps=STEPS, kl=(1.0, 4.0, 9.0)):
    """Steps with a rising reward and the given held-back means, on 40 prompts."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    return [
        frontier.policy_point(
            step, [paid] * 40, {"reward": noise + paid, "gold": noise + mean}, num_resamples=9, seed=0
        )
        for step, paid, mean in zip(steps, kl, gold, strict=True)
    ]


def base(gold_of_best=0.0, gold=0.0, samples=2):
    """The SFT model, whose held-back score is `gold`, and best-of-2 of it, which has `gold_of_best`."""
    trained = np.tile([1.0, 0.0][:samples], (40, 1))
    held_back = np.tile([gold_of_best, 2 * gold - gold_of_best] if samples == 2 else [gold], (40, 1))
    return frontier.frontier(trained, {"reward": trained, "gold": held_back}, num_resamples=9, seed=0)


def curve_of(gold, unseen=("gold",), steps=None, rows=None, published=30):
    """What the evaluate stage stores of a policy whose held-back score went as `gold` says."""
    rows, steps = rows or base(), points(gold) if steps is None else steps
    scores = ["reward", "gold"]
    candidates = [{"step": 0, **rows[0]}, *steps]
    return {
        "prompts": 40, "samples": len(rows), "scores": scores, "trained": "reward", "unseen": list(unseen),
        "best_of_n": rows, "steps": steps, "published": published, "sft_std": {},
        "best_steps": {name: frontier.best_step(candidates, name) for name in scores},
        **judge_published(rows, steps, published, list(unseen)),
    }  # fmt: skip


def kinds(curve):
    return [finding["kind"] for finding in curve["findings"]]


def said_by(curve, kind):
    return next(check for check in policy_gate(curve) if check.name == kind)


def test_a_policy_that_walked_too_far_is_named_with_the_step_that_had_most():
    curve = curve_of([0.5, 1.0, 0.2])
    assert kinds(curve) == ["over_optimised"] and curve["gained"] == ["gold"]
    check = said_by(curve, "over_optimised")
    assert check.reason.startswith("gold of step 20 is 0.800 [0.800, 0.800] above that of the published step 30")
    assert (check.verdict, curve["best_steps"]["gold"], curve["best_steps"]["reward"]) == ("fail", 20, 30)


def test_the_step_that_is_named_is_the_best_of_those_that_are_surely_better():
    """Step 20 has the largest mean by one prompt alone; of step 10 there is no doubt."""
    steps = points([0.5, 0.0, 0.2])
    lucky = [20.0 * (prompt == 0) + 0.2 for prompt in range(40)]
    steps[1]["scores"]["gold"] |= {"by_prompt": lucky, "value": float(np.mean(lucky))}
    assert steps[1]["scores"]["gold"]["value"] > steps[0]["scores"]["gold"]["value"] + 0.1
    assert "gold of step 10 is" in said_by(curve_of(None, steps=steps), "over_optimised").reason


def test_a_policy_below_the_sft_model_is_named_also_where_nothing_was_kept():
    rows = base(gold_of_best=0.5, gold=0.5, samples=1)
    curve = curve_of(None, steps=points([0.2], (30,), (9.0,)), rows=rows)
    check = said_by(curve, "worse_than_sft")
    assert check.verdict == "fail" and check.reason.startswith("gold of the SFT model is 0.3")
    assert "above that of the published step 30, for 0.00 nats instead of 9.00" in check.reason
    assert curve["best_steps"]["gold"] == 0
    assert [check.name for check in policy_gate(curve)] == ["worse_than_sft"]  # nothing else was compared


def test_no_gain_is_a_warning_and_says_the_numbers():
    rows = base(gold_of_best=0.5, gold=0.5)
    noisy = points([0.5], (30,), (9.0,))
    curve = curve_of(None, steps=noisy, rows=rows)
    check = said_by(curve, "no_gain")
    assert check.verdict == "warn" and "is surely above the SFT model's: gold " in check.reason
    assert [check.verdict for check in policy_gate(curve) if check.name == "worse_than_sft"] == ["pass"]
    assert kinds(curve_of([0.5, 1.0, 1.2])) == []  # it gained


def test_a_policy_below_best_of_n_is_named():
    curve = curve_of([0.1, 0.2, 0.3], rows=base(gold_of_best=0.9))
    check = said_by(curve, "beaten_by_best_of_n")
    assert kinds(curve) == ["beaten_by_best_of_n"] and check.verdict == "warn"
    assert "best-of-2 of the SFT model" in check.reason and "0.19 nats instead of 9.00" in check.reason
    assert "train longer" in check.remedy


def test_more_training_is_no_remedy_where_the_score_is_below_the_sft_model():
    curve = curve_of([0.1, 0.2, 0.3], rows=base(gold_of_best=0.9, gold=0.4))
    assert kinds(curve) == ["worse_than_sft", "beaten_by_best_of_n"]
    assert not [check for check in policy_gate(curve) if "train longer" in check.remedy]


def test_best_of_n_that_pays_more_is_no_reproach_and_no_pass():
    rows = base(gold_of_best=5.0, gold=0.0)
    rows[1]["kl"] = math.inf
    curve = curve_of([0.1, 0.2, 0.3], rows=rows)
    assert kinds(curve) == []
    assert not_measured(curve) == {"beaten_by_best_of_n": "best-of-2 pays more KL than the policy"}
    assert "beaten_by_best_of_n" not in [check.name for check in policy_gate(curve)]


def test_what_was_compared_with_nothing_is_said_and_does_not_pass():
    curve = curve_of(None, steps=points([1.0], (30,), (9.0,)), rows=base(gold=0.0, samples=1))
    assert [(check.name, check.verdict) for check in policy_gate(curve)] == [
        ("worse_than_sft", "pass"), ("no_gain", "pass")
    ]  # fmt: skip
    missing = {"over_optimised": "set ppo.keep_policies_every", "beaten_by_best_of_n": "set evaluate.best_of_n"}
    assert not_measured(curve) == missing
    assert frontier_report.outcome(curve) == ("pass", "not measured: over_optimised, beaten_by_best_of_n")
    assert "over_optimised was not measured: set ppo.keep_policies_every." in frontier_report.sentences(curve)
    first = curve_of([1.0, 1.2, 1.4], published=10)  # later steps were kept, and none before it
    assert not_measured(first) == {"over_optimised": "set ppo.keep_policies_every below 10, the step that is published"}


def test_the_sft_model_itself_as_the_published_policy():
    """No step was better by ppo.best_metric: two samples of one model are no evidence against it."""
    steps = points([-0.5, 0.0, 0.5], (0, 10, 20), (0.0, 1.0, 4.0))
    curve = curve_of(None, steps=steps, published=0)
    (check,) = policy_gate(curve)
    assert (check.name, check.verdict) == ("no_gain", "warn") and "the SFT model itself is published" in check.reason
    assert not_measured(curve) == {}


def test_an_evaluation_from_before_the_sft_model_was_compared_claims_nothing_of_it():
    curve = curve_of([0.5, 1.0, 1.2])
    for key in ("comparisons", "gained"):
        del curve[key]
    assert [check.name for check in policy_gate(curve)] == ["over_optimised", "beaten_by_best_of_n"]
    assert not_measured(curve) == {"worse_than_sft": "run make evaluate again"}


def test_all_comparisons_share_five_per_cent():
    """One SFT model, two earlier steps and best-of-2, by two scores: eight, and Student's interval of the pairs."""
    random = np.random.default_rng(1)
    rows, steps = base(), points([0.0, 0.0, 0.0])
    for row in [*rows, *steps]:
        for name in ("gold", "other"):
            values = random.normal(3.0 * (row.get("step") == 10), 1.0, 40)
            row["scores"][name] = {"value": float(values.mean()), "by_prompt": values.tolist()}
    found = judge_published(rows, steps, 30, ["gold", "other"])
    assert found["comparisons"] == 8
    (finding,) = [finding for finding in found["findings"] if finding.get("score") == "gold"]
    pair = [row["scores"]["gold"]["by_prompt"] for row in (steps[0], steps[2])]
    interval = ttest_rel(*pair).confidence_interval(1 - 0.05 / 8)
    assert (finding["low"], finding["high"]) == pytest.approx((interval.low, interval.high))


def test_among_thirty_steps_that_are_alike_none_is_named():
    """500 runs on chance alone: something is named in at most 5 % of them."""
    random, prompts, wrong = np.random.default_rng(0), 32, 0
    for _ in range(500):
        steps = [
            {"step": step, "kl": 9.0, "scores": {"gold": {"value": 0.0, "by_prompt": values}}}
            for step, values in enumerate(random.normal(size=(30, prompts)), start=1)
        ]
        rows = [
            {"n": n, "kl": 0.1, "scores": {"gold": {"value": 0.0, "by_prompt": random.normal(size=prompts)}}}
            for n in (1, 2, 4, 8, 16)
        ]
        found = judge_published(rows, steps, 30, ["gold"])
        wrong += bool(found["gained"] or [finding for finding in found["findings"] if finding["kind"] != "no_gain"])
    assert found["comparisons"] == 34 and wrong <= 0.05 * 500


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (curve_of([0.5, 1.0, 0.2]), ("fail", "over_optimised")),
        (curve_of([0.1, 0.2, 0.3], rows=base(gold_of_best=0.9)), ("warn", "beaten_by_best_of_n")),
        (curve_of([0.5, 1.0, 1.2]), ("pass", "")),
        (curve_of([0.5, 1.0, 0.2], unseen=()), ("warn", "held-back score")),
        (curve_of([0.5, 1.0, 1.2]) | {"steps": []}, None),
        (None, None),
    ],
)
def test_the_gate_of_the_policy_names_what_it_finds(curve, expected):
    assert frontier_report.outcome(curve) == expected
    if curve and expected:
        said = "\n".join(frontier_report.sentences(curve))
        assert f"Gate of the policy: {expected[0].upper()}." in said
        assert expected[0] == "pass" or f"{expected[0].upper()} {expected[1]}: " in said
