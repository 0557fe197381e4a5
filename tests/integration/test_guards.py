"""NaN and infinity do no harm: the update is not applied, its batch is kept, too many of them end the run."""

import json
import logging
import math
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import UserError
from rlhf.ppo.guards import bad_update, not_finite
from rlhf.ppo.kl_control import AdaptiveKL
from tests.integration.test_two_processes import TORCHRUN
from tests.ppo_toys import first_rollout, rows_of, toy_context, toy_trainer, weights

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"rollout_batch_size": 4, "mini_batch_size": 2, "num_ppo_epochs": 2, "learning_rate": 1e-2}
NAN, INF = math.nan, math.inf


def adam(trainer):
    """A copy of the optimiser's state, tensors by (parameter, name)."""
    state = trainer.optimizer.state_dict()["state"]
    return {(i, name): value.clone() for i, part in state.items() for name, value in part.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def poison(trainer, name, value, steps, entry=0):
    """From the given ppo_steps (from 1) on, put `value` into one entry of `name` of the rollout."""
    score = trainer.score

    def poisoned(rollout, update):
        score(rollout, update)
        if update and trainer.ppo_step + 1 in steps:
            if name == "scores":
                rollout.scores[entry] = value
            else:
                spoil_forward(trainer, name, value)

    trainer.score = poisoned


def spoil_forward(trainer, name, value):
    """Let the next forward of the rollout give one bad `values`, `logprobs` or `ref_logprobs`."""
    if name == "ref_logprobs":
        reference = trainer.reference

        def bad_reference(*batch):
            trainer.reference = reference
            return reference(*batch) * value

        trainer.reference = bad_reference
        return

    def bad(module, args, kwargs, out):
        handle.remove()
        setattr(out, name, getattr(out, name) * value)
        return out

    handle = trainer.model.register_forward_hook(bad, with_kwargs=True)


def spoil_loss(trainer, monkeypatch, value, calls):
    """Multiply the loss of the given calls of `_losses` (from 0)."""
    losses, seen = trainer._losses, []

    def bad(*args):
        loss, parts = losses(*args)
        seen.append(None)
        return (loss * value, parts * value) if len(seen) - 1 in calls else (loss, parts)

    monkeypatch.setattr(trainer, "_losses", bad)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["scores", "values", "logprobs", "ref_logprobs"])
def test_a_rollout_with_one_bad_number_is_not_trained_on(tmp_path, caplog, name, value):
    trainer = toy_trainer(tmp_path, ppo=SIZES | {"total_episodes": 12, "normalize_scores": True, "kl_target": 1.0})
    assert isinstance(trainer.kl_controller, AdaptiveKL)
    trainer.step()
    trainer.ppo_step = 1
    before, moments, coefficient = weights(trainer), adam(trainer), trainer.kl_controller.kl_coef
    poison(trainer, name, value, {2})
    with caplog.at_level(logging.WARNING):
        metrics, _ = trainer.step()
    assert equal(weights(trainer), before) and equal(adam(trainer), moments)
    assert math.isfinite(trainer.kl_controller.kl_coef) and math.isfinite(trainer.running.mean)
    assert "logprobs" not in name or trainer.kl_controller.kl_coef == coefficient
    assert metrics["policy/bad_updates"] == 1 and metrics["optimizer_step"] == 4
    (line,) = [record.getMessage() for record in caplog.records if "not applied" in record.getMessage()]
    assert name in line and "ppo_step 2" in line and "bad_batches" in line
    trainer.ppo_step = 2
    trainer.step()
    assert not equal(weights(trainer), before)  # and the next one is trained on


