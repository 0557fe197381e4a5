"""`ppo.keep_policies_every`: policies of earlier steps in the artifact, and what evaluation makes of them."""

import pytest
import torch
import yaml

from rlhf.artifacts import Artifact
from rlhf.evaluation.policies import kept_steps, load_kept, step_dir
from rlhf.evaluation.stage import STAGE as EVALUATE
from rlhf.models import load_model
from rlhf.ppo.stage import STAGE as PPO
from rlhf.stage import run_stage
from tests.ppo_toys import SHAPES, toy_context, trainer_of, weights

STEPS = {"total_episodes": 12, "keep_policies_every": 2, "learning_rate": 1e-2, "best_metric": None}


def same(one: torch.nn.Module, other: torch.nn.Module, atol: float = 0.0) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_policies_of_steps_are_published(tmp_path, shape):
    ctx = toy_context(tmp_path, shape, STEPS)
    artifact = run_stage(PPO, ctx.recipe, tmp_path, "toy", force=True)
    artifact.verify()
    assert kept_steps(artifact) == [2, 3]  # every second step, and the last
    early, last = (load_kept(step_dir(artifact, step), ctx.inputs["sft"]) for step in (2, 3))
    published = load_model(artifact.model_dir)
    assert same(last, published, atol=1e-6)  # the last step is published; merged by PEFT here and by us there
    assert not same(early, published, atol=1e-6)
    assert not same(early, load_model(ctx.inputs["sft"].model_dir), atol=1e-6)
    assert (step_dir(artifact, 2) / "adapter_config.json").is_file() == shape.startswith("lora")


def test_a_run_that_died_keeps_the_same_policies(tmp_path, monkeypatch):
    ppo = STEPS | {"keep_policies_every": 1, "checkpoint_every": 2}
    whole = trainer_of(toy_context(tmp_path / "whole", ppo=ppo))
    whole.train()
    broken = trainer_of(toy_context(tmp_path / "broken", ppo=ppo))
    save = broken.checkpointer.save_policy

    def dies(trainer):
        save(trainer)
        if trainer.ppo_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(broken.checkpointer, "save_policy", dies)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(toy_context(tmp_path / "broken", ppo=ppo))
    resumed.train()
    kept = [trainer.checkpointer.policies() for trainer in (whole, resumed)]
    assert list(kept[0]) == list(kept[1]) == [1, 2, 3]
    for step in kept[0]:
        assert all(name.startswith("policy.") for name in kept[0][step])
        assert all(torch.equal(value, kept[1][step][name]) for name, value in kept[0][step].items())
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in kept[0][3].items())


def test_evaluation_shows_reward_against_kl(tmp_path):
    rule = {"function": "tests.ppo_toys:share_of_e", "name": "rule"}
    section = {"best_of_n": 4, "frontier_prompts": 4, "prompts": 6, "bootstrap": 200, "judges": [rule]}
    section["policies"] = [{"artifact": "sft"}, {"artifact": "ppo"}, {"artifact": "ppo", "step": 2}]
    section["data"] = str(tmp_path / "mix.yaml")
    parts = [{"recipe": str(tmp_path / "prompts.yaml")}, {"recipe": str(tmp_path / "sft.yaml")}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"name": "mix", "mixture": parts}), encoding="utf-8")
    ctx = toy_context(tmp_path, ppo=STEPS, evaluate=section)
    ppo = run_stage(PPO, ctx.recipe, tmp_path, "toy", force=True)
    artifact: Artifact = run_stage(EVALUATE, ctx.recipe, tmp_path, "toy")
    curve = artifact.manifest["comparison"]["frontier"]
    assert (curve["prompts"], curve["trained"], curve["unseen"]) == (4, "reward", ["rule"])
    assert [row["n"] for row in curve["best_of_n"]] == [1, 2, 4]
    rewards = [row["scores"]["reward"]["value"] for row in curve["best_of_n"]]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert [row["step"] for row in curve["steps"]] == [2, 3]
    assert all(row["kl"] > 0.01 for row in curve["steps"])
    assert curve["published"] == ppo.manifest["metrics"]["published_ppo_step"] == 3
    assert set(curve["best_steps"]) == {"reward", "rule"} and set(curve["best_steps"].values()) <= {0, 2, 3}
    metrics = artifact.manifest["metrics"]
    assert metrics["ppo_step_2/reward_mean"] != metrics["ppo/reward_mean"] != metrics["sft/reward_mean"]
    text = (artifact.path / "report.md").read_text(encoding="utf-8")
    assert "| PPO step 3 (published) |" in text and "| best of 4, at most " in text
    assert (artifact.path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    parts = artifact.manifest["comparison"]["parts"]
    assert {part["part"] for part in parts} == {"prompts", "sft"} and sum(p["num_responses"] for p in parts) == 6
    assert "| prompts of |" in text and "| prompts    |" in text
