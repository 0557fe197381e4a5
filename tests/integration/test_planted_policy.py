"""A policy that walked past what it should maximise, trained and sampled: report and gate say so by name."""

from __future__ import annotations

import json
import shutil

from tests.integration.conftest import run_stage

# PPO is paid for words without the letter e; the score that it never sees counts the letter.
PROXY = "ppo.rewards=[{function: 'tests.ppo_toys:share_of_e', weight: -10.0}]"
GOLD = "evaluate.judges=[{name: gold, function: 'tests.ppo_toys:share_of_e'}]"
SETTINGS = (
    PROXY,
    GOLD,
    "ppo.critic_init=sft",
    "ppo.keep_policies_every=4",
    "evaluate.prompts=64",
    "evaluate.frontier_prompts=64",
    "evaluate.best_of_n=2",
    "evaluate.perplexity_rows=0",
)


def test_an_over_optimised_policy_is_flagged_by_name(ci_run, tmp_path):
    for stage in ("pretrain", "sft", "reward"):
        shutil.copytree(ci_run / stage, tmp_path / "ci" / stage)
    run_stage("ppo", tmp_path, *SETTINGS)
    done = run_stage("evaluate", tmp_path, *SETTINGS)
    evaluate = tmp_path / "ci" / "evaluate"
    manifest = json.loads((evaluate / "manifest.json").read_text(encoding="utf-8"))
    curve = manifest["comparison"]["frontier"]
    gold = {point["step"]: point["scores"]["gold"]["value"] for point in curve["steps"]}
    assert gold[12] < gold[4] - 0.01, "the policy has not walked: this test would show nothing"
    assert manifest["gate"]["verdict"] == "fail"
    (reason,) = [line for line in manifest["gate"]["reasons"] if "over_optimised" in line]
    assert reason.startswith("FAIL over_optimised: gold of step 4 is ") and "published step 12" in reason
    for text in (done.stdout, (evaluate / "report.md").read_text(encoding="utf-8")):
        assert "Gate of the policy: FAIL." in text and reason in text
    run_stage("report", tmp_path)
    page = (tmp_path / "ci" / "report.html").read_text(encoding="utf-8")
    assert "gate of PPO&#x27;s policy: over_optimised" in page and "over_optimised: gold of step 4 is" in page