@pytest.mark.parametrize("value", [NAN, INF])
def test_one_bad_mini_batch_is_left_out_and_the_others_are_applied(tmp_path, monkeypatch, value):
    trainer = toy_trainer(tmp_path, ppo=SIZES | {"total_episodes": 4, "max_tokens_per_micro_batch": 4096})
    spoil_loss(trainer, monkeypatch, value, calls={1})
    states = []
    skip = trainer._skip
    monkeypatch.setattr(trainer, "_skip", lambda *args: (states.append((weights(trainer), adam(trainer))), skip(*args)))
    taken = []
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (step(), taken.append((weights(trainer), adam(trainer)))))
    metrics, _ = trainer.step()
    assert len(taken) == 3 and metrics["optimizer_step"] == 3 and metrics["policy/bad_updates"] == 1
    ((after_skip, moments),) = states
    assert equal(after_skip, taken[0][0]) and equal(moments, taken[0][1])
    assert all(math.isfinite(metrics[key]) for key in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm"))


def test_an_infinite_gradient_under_a_finite_loss_is_not_applied(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=SIZES | {"max_bad_updates": 10, "calibrate_critic": False})
    first = next(parameter for parameter in trainer.parameters if parameter.requires_grad)
    first.register_hook(lambda gradient: gradient + INF)
    before = weights(trainer)
    metrics, _ = trainer.step()
    assert equal(weights(trainer), before) and adam(trainer) == {}
    assert metrics["policy/bad_updates"] == 4 and math.isfinite(metrics["loss/policy_avg"])


def test_the_batch_is_kept_without_pickle(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, ppo=SIZES)
    rollout = first_rollout(trainer)
    poison(trainer, "scores", NAN, {1}, entry=2)
    trainer.step()
    folder = trainer.writer.directory / "bad_batches"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001_01.json", "step_000001_01.safetensors"]
    tensors = load_file(folder / "step_000001_01.safetensors")
    assert torch.equal(tensors["response_ids"], rollout.response_ids) and tensors["advantages"].shape == (4, 8)
    assert torch.equal(tensors["logprobs"], rollout.logprobs) and {"scores/reward", "returns"} <= set(tensors)
    facts = json.loads((folder / "step_000001_01.json").read_text())
    assert facts["not_finite"] == {"scores": 1} and facts["rows_not_finite"]["scores"] == [2]
    assert [text["response"] for text in facts["texts"]] == rollout.responses


def test_too_many_end_the_run_and_the_checkpoint_before_them_stays(tmp_path):
    ppo = SIZES | {"total_episodes": 40, "checkpoint_every": 1, "max_bad_updates": 2}
    trainer = toy_trainer(tmp_path, ppo=ppo)
    poison(trainer, "scores", NAN, set(range(4, 11)))
    kept = {}
    save = trainer.checkpointer.save
    trainer.checkpointer.save = lambda t: (save(t), kept.update({t.ppo_step: weights(t)}))
    with pytest.raises(UserError, match="max_bad_updates is 2") as error:
        trainer.train()
    assert "\n" not in str(error.value) and "ppo_step 6" in str(error.value)
    assert [row["policy/bad_updates"] for row in rows_of(trainer.writer.directory / "metrics.jsonl")] == [0] * 3 + [
        *(1, 2, 3)
    ]
    assert trainer.checkpointer.steps()[-1].name == "step_000003"
    again = toy_trainer(tmp_path, ppo=ppo)
    again.restore()
    assert again.ppo_step == 3 and again.bad_updates.count == 0 and equal(weights(again), kept[3])


def test_without_a_checkpoint_the_weights_from_before_become_one(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=SIZES | {"total_episodes": 40, "max_bad_updates": 0})
    poison(trainer, "scores", INF, {1})
    before = weights(trainer)
    with pytest.raises(UserError, match="max_bad_updates"):
        trainer.train()
    again = toy_trainer(tmp_path, ppo=SIZES | {"total_episodes": 40, "max_bad_updates": 0})
    again.restore()
    assert again.ppo_step == 1 and again.bad_updates.count == 1 and equal(weights(again), before)


def test_a_bad_evaluation_is_never_the_best(tmp_path):
    trainer = toy_trainer(tmp_path, ppo=SIZES | {"eval_every": 1})
    trainer._keep_best({"eval/rlhf_reward": NAN})
    assert trainer.best is None
    trainer._keep_best({"eval/rlhf_reward": -3.0})
    trainer._keep_best({"eval/rlhf_reward": NAN})
    assert trainer.best == (-3.0, 0)


def test_what_is_not_finite():
    values = {"a": torch.tensor([1.0, NAN, INF]), "b": torch.ones(2), "c": -INF, "d": 0.5}
    assert not_finite(values) == {"a": 2, "c": 1}


def test_an_overflowing_ratio_alone_is_no_harm():
    fine = dict.fromkeys(("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/grad_norm"), 1.0)
    assert bad_update(fine | {"val/ratio": INF}) == {}
    assert bad_update(fine | {"loss/value_avg": NAN}) == {"loss/value_avg": 1}


# ----------------------------------------------------------------------------------------- alerts and reward functions
def test_an_alert_may_end_the_run(tmp_path, monkeypatch):
    ppo = SIZES | {"total_episodes": 40, "alerts": {"stop": ["eos_rate"]}}
    trainer = toy_trainer(tmp_path, ppo=ppo)
    rollout = trainer.rollout

    def never_ends(prompts, stream, step):
        made = rollout(prompts, stream, step)
        made.finished[:] = step == 0
        return made

    monkeypatch.setattr(trainer, "rollout", never_ends)
    trainer.train()
    rows = rows_of(trainer.writer.directory / "metrics.jsonl")
    assert [row["alerts/eos_rate"] for row in rows] == [0, 0, 0, 0, 1]  # 0.8 ** 4 is the first below one half
    assert trainer.stopped.startswith("alerts/eos_rate fired") and trainer.alerts.begun["eos_rate"] == 5
    again = toy_trainer(tmp_path, ppo=ppo)
    again.restore()
    assert again.alerts.state_dict() == trainer.alerts.state_dict() and again.stopped == trainer.stopped


@pytest.mark.parametrize("how", ["sum", "mean", "min"])
def test_a_source_of_weight_0_is_measured_and_changes_nothing(tmp_path, how):
    rewards = [{"artifact": "reward"}]
    judge = {"function": "tests.ppo_toys:length_in_words", "weight": 0.0}
    plain = toy_trainer(tmp_path, ppo=SIZES | {"reward_aggregation": how, "rewards": rewards})
    judged = toy_trainer(tmp_path, ppo=SIZES | {"reward_aggregation": how, "rewards": [judge, *rewards]})
    one, (other, rollout) = plain.step()[0], judged.step()
    assert equal(weights(plain), weights(judged)) and one["objective/scores"] == other["objective/scores"]
    lengths = [float(len(text.split())) for text in rollout.responses]
    assert other["objective/scores/length_in_words"] == pytest.approx(sum(lengths) / 4)
    mean, std = judged._judges(rollout)["length_in_words"]
    assert (mean, std) == (pytest.approx(sum(lengths) / 4), pytest.approx(spread(lengths)))


def spread(values):
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ("raise", "raised ZeroDivisionError: division by zero (test_guards.py line"),
        ("hang", "no answer within 0.3 seconds, 4 prompts, the first is 'the film"),
        ([0.0, 0.0, math.nan, 0.0], "value 2 is nan, for prompt 'the film"),
        ([0.0], "returned 1 values for 4 prompts"),
        ("text", "returned a str for 4 prompts, the first is 'the film"),
    ],
)
def test_a_reward_function_that_fails_leaves_the_checkpoint_before_it(tmp_path, returned, line):
    ppo = {"critic_init": "sft", "rewards": [{"function": "tests.ppo_toys:share_of_e"}], "checkpoint_every": 1}
    trainer = toy_trainer(tmp_path, ppo=SIZES | ppo | {"total_episodes": 16, "reward_timeout": 0.3})

    def fails_in_step_3(prompts, responses):
        if trainer.ppo_step < 2:
            return [0.0] * len(prompts)
        if returned == "raise":
            return [1 / 0]
        return time.sleep(60) if returned == "hang" else returned

    trainer.rewards[0].function = fails_in_step_3
    with pytest.raises(UserError) as error:
        trainer.train()
    assert line in str(error.value) and "fails_in_step_3" in str(error.value) and "\n" not in str(error.value)
    assert trainer.checkpointer.steps()[-1].name == "step_000002"


