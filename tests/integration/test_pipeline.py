"""The five stages end to end: what a user, a notebook and a script of somebody else's rely on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.artifacts import Artifact
from rlhf.data import load_data_recipe
from rlhf.data.sources import source_hash
from rlhf.recipe import load_recipe
from tests.integration.conftest import STAGES, run_stage

MANIFEST_KEYS = {
    "schema_version", "stage", "status", "recipe", "recipe_hash", "inputs", "data", "seed", "git_commit", "packages",
    "hardware", "metrics", "wall_seconds", "peak_memory_gib", "files",
}  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_every_artifact_is_whole_and_says_where_it_comes_from(ci_run, stage):
    artifact = Artifact.load(ci_run / stage)
    artifact.verify()
    assert set(artifact.manifest) >= MANIFEST_KEYS
    assert artifact.manifest["status"] == "complete"
    for reference, digest in artifact.manifest["inputs"].items():
        assert Artifact.load(ci_run / reference).hash == digest
    assert not (ci_run / f"{stage}.partial").exists()
    assert not (artifact.path / "checkpoints").exists()
    assert len(artifact.metrics()) > 0
    for name, found in artifact.manifest["data"].items():  # down to the bytes of the source
        recipe = load_data_recipe(name)
        assert found["source_sha256"] == source_hash(recipe.source)
        assert found["fingerprint"] == artifact.manifest["fingerprint"]["data"][name]


def test_one_tokenizer_with_distinct_special_tokens_serves_all_stages(ci_run):
    identities = [Artifact.load(ci_run / stage).manifest["tokenizer"] for stage in STAGES]
    assert all(identity == identities[0] for identity in identities)
    tokenizer = AutoTokenizer.from_pretrained(ci_run / "ppo" / "model")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    # The plain call gives what the stages fed the model: BOS in front, nothing behind.
    sample = rows(ci_run / "ppo" / "samples.jsonl")[0]
    assert tokenizer(sample["prompt"]).input_ids == sample["prompt_ids"]
    assert sample["prompt_ids"][0] == tokenizer.bos_token_id


def test_sft_learned_to_end_and_reward_beats_chance(ci_run):
    assert Artifact.load(ci_run / "sft").manifest["metrics"]["eos_rate"] > 0.5
    reward = Artifact.load(ci_run / "reward").manifest
    assert reward["metrics"]["accuracy_low"] > 0.5
    assert {"accuracy_length_only", "accuracy_tfidf"} <= set(reward["metrics"])
    assert reward["reward_statistics"]["std"] > 0


def test_the_reward_stage_ends_with_a_report_of_one_file(ci_run):
    artifact = Artifact.load(ci_run / "reward")
    report = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy"]["value"] == artifact.manifest["metrics"]["accuracy"]
    assert report["gate"]["verdict"] == artifact.manifest["gate"]["verdict"] in ("pass", "warn", "fail")
    assert {row["slice"] for row in report["slices"]} >= {"all", "length", "better answer"}
    assert report["learning_curve"] and report["failures"] and report["edits"]
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page), "a report needs no other file"
    found = report["gate"]["verdict"].upper()
    assert f"reward gate: {found}" in (ci_run.parent / "reward.log").read_text(encoding="utf-8")
    assert f"reward gate of reward: {found}" in (ci_run.parent / "ppo.log").read_text(encoding="utf-8")


def test_the_report_is_redone_without_touching_the_model(ci_run, tmp_path):
    shutil.copytree(ci_run / "sft", tmp_path / "ci" / "sft")
    shutil.copytree(ci_run / "reward", tmp_path / "ci" / "reward")
    before = Artifact.load(tmp_path / "ci" / "reward")
    settings = ("reward.gate.min_accuracy=0.99", "reward.report.edit_pairs=10", "reward.report.learning_curve_pairs=0")
    done = run_stage("report", tmp_path, *settings)
    after = Artifact.load(tmp_path / "ci" / "reward")
    after.verify()
    assert after.hash == before.hash and after.manifest["metrics"] == before.manifest["metrics"]
    assert after.manifest["gate"]["verdict"] == "fail" and "FAIL accuracy" in done.stderr
    assert sorted(path.name for path in (tmp_path / "ci").iterdir()) == ["report.html", "reward", "sft"]
    assert "FAIL accuracy" in (tmp_path / "ci" / "report.html").read_text(encoding="utf-8")
    refused = run_stage("report", tmp_path, "reward.limit=2000", check=False)
    assert refused.returncode == 2 and "limit 3000 -> 2000" in refused.stderr


def test_ppo_writes_one_row_a_step_and_raises_the_score(ci_run):
    recipe = load_recipe("ci")
    metrics = Artifact.load(ci_run / "ppo").metrics()
    assert list(metrics["ppo_step"]) == list(range(1, recipe.ppo.total_steps + 1))
    assert abs(metrics["objective/kl"].iloc[0]) < 1e-3  # the reference is the policy at step 1
    assert metrics["objective/scores"].tail(3).mean() > metrics["objective/scores"].head(3).mean() + 0.2
    evaluation = Artifact.load(ci_run / "evaluate").manifest["metrics"]
    assert evaluation["ppo_vs_sft/win_rate_reward_low"] > 0.5
    assert {"ppo_vs_sft/win_rate_judge", "ppo_vs_sft/win_rate_vader"} <= set(evaluation)


def test_reward_model_loads_plainly_and_gives_the_scores_of_the_run(ci_run):
    artifact = Artifact.load(ci_run / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(artifact.model_dir).eval()
    assert model.config.num_labels == 1
    statistics = artifact.manifest["reward_statistics"]
    for sample in rows(ci_run / "evaluate" / "samples.jsonl")[::29]:
        ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
        with torch.no_grad():
            raw = model(ids).logits.item()
        assert (raw - statistics["mean"]) / statistics["std"] == pytest.approx(sample["scores"]["reward"], abs=2e-3)


def test_reward_model_and_critic_score_a_plain_batch_as_each_text_alone(ci_run):
    texts = [row["prompt"] + row["response"] for row in rows(ci_run / "evaluate" / "samples.jsonl")[:8]]
    for directory in (ci_run / "reward" / "model", ci_run / "ppo" / "critic"):
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        with torch.no_grad():
            batch = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
            alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
        assert torch.allclose(batch, torch.cat(alone), atol=1e-4)
    assert AutoTokenizer.from_pretrained(ci_run / "ppo" / "model").padding_side == "left"


def test_reward_statistics_say_what_they_were_measured_on(ci_run):
    statistics, ppo = Artifact.load(ci_run / "reward").manifest["reward_statistics"], load_recipe("ci").ppo
    for key in ("data", "split", "temperature", "top_p", "response_length", "max_prompt_length", "stop_strings"):
        assert statistics[key] == getattr(ppo, key)
    assert 0 < statistics["eos_rate"] <= 1


def test_policy_loads_plainly_and_gives_the_kl_of_the_run(ci_run):
    policies = {name: AutoModelForCausalLM.from_pretrained(ci_run / name / "model").eval() for name in ("sft", "ppo")}
    temperature = load_recipe("ci").ppo.temperature
    samples = [row for row in rows(ci_run / "evaluate" / "samples.jsonl") if row["policy"] == "ppo"]
    for sample in samples[::17]:
        prompt, response = sample["prompt_ids"], sample["response_ids"]
        ids = torch.tensor([prompt + response])
        sums = {}
        for name, model in policies.items():
            with torch.no_grad():
                logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
            positions = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            sums[name] = sum(logprobs[p, ids[0, p + 1]].item() for p in positions)
        assert sums["ppo"] - sums["sft"] == pytest.approx(sample["kl"], abs=2e-3)


def test_critic_and_cards_are_there(ci_run):
    critic = AutoModelForSequenceClassification.from_pretrained(ci_run / "ppo" / "critic")
    assert critic.config.num_labels == 1
    for stage in STAGES[:4]:
        card = (ci_run / stage / "model" / "README.md").read_text(encoding="utf-8")
        assert f"# ci/{stage}" in card
    report = (ci_run / "evaluate" / "report.md").read_text(encoding="utf-8")
    assert "win rate" in report and (ci_run / "evaluate" / "comparison.png").stat().st_size > 10_000


def test_a_finished_stage_is_skipped_with_one_line(ci_run):
    before = (ci_run / "sft" / "manifest.json").read_bytes()
    done = run_stage("sft", ci_run.parent)
    assert done.stdout.strip().splitlines()[-1].endswith("unchanged, skipped (FORCE=1 redoes it)")
    assert (ci_run / "sft" / "manifest.json").read_bytes() == before


def test_changed_settings_rebuild_and_keep_the_rest(ci_run, tmp_path):
    run = tmp_path / "ci"
    shutil.copytree(ci_run, run)
    done = run_stage("ppo", tmp_path, "ppo.total_episodes=64", "ppo.eval_every=null", "ppo.best_metric=null")
    assert "rebuilding, because" in done.stdout and "section.total_episodes 768 -> 64" in done.stdout
    assert len(Artifact.load(run / "ppo").metrics()) == 1
    assert Artifact.load(run / "sft").hash == Artifact.load(ci_run / "sft").hash


def test_lora_in_every_stage(ci_run, tmp_path):
    run = tmp_path / "ci"
    run.mkdir()
    shutil.copytree(ci_run / "pretrain", run / "pretrain")
    overrides = (
        "peft={r: 4}", "sft.trainer.max_steps=4", "reward.trainer.max_steps=4", "reward.baselines=false",
        "ppo.total_episodes=128", "ppo.eval_every=null", "ppo.best_metric=null",
    )  # fmt: skip
    for stage in ("sft", "reward", "ppo"):
        run_stage(stage, tmp_path, *overrides)
        assert (run / stage / "adapter" / "adapter_model.safetensors").is_file()
    metrics = Artifact.load(run / "ppo").metrics()
    # The reference is the merged SFT model with every adapter off, and the policy starts as exactly that.
    assert abs(metrics["objective/kl"].iloc[0]) < 1e-3
    base = AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
    policy = AutoModelForCausalLM.from_pretrained(run / "ppo" / "model")
    changed = [n for n, p in policy.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert changed and not any("wte" in name or "ln" in name for name in changed)


def test_ppo_with_an_ensemble_of_adapters_on_one_base(ci_run, tmp_path):
    """Two reward models of one run, made by `--as`; PPO takes their mean, and less where they disagree."""
    run = tmp_path / "ci"
    run.mkdir()
    shutil.copytree(ci_run / "pretrain", run / "pretrain")
    few = ("peft={r: 4}", "sft.trainer.max_steps=2", "reward.trainer.max_steps=2", "reward.limit=100")
    few += ("reward.baselines=false", "reward.report={edit_pairs: 10, learning_curve_pairs: 0}")
    run_stage("sft", tmp_path, *few)
    run_stage("reward", tmp_path, *few)
    run_stage("reward", tmp_path, "--as", "reward_b", *few, "reward.seed=1")
    first, second = (Artifact.load(run / name) for name in ("reward", "reward_b"))
    assert first.manifest["inputs"] == second.manifest["inputs"] and first.hash != second.hash
    ensemble = "ppo.rewards=[{artifact: reward}, {artifact: reward_b}]"
    ppo = ("ppo.total_episodes=64", "ppo.eval_every=null", "ppo.best_metric=null", "ppo.missing_eos_penalty=null")
    run_stage("ppo", tmp_path, *few, ensemble, *ppo, "ppo.reward_aggregation=penalised", "ppo.uncertainty_coef=0.5")
    row = Artifact.load(run / "ppo").metrics().iloc[0]
    mean = (row["objective/scores/reward"] + row["objective/scores/reward_b"]) / 2
    assert row["objective/scores"] < mean - 0.01
    refused = run_stage("reward", tmp_path, "--as", "sft", check=False)
    assert refused.returncode == 2 and "--as sft: does not begin with `reward`" in refused.stderr
