"""The trainer: it learns, obeys its knobs, logs what it says, and continues exactly where it was."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from rlhf.artifacts import partial_dir
from rlhf.errors import UserError
from rlhf.metrics import PPO
from rlhf.models import load_model, of_critic
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.checkpoint import Checkpointer
from rlhf.ppo.trainer import PPOTrainer, say_calibrated
from rlhf.recipe import PPOSection
from rlhf.stage import run_stage
from tests.builders import (
    build_model,
    build_recipe,
    build_sft_artifact,
    build_tokenizer,
    write_data_recipe,
    write_rows,
)
from tests.ppo_toys import (
    RULE,
    SHAPES,
    build_artifacts,
    first_rollout,
    rows_of,
    toy_context,
    toy_trainer,
    trainer_of,
    weights,
)
from tests.tolerances import assert_close

RULE_RUN = {"rewards": RULE, "critic_init": "sft", "missing_eos_penalty": None}
FOUR_STEPS = {"total_episodes": 16, "rollout_batch_size": 4, "mini_batch_size": 2, "num_ppo_epochs": 2}
EVALUATED = {"eval_every": 2, "eval_prompts": 4, "sample_every": 2}


def metrics_of(trainer):
    return rows_of(trainer.writer.directory / "metrics.jsonl")


def model_of(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)


# ------------------------------------------------------------------------------------------------------------- learns
@pytest.mark.parametrize("shape", SHAPES)
def test_it_learns_a_rule(tmp_path, shape):
    sizes = {"total_episodes": 1280, "rollout_batch_size": 64, "mini_batch_size": 32, "num_ppo_epochs": 2}
    rates = {"learning_rate": 3e-2, "kl_coef": 0.0, "temperature": 1.0, "vf_coef": 0.01}
    lengths = {"response_length": 6, "max_tokens_per_micro_batch": 4096}
    build_sft_artifact(tmp_path, model=outspoken())
    rule = {"rewards": [{"function": "tests.ppo_toys:share_of_letters"}]}
    trainer = toy_trainer(tmp_path, shape, RULE_RUN | sizes | rates | lengths | rule)
    trainer.train()
    scores = [row["objective/scores"] for row in metrics_of(trainer)]
    first, last = sum(scores[:2]) / 2, sum(scores[-2:]) / 2
    assert first < 0.3 and last > first + 0.3, (first, last)
    assert metrics_of(trainer)[-1]["objective/kl"] > 1  # and it had to move for it


def outspoken():
    """A model whose frozen embeddings are large enough for an adapter to make any token likely."""
    model = build_model(build_tokenizer())
    with torch.no_grad():
        model.transformer.wte.weight *= 25
    return model


# -------------------------------------------------------------------------------------------------------------- knobs
def test_max_grad_norm_is_applied(tmp_path, monkeypatch):
    norms = {}
    for limit in (1e-3, None):
        trainer = toy_trainer(tmp_path, ppo={"max_grad_norm": limit} | FOUR_STEPS)
        step, seen = trainer.optimizer.step, []

        def spy(step=step, trainer=trainer, seen=seen):
            grads = [p.grad for p in trainer.parameters if p.grad is not None]
            seen.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
            step()

        monkeypatch.setattr(trainer.optimizer, "step", spy)
        metrics, _ = trainer.step()
        norms[limit] = seen, metrics["policy/grad_norm"]
    assert all(abs(norm - 1e-3) < 1e-5 for norm in norms[1e-3][0])
    assert norms[None][0][0] > 0.01  # the clip had something to do
    assert_close(norms[None][1], sum(norms[None][0]) / 4, rtol=1e-4)  # reported: the norm before clipping
    assert norms[1e-3][1] > 0.01


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (0.25, [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6]),
        (0.3, [1 / 3, 2 / 3, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),  # 2.4 steps of warm-up are 3
    ],
)
def test_learning_rate_warms_up_and_falls_to_zero(tmp_path, ratio, expected):
    sizes = {"total_episodes": 8, "rollout_batch_size": 4, "mini_batch_size": 2, "num_ppo_epochs": 2}
    trainer = toy_trainer(tmp_path, ppo=sizes | {"learning_rate": 1e-3, "warmup_ratio": ratio})
    seen = []
    for trainer.ppo_step in range(2):
        for number in range(4):
            trainer._set_learning_rate(number)
            seen.append(trainer.optimizer.param_groups[0]["lr"] / 1e-3)
    assert_close(seen, expected, atol=1e-9)


def test_target_kl_ends_an_update_early(tmp_path):
    sizes = FOUR_STEPS | {"num_ppo_epochs": 4, "learning_rate": 1e-2}
    free, bound = toy_trainer(tmp_path, ppo=sizes), toy_trainer(tmp_path, ppo=sizes | {"target_kl": 1e-6})
    free.step(), bound.step()
    assert free.optimizer_step == 8
    assert 2 <= bound.optimizer_step < 8  # the first mini-batch never exceeds it: its approxkl is 0


@pytest.mark.parametrize("shape", SHAPES)
def test_critic_warm_up_leaves_the_policy_bit_equal(tmp_path, shape):
    trainer = toy_trainer(tmp_path, shape, FOUR_STEPS | {"critic_warmup_steps": 2, "learning_rate": 1e-2})
    policy = {id(p) for p in model_of(trainer).policy_parameters()}
    names = {name for name, p in model_of(trainer).named_parameters() if id(p) in policy}
    assert names and all(".critic." not in name and name.startswith("policy.") for name in names)
    before = weights(trainer)
    trainer.step()
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in names)
    critic = [n for n, p in model_of(trainer).named_parameters() if p.requires_grad and n not in names]
    assert critic and any(not torch.equal(before[name], after[name]) for name in critic)
    trainer.ppo_step = 2
    trainer.step()
    assert any(not torch.equal(after[name], value) for name, value in weights(trainer).items() if name in names)


@pytest.mark.parametrize(
    ("shape", "related_by"), [("full-separate", 4.0), ("lora-separate", 4.0), ("full-separate", 0.5)]
)
def test_the_critic_is_calibrated_once_to_the_first_returns(tmp_path, monkeypatch, caplog, shape, related_by):
    """numpy's least squares on what the critic said before and on the scores, which are the returns while KL is 0.

    Tokens of a response share one weight: each has one end. A scale below 0.3 is 0.3, and meets the mean.
    """
    trainer = toy_trainer(tmp_path, shape, FOUR_STEPS | {"critic_warmup_steps": 9, "learning_rate": 1e-12})
    before, score = first_rollout(trainer), trainer.score
    mask = before.response_mask
    values = before.values[mask].numpy()

    def related(rollout, update):
        score(rollout, update)
        rollout.scores = related_by * before.values[:, 0] - 3 + torch.tensor([0.1, 0.0, -0.1, 0.0])

    monkeypatch.setattr(trainer, "score", related)
    with caplog.at_level(logging.INFO, logger="rlhf.ppo.trainer"):
        _, rollout = trainer.step()
    scores = rollout.scores[:, None].expand(mask.shape)[mask].numpy()
    shares = (1 / mask.sum(1, keepdim=True)).expand(mask.shape)[mask].numpy()
    slope, offset = np.polyfit(values, scores, 1, w=shares**0.5)  # it weighs residuals, not their squares
    assert slope > 0 and (slope < 0.3) == (related_by == 0.5)
    if slope < 0.3:
        slope, offset = 0.3, np.average(scores, weights=shares) - 0.3 * np.average(values, weights=shares)
    assert_close(rollout.values[mask], slope * values + offset, rtol=1e-3, atol=1e-4)
    assert_close(first_rollout(trainer).values, rollout.values, rtol=1e-4, atol=1e-5)  # the model says so from now on
    assert_close(model_of(trainer).value_bias.item(), offset, rtol=1e-3)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("critic:")]
    expected = f"critic: {slope:.2f} times the reward model's values, {offset:+.2f}, for the first returns"
    assert len(said) == 1 and said[0].split(";")[0] == expected
    assert ("ppo.critic_learning_rate" in said[0]) == (related_by == 0.5)
    trainer.ppo_step = 1
    _, second = trainer.step()
    assert_close(model_of(trainer).value_bias.item(), offset, rtol=1e-3)
    assert not any(torch.isnan(second.values).flatten())


@pytest.mark.parametrize(
    ("scale", "rate", "hint"), [(0.3, None, True), (0.3, 1.9e-5, True), (0.3, 3e-5, False), (0.31, None, False)]
)
def test_a_critic_that_begins_with_little_is_said_to_need_a_rate_of_its_own(caplog, scale, rate, hint):
    config = PPOSection(data="d", total_episodes=64, learning_rate=1e-5, critic_learning_rate=rate)
    with caplog.at_level(logging.INFO, logger="rlhf.ppo.trainer"):
        say_calibrated(scale, 0.5, config)
    assert ("ppo.critic_learning_rate, 3 to 10" in caplog.text) == hint and f"critic: {scale:.2f} times" in caplog.text


@pytest.mark.parametrize(
    ("shape", "ppo"),
    [
        ("full-separate", {"calibrate_critic": False}),
        ("full-shared", {}),
        ("lora-shared", {}),
        ("full-separate", {"critic_init": "sft"}),
    ],
)
def test_a_critic_that_is_not_calibrated_has_no_bias(tmp_path, shape, ppo):
    trainer = toy_trainer(tmp_path, shape, FOUR_STEPS | {"learning_rate": 1e-12} | ppo)
    before = first_rollout(trainer)
    _, rollout = trainer.step()
    assert model_of(trainer).value_bias is None
    assert torch.equal(before.values, rollout.values)


def test_bad_scores_do_not_reach_the_critic(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, ppo=FOUR_STEPS)
    before, score = weights(trainer), trainer.score

    def broken(rollout, update):
        score(rollout, update)
        rollout.scores[0] = math.nan

    monkeypatch.setattr(trainer, "score", broken)
    trainer.step()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_max_kl_stops_the_run(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=FOUR_STEPS | {"learning_rate": 3e-2, "max_kl": 0.05})
    trainer.train()
    rows = metrics_of(trainer)
    assert 2 <= len(rows) < 4
    assert rows[-1]["objective/kl"] > 0.05 and all(row["objective/kl"] <= 0.05 for row in rows[:-1])
    assert "max_kl" in trainer.stopped


def test_a_stopped_run_stays_stopped(tmp_path):
    ppo = FOUR_STEPS | {"learning_rate": 3e-2, "max_kl": 0.05}
    first = toy_trainer(tmp_path, ppo=ppo)
    first.train()
    again = toy_trainer(tmp_path, ppo=ppo)  # killed before it published
    again.train()
    assert again.stopped == first.stopped and again.ppo_step == first.ppo_step
    assert again.last_metrics == first.last_metrics


@pytest.mark.parametrize(
    ("penalty", "mode", "expected"),
    [(None, "replace", 0.75), (0.5, "replace", -0.5), (0.5, "subtract", 0.25)],
)
def test_missing_eos(tmp_path, monkeypatch, penalty, mode, expected):
    trainer = toy_trainer(
        tmp_path, ppo=RULE_RUN | {"missing_eos_penalty": penalty, "missing_eos_mode": mode, "total_episodes": 32,
                                  "rollout_batch_size": 32, "mini_batch_size": 32}
    )  # fmt: skip
    trainer.rewards[0].function = lambda prompts, responses: [0.75] * len(responses)
    rollout = first_rollout(trainer)
    assert rollout.finished.any() and not rollout.finished.all()
    assert_close(rollout.scores, torch.where(rollout.finished, 0.75, expected))


def test_score_clip_and_running_normalisation_reach_the_scores(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=RULE_RUN | {"normalize_scores": True, "score_clip": 1.5})
    trainer.rewards[0].function = lambda prompts, responses: [4.0, -4.0, 0.0, 4.0][: len(responses)]
    rollout = trainer.step()[1]
    std = (sum(x * x for x in (3, -5, -1, 3)) / 4) ** 0.5  # deviations from the mean 1
    assert_close(rollout.scores, [4 / std, -4 / std, 0.0, 4 / std], atol=1e-6)
    assert 4 / std < 1.5
    trainer.rewards[0].function = lambda prompts, responses: [100.0, 0.0, 0.0, 0.0]
    assert float(trainer.step()[1].scores[0]) == 1.5
    assert trainer.running.count == 8


def test_whitened_rewards_change_the_returns(tmp_path):
    plain, white = (toy_trainer(tmp_path, ppo={"whiten_rewards": on, "kl_coef": 0.2}) for on in (False, True))
    rows = plain.step()[0], white.step()[0]
    assert rows[0]["objective/scores"] == rows[1]["objective/scores"]
    assert abs(rows[0]["loss/value_avg"] - rows[1]["loss/value_avg"]) > 1e-4


@pytest.mark.parametrize("how", ["sum", "mean", "min"])
def test_several_weighted_sources(tmp_path, how):
    rewards = [
        {"artifact": "reward", "weight": 2.0},
        {"function": "tests.ppo_toys:share_of_e"},
        {"function": "tests.ppo_toys:length_in_words", "weight": -0.5},
    ]
    trainer = toy_trainer(tmp_path, ppo={"rewards": rewards, "reward_aggregation": how, "missing_eos_penalty": None})
    metrics, rollout = trainer.step()
    raw = rollout.raw_scores
    assert list(raw) == ["reward", "share_of_e", "length_in_words"]
    assert_close(raw["length_in_words"], [float(len(text.split())) for text in rollout.responses])
    parts = torch.stack([2 * raw["reward"], raw["share_of_e"], -0.5 * raw["length_in_words"]])
    expected = {"sum": parts.sum(0), "mean": parts.sum(0) / 3, "min": parts.min(0).values}[how]
    assert_close(rollout.scores, expected)
    assert_close(metrics["objective/scores/reward"], float(raw["reward"].mean()))


def test_dataset_columns_reach_the_function(tmp_path):
    rows = [{"prompt": f"the film {i}", "wanted": i / 10} for i in range(24)]
    rewards = [{"function": "tests.ppo_toys:column_reward"}]
    ctx = toy_context(tmp_path, ppo=RULE_RUN | {"rewards": rewards})
    write_data_recipe(tmp_path, "prompts")
    write_rows(tmp_path / "prompts.jsonl", rows)
    rollout = trainer_of(ctx).step()[1]
    wanted = {row["prompt"]: row["wanted"] for row in rows}
    assert_close(rollout.scores, [wanted[prompt] for prompt in rollout.prompts], rtol=1e-6)


def test_adaptive_kl_coefficient(tmp_path):
    ppo = FOUR_STEPS | {"kl_target": 1e-4, "kl_horizon": 40, "kl_coef": 0.1, "learning_rate": 1e-2}
    trainer = toy_trainer(tmp_path, ppo=ppo | {"total_episodes": 32})
    trainer.train()
    rows = metrics_of(trainer)
    # KL is 0 in the first step, and far above or (k1, of 4 responses) below the target later: +-20 %, 4 of 40 episodes
    errors = [min(max(row["objective/kl"] / 1e-4 - 1, -0.2), 0.2) for row in rows]
    assert errors[0] == -0.2 and 0.2 in errors[1:-1]
    for row, error, after in zip(rows, errors, rows[1:], strict=False):
        assert_close(after["objective/kl_coef"], row["objective/kl_coef"] * (1 + error * 4 / 40), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- logs
def test_metrics_rows_are_complete_and_counters_rise(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=FOUR_STEPS | EVALUATED)
    trainer.train()
    rows = rows_of(trainer.writer.directory / "metrics.jsonl", perf=True)
    assert [row["ppo_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["episode"] for row in rows] == [4, 8, 12, 16]
    assert [row["optimizer_step"] for row in rows] == [4, 8, 12, 16]
    everywhere = {key for key in PPO if not key.startswith("eval/") and "<" not in key}
    for row in rows:
        assert everywhere - {key for key in everywhere if key.startswith("perf/")} <= set(row)
        assert {k for k in everywhere if k.startswith("perf/")} - set(row) <= {"perf/mfu"}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        assert_close(row["objective/rlhf_reward"], row["objective/scores"] + row["objective/non_score_reward"])
        assert_close(row["objective/non_score_reward"], -0.05 * row["objective/kl"], atol=1e-9)
    evaluated = [row["ppo_step"] for row in rows if "eval/scores" in row]
    assert evaluated == [2, 4]
    assert {key for key in PPO if key.startswith("eval/")} <= set(rows[1])


def test_explained_variance_ignores_a_constant_offset(tmp_path):
    trainer = toy_trainer(tmp_path)
    rollout = first_rollout(trainer)
    returns = torch.where(rollout.response_mask, rollout.values + 3.0, 0.0)
    targets = type("Targets", (), {"returns": returns, "advantages": returns})
    statistics = [{"policy/approxkl_avg": 0.0}]
    assert_close(trainer.metrics(rollout, targets, statistics)["val/explained_variance"], 1.0, atol=1e-5)
    targets.returns = torch.where(rollout.response_mask, torch.randn_like(returns), 0.0)
    x, r = rollout.values[rollout.response_mask].double(), targets.returns[rollout.response_mask].double()
    expected = 1 - (r - x).var(unbiased=False) / r.var(unbiased=False)
    assert_close(trainer.metrics(rollout, targets, statistics)["val/explained_variance"], expected, rtol=1e-4)


def test_samples_show_the_same_prompts_each_time(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=FOUR_STEPS | EVALUATED, logging={"report_to": [], "samples": 3})
    trainer.train()
    rows = rows_of(trainer.writer.directory / "samples.jsonl")
    fixed = [row for row in rows if row["kind"] == "fixed"]
    assert sorted({row["step"] for row in fixed}) == [0, 2, 4]  # step 0 is the SFT model
    prompts = [[row["prompt"] for row in fixed if row["step"] == step] for step in (0, 2, 4)]
    assert len(prompts[0]) == 3 and prompts[0] == prompts[1] == prompts[2]
    assert sorted({row["step"] for row in rows if row["kind"] == "random"}) == [1, 2, 4]
    assert all(abs(row["kl"]) < 1e-4 for row in fixed if row["step"] == 0)
    for row in rows:
        keys = {"step", "kind", "prompt", "prompt_ids", "response", "response_ids", "score", "kl", "length", "has_eos"}
        assert set(row) == keys | {"tokens", "token_kl", "token_value", "token_reward"}
        assert "".join(row["tokens"]) == row["response"] and len(row["tokens"]) == row["length"]
        assert_close(sum(row["token_kl"]), row["kl"], atol=1e-2)
        assert_close(sum(row["token_reward"]), row["score"] - 0.05 * row["kl"], atol=1e-2)
        assert len(row["token_value"]) == row["length"]
        assert len(row["response_ids"]) == row["length"] and (row["response_ids"][-1] == 2) == row["has_eos"]
        assert row["prompt_ids"][0] == 1 and 0 not in row["prompt_ids"]  # BOS, and no padding
    assert len({value for row in rows for value in row["token_value"]}) > 10


def test_samples_have_fixed_prompts_without_any_evaluation(tmp_path):
    settings = FOUR_STEPS | {"eval_every": None, "sample_every": 2}
    traces = []
    for samples in (3, 1):
        root = tmp_path / str(samples)
        trainer = toy_trainer(root, ppo=settings, logging={"report_to": [], "samples": samples})
        trainer.train()
        rows = rows_of(trainer.writer.directory / "samples.jsonl")
        fixed = {
            step: [row["prompt"] for row in rows if row["kind"] == "fixed" and row["step"] == step] for step in range(5)
        }
        assert {step for step, prompts in fixed.items() if prompts} == {0, 1, 2, 4}
        assert len(fixed[0]) == samples and fixed[0] == fixed[1] == fixed[2] == fixed[4]
        metrics = rows_of(trainer.writer.directory / "metrics.jsonl")
        assert not any("eval/scores" in row for row in metrics)
        traces.append([{key: value for key, value in row.items() if not key.startswith("perf/")} for row in metrics])
    assert traces[0] == traces[1]  # looking changes nothing


# ------------------------------------------------------------------------------------------------------- best step
def fake_scores(monkeypatch, scores):
    """Make `eval/rlhf_reward` of ppo_step k the k-th of `scores`."""
    keep = PPOTrainer._keep_best

    def faked(self, metrics):
        metrics["eval/rlhf_reward"] = scores[self.ppo_step]
        keep(self, metrics)

    monkeypatch.setattr(PPOTrainer, "_keep_best", faked)


def test_the_best_step_is_published(tmp_path, monkeypatch):
    fake_scores(monkeypatch, [0.0, 1.0, 5.0, 2.0, 3.0])
    kept = {}
    save_best = Checkpointer.save_best

    def spy(self, trainer):
        save_best(self, trainer)
        kept[trainer.ppo_step] = weights(trainer)

    monkeypatch.setattr(Checkpointer, "save_best", spy)
    build_artifacts(tmp_path, lora=False)
    recipe = build_recipe(tmp_path, ppo=FOUR_STEPS | EVALUATED | {"eval_every": 1, "learning_rate": 1e-2})
    artifact = run_stage(ppo_stage.STAGE, recipe, tmp_path, "toy")
    assert artifact.manifest["metrics"]["published_ppo_step"] == 2 and sorted(kept) == [0, 1, 2]
    published = dict(load_model(artifact.model_dir).named_parameters())
    for name, value in kept[2].items():
        if name.startswith("policy."):
            assert torch.equal(published[name.removeprefix("policy.")], value)
    assert not torch.equal(kept[1]["policy.transformer.wte.weight"], kept[2]["policy.transformer.wte.weight"])
    assert not (artifact.path / "checkpoints").exists()
    artifact.verify()


def test_best_metric_must_be_measured(tmp_path):
    with pytest.raises(UserError, match=r"ppo\.best_metric 'objective/scores'"):
        ppo_stage.check(toy_context(tmp_path, ppo={"best_metric": "objective/scores"}))


# -------------------------------------------------------------------------------------------------------------- resume
def test_same_seed_twice_is_the_same_run(tmp_path):
    runs = [toy_trainer(tmp_path / name, ppo=FOUR_STEPS | EVALUATED) for name in "ab"]
    for trainer in runs:
        trainer.train()
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    other = weights(runs[1])
    assert all(torch.equal(value, other[name]) for name, value in weights(runs[0]).items())
    third = toy_trainer(tmp_path / "c", ppo=FOUR_STEPS | EVALUATED | {"seed": 7})
    third.train()
    assert metrics_of(third) != metrics_of(runs[0])


class Killed(Exception):
    """Stands for kill -9."""


INTERRUPTIONS = [(shape, 2, 3) for shape in SHAPES] + [("full-separate", 2, 1), ("full-separate", None, 3)]


@pytest.mark.parametrize(("shape", "every", "dies_in"), INTERRUPTIONS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, shape, every, dies_in):
    adaptive = {"kl_target": 0.01, "kl_horizon": 40, "normalize_scores": True, "learning_rate": 1e-2}
    ppo = FOUR_STEPS | EVALUATED | adaptive | {"checkpoint_every": every}
    whole = toy_trainer(tmp_path / "whole", shape, ppo)
    whole.train()

    broken = toy_trainer(tmp_path / "broken", shape, ppo)
    update = broken.update

    def dies(*args):
        statistics = update(*args)
        if broken.ppo_step == dies_in:
            raise Killed
        return statistics

    monkeypatch.setattr(broken, "update", dies)
    with pytest.raises(Killed):
        broken.train()
    resumed = toy_trainer(tmp_path / "broken", shape, ppo)
    steps = []
    step = resumed.step
    monkeypatch.setattr(resumed, "step", lambda: steps.append(resumed.ppo_step) or step())
    resumed.train()
    assert steps == list(range(2 if (every, dies_in) == (2, 3) else 0, 4))  # no step runs twice
    assert metrics_of(resumed) == metrics_of(whole)
    samples = [rows_of(t.writer.directory / "samples.jsonl") for t in (whole, resumed)]
    assert samples[0] == samples[1]
    other = weights(resumed)
    assert all(torch.equal(value, other[name]) for name, value in weights(whole).items())
    assert resumed.state_dict() | {"last_metrics": 0} == whole.state_dict() | {"last_metrics": 0}
    best = [t.checkpointer.best_state(t) for t in (whole, resumed)]
    assert best[0].keys() == best[1].keys() and all(torch.equal(best[0][k], best[1][k]) for k in best[0])


def test_an_unfinished_checkpoint_is_not_loaded(tmp_path):
    ctx = toy_context(tmp_path, ppo=FOUR_STEPS | {"checkpoint_every": 1})
    trainer = trainer_of(ctx)
    trainer.train()
    before, whole = trainer.checkpointer.steps()  # older ones are gone
    assert (before.name, whole.name) == ("step_000003", "step_000004")
    whole.rename(whole.with_name("step_000004.tmp"))
    assert trainer_of(ctx).checkpointer.load(trainer)["ppo_step"] == 3
    (before / "checkpoint.json").unlink()
    assert trainer_of(ctx).checkpointer.load(trainer) is None


SAVE = Checkpointer.save


def save_and_die(checkpointer, trainer):
    SAVE(checkpointer, trainer)
    raise Killed


def test_an_interrupted_stage_resumes_through_run_stage(tmp_path, monkeypatch):
    """The stage finds its own checkpoints, and the artifact is the one of an uninterrupted run."""
    artifacts = {}
    for name in ("whole", "broken"):
        root = tmp_path / name
        root.mkdir()
        build_artifacts(root, lora=False)
        recipe = build_recipe(root, ppo=FOUR_STEPS | EVALUATED | {"checkpoint_every": 2})
        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(Checkpointer, "save", save_and_die)
                run_stage(ppo_stage.STAGE, recipe, root, "toy")
            assert not (root / "toy" / "ppo").exists() and partial_dir(root / "toy" / "ppo").is_dir()
        artifacts[name] = run_stage(ppo_stage.STAGE, recipe, root, "toy")
    files = [artifacts[name].manifest["files"] for name in ("whole", "broken")]
    assert files[0].keys() == files[1].keys()
    for name in ("model/model.safetensors", "critic/model.safetensors", "samples.jsonl"):
        assert files[0][name] == files[1][name]


def test_running_out_of_prompts_for_evaluation_is_no_error(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=EVALUATED | {"eval_prompts": 64})  # the split has 6
    trainer.train()
    assert len(trainer.eval_prompts.ids) == 6
    assert json.dumps(metrics_of(trainer)[-1]["eval/scores"])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_critic_has_a_learning_rate_of_its_own(tmp_path, shape):
    ppo = {"total_episodes": 8, "num_ppo_epochs": 2, "learning_rate": 1e-9, "critic_learning_rate": 1e-2}
    trainer = trainer_of(toy_context(tmp_path, shape, ppo))
    before = weights(trainer)
    trainer.step()
    trainer.ppo_step += 1
    moved = {name: float((value - before[name]).abs().max()) for name, value in weights(trainer).items()}
    critic = {name for name in moved if of_critic(name)}
    assert critic and all(moved[name] < 1e-6 for name in set(moved) - critic)
    assert max(moved[name] for name in critic) > 1e-3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [
        pytest.approx(rate * 5 / 8)
        for rate in (1e-9, 1e-2)  # the last of its steps, of twice as many
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_with_two_learning_rates_resumes_exactly(tmp_path, shape):
    ppo = {"total_episodes": 16, "learning_rate": 1e-2, "critic_learning_rate": 3e-2, "checkpoint_every": 2}
    whole = trainer_of(toy_context(tmp_path / "whole", shape, ppo))
    whole.train()
    broken = trainer_of(toy_context(tmp_path / "broken", shape, ppo))
    step = broken.step

    def dies():
        if broken.ppo_step == 3:
            raise KeyboardInterrupt
        return step()

    broken.step = dies
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(toy_context(tmp_path / "broken", shape, ppo))
    resumed.train()
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())