# ------------------------------------------------------------------------------------------------------- two processes
WORKER = """
import sys
import time
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pipelines.cli import leave, leave_group
from rlhf.errors import UserError
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.rewards import FunctionScore
from rlhf.recipe import load_recipe
from rlhf.stage import StageContext, load_inputs
from tests.ppo_toys import first_rollout, trainer_of, weights

torch.set_num_threads(1)
state, root = PartialState(cpu=True), Path(sys.argv[1])
ctx = StageContext(ppo_stage.STAGE, load_recipe(str(root / "toy.yaml")), root, "toy")
load_inputs(ctx)
trainer = trainer_of(ctx)
losses, seen = trainer._losses, []

def bad(*args):
    loss, parts = losses(*args)
    seen.append(None)
    return (loss * float("nan"), parts) if state.process_index == 1 and len(seen) == 2 else (loss, parts)

trainer._losses = bad
metrics, _ = trainer.step()
same = gather_object([{name: value.double().sum().item() for name, value in weights(trainer).items()}])

def fails_on_one(prompts, responses):
    if state.process_index == 1:
        raise KeyError("no such answer")
    return [0.0] * len(prompts)

trainer.rewards = [FunctionScore("rule", 1.0, fails_on_one)]
try:
    first_rollout(trainer)
    said = ["nothing"]
except UserError as error:
    said = [str(error)]
said = gather_object(said)
if state.is_main_process:
    print("skipped", metrics["policy/bad_updates"], "equal", same[0] == same[1])
    print("finite", all(v == v for v in same[0].values()))
    print("said", said[0] == said[1], said[0])
leave_group()
leave(0)
"""


def test_one_bad_rank_is_answered_by_all(tmp_path):
    """Rank 1 alone has a NaN in the loss of one micro-batch, and then a reward function that raises."""
    toy_context(tmp_path, ppo=SIZES | {"max_bad_updates": 9})
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = [*TORCHRUN, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "skipped 1 equal True" in done.stdout and "finite True" in done.stdout, done.stdout
    assert re.search(r"said True function .*fails_on_one: raised KeyError: 'no such answer' \(worker.py", done.stdout)
