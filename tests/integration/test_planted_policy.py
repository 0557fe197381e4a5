"""A policy that walked past what it should maximise, trained and sampled: report and gate say so by name."""

from __future__ import annotations

import json
import shutil

from tests.integration.conftest import run_stage

# PPO is paid for few words. One score that it never sees counts them: it only falls. The other likes five: it rises on
# the way from ten to one, and then falls. A small step length and many prompts, so that every machine finds the same.
PROXY = "ppo.rewards=[{function: 'tests.ppo_toys:length_in_words', weight: -0.15}]"
GOLD = "{name: gold, function: 'tests.ppo_toys:length_in_words'}"
FORM = "{name: form, function: 'tests.ppo_toys:near_five_words'}"
SETTINGS = (
    PROXY,
    "ppo.critic_init=sft",
    "ppo.learning_rate=5e-4",
    "ppo.total_episodes=2048",
    "ppo.best_metric=null",  # the last step is published, whichever was best on this machine
    "evaluate.prompts=192",
    "evaluate.frontier_prompts=192",
    "evaluate.perplexity_rows=0",
    "evaluate.score_all_rewards=false",  # the run's reward model would be one more score that PPO did not see
)


def planted(ci_run, root, *settings):
    """What the evaluate stage printed of a policy that was trained so, its manifest, and its folder."""
    for stage in ("pretrain", "sft", "reward"):
        shutil.copytree(ci_run / stage, root / "ci" / stage)
    run_stage("ppo", root, *SETTINGS, *settings)
    done = run_stage("evaluate", root, *SETTINGS, *settings)
    folder = root / "ci" / "evaluate"
    return done.stdout, json.loads((folder / "manifest.json").read_text(encoding="utf-8")), folder


def test_an_over_optimised_policy_is_flagged_by_name(ci_run, tmp_path):
    settings = (f"evaluate.judges=[{GOLD}, {FORM}]", "ppo.keep_policies_every=4", "evaluate.best_of_n=2")
    stdout, manifest, evaluate = planted(ci_run, tmp_path, *settings)
    curve = manifest["comparison"]["frontier"]
    rows = [curve["best_of_n"][0], *curve["steps"]]
    gold, form = ([row["scores"][name]["value"] for row in rows] for name in ("gold", "form"))
    best = curve["best_steps"]["form"]
    walked = gold[-1] < gold[0] - 5 and form[best // 4] > max(form[0], form[-1]) + 1
    assert walked, "it has not walked: nothing to show"
    assert manifest["gate"]["verdict"] == "fail" and manifest["gate"]["not_measured"] == {}
    reasons = manifest["gate"]["reasons"]
    found = [line.partition(" is ")[0] for line in reasons]
    # Against the SFT model, form has gained; against its best step it has lost.
    assert f"FAIL over_optimised: form of step {best}" in found and curve["gained"] == ["form"]
    assert 0 < best < 32
    assert "FAIL over_optimised: gold of step 4" in found and "FAIL worse_than_sft: gold of the SFT model" in found
    assert not [line for line in found if "worse_than_sft: form" in line]
    (beaten,) = [line for line in reasons if "beaten_by_best_of_n: gold" in line]
    assert "train longer" not in beaten
    assert all("published step 32" in line for line in reasons)
    for text in (stdout, (evaluate / "report.md").read_text(encoding="utf-8")):
        assert "Gate of the policy: FAIL." in text and all(reason in text for reason in reasons)
    run_stage("report", tmp_path)
    page = (tmp_path / "ci" / "report.html").read_text(encoding="utf-8")
    assert "gate of PPO&#x27;s policy: worse_than_sft, over_optimised" in page
    assert f"over_optimised: form of step {best} is" in page


def test_a_policy_worse_than_the_sft_model_is_flagged_without_kept_steps_and_best_of_n(ci_run, tmp_path):
    settings = (f"evaluate.judges=[{GOLD}]", "ppo.keep_policies_every=null", "evaluate.best_of_n=1")
    settings += ("ppo.total_episodes=1280",)
    stdout, manifest, evaluate = planted(ci_run, tmp_path, *settings)
    gate = manifest["gate"]
    assert gate["verdict"] == "fail"
    (reason,) = gate["reasons"]
    assert reason.startswith("FAIL worse_than_sft: gold of the SFT model is ") and "train longer" not in reason
    # What was compared with nothing has not passed.
    assert gate["not_measured"] == {
        "over_optimised": "set ppo.keep_policies_every",
        "beaten_by_best_of_n": "set evaluate.best_of_n",
    }
    for text in (stdout, (evaluate / "report.md").read_text(encoding="utf-8")):
        assert "over_optimised was not measured: set ppo.keep_policies_every." in text
        assert "PASS" not in text
