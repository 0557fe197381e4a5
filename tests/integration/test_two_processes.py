"""One process and two (gloo, this machine): the same run of the same global batch; rank 0 alone writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.trainer import PPOTrainer
from rlhf.stage import run_stage
from tests.builders import build_recipe
from tests.ppo_toys import PEFT, build_artifacts, rows_of
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]
# A free port of its own: two launches at once (`make test JOBS=2`) cannot take each other's.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TORCHRUN += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1"]
PPO = {
    "total_episodes": 24,
    "rollout_batch_size": 8,
    "num_ppo_epochs": 2,
    "max_tokens_per_micro_batch": 20,  # about one row each, and an odd number of rows: ranks have uneven work
    "learning_rate": 3e-3,
    "eval_every": 2,
    "eval_prompts": 64,  # the split has 6
    "best_metric": None,  # publish the last step
    "checkpoint_every": 2,
    "sample_every": 1,
    "whiten_rewards": True,
    "normalize_scores": True,
    "rewards": [{"artifact": "reward"}, {"function": "tests.ppo_toys:share_of_e"}],
}


SHAPES = {"full-separate": 1, "lora-separate": 8}  # and the mini-batch size: with 1, one rank has a dummy every time


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Finished runs: `roots[shape, processes]` is the artifact directory. Both shapes share a launch: imports cost."""
    made = {(shape, count): tmp_path_factory.mktemp(f"{shape}-{count}") for shape in SHAPES for count in (1, 2)}
    for (shape, count), root in made.items():
        kind, critic = shape.split("-")
        ppo = PPO | {"critic": critic, "mini_batch_size": SHAPES[shape]}
        recipe = build_recipe(root, ppo=ppo, peft=PEFT if kind == "lora" else None)
        build_artifacts(root, lora=kind == "lora")
        if count == 1:
            with pytest.MonkeyPatch.context() as patch:
                record(patch, root, 0)
                run_stage(ppo_stage.STAGE, recipe, root, "toy")
    launch([root for (_, count), root in made.items() if count == 2])
    return made


def record(patch: pytest.MonkeyPatch, root: Path, rank: int) -> None:
    """Write each ppo_step's whitened advantages and each optimizer step's gradient to `root/trace_RANK.pt`."""
    trace: dict[str, list] = {"advantages": [], "gradients": []}
    update, clip = PPOTrainer.update, PPOTrainer._clip_gradients

    def spy_update(self, rollout, targets):
        trace["advantages"].append(targets.advantages.clone())
        statistics = update(self, rollout, targets)
        torch.save(trace, root / f"trace_{rank}.pt")
        return statistics

    def spy_clip(self):
        trace["gradients"].append([p.grad.clone() for p in self.parameters])
        return clip(self)

    patch.setattr(PPOTrainer, "update", spy_update)
    patch.setattr(PPOTrainer, "_clip_gradients", spy_clip)


def launch(roots: list[Path]) -> None:
    """The ppo stage below each root, one after the other, under `accelerate launch` with two CPU processes.

    `--multi_gpu` is accelerate's word for torchrun; with `--cpu` it would run one process and say nothing.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", str(Path(__file__)), *map(str, roots)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes write to one pipe: their lines may share a line.
    ranks = [json.loads(found) for found in re.findall(r'\{"rank".*?\}', done.stdout)]
    assert sorted(line["rank"] for line in ranks) == [0, 1]
    assert {line["processes"] for line in ranks} == {2}


@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_log_the_run_of_one(roots, shape):
    one, two = (rows_of(roots[shape, count] / "toy" / "ppo" / "metrics.jsonl") for count in (1, 2))
    assert [row["ppo_step"] for row in two] == [1, 2, 3]  # one row per step: rank 0 alone wrote
    for expected, row in zip(one, two, strict=True):
        assert row.keys() == expected.keys()
        for key in row:
            assert_close(row[key], expected[key], rtol=1e-3, atol=1e-4)
    samples = [rows_of(roots[shape, count] / "toy" / "ppo" / "samples.jsonl") for count in (1, 2)]
    assert [row["response_ids"] for row in samples[0]] == [row["response_ids"] for row in samples[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_the_advantages_and_gradients_of_one_process(roots, shape, rank):
    one, two = (torch.load(roots[shape, count] / f"trace_{rank * (count - 1)}.pt") for count in (1, 2))
    assert len(one["advantages"]) == 3 and len(one["gradients"]) == 3 * 2 * 8 // SHAPES[shape]
    for expected, advantages in zip(one["advantages"], two["advantages"], strict=True):
        assert_close(advantages, expected, rtol=1e-3, atol=1e-3)
    scale = max(float(gradient.abs().max()) for step in one["gradients"] for gradient in step)
    assert scale > 1e-2
    for expected, gradients in zip(one["gradients"], two["gradients"], strict=True):
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["model", "critic"])
def test_two_processes_end_with_the_weights_of_one(roots, shape, part):
    one, two = (load_file(roots[shape, count] / "toy" / "ppo" / part / "model.safetensors") for count in (1, 2))
    start = load_file(
        roots[shape, 1] / "toy" / ("sft" if part == "model" else "reward") / "model" / "model.safetensors"
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in one.items() if name in start)
    assert moved > 5e-3  # fifty times the tolerance


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_sharded_weights_give_the_same_forward_gradient_and_samples(tmp_path, critic):
    """FSDP2's `fully_shard` on gloo (Accelerate uses it on GPUs alone); ranks sample unlike numbers of prompts."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(ROOT / "tests" / "fsdp2_worker.py"), str(tmp_path), critic]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded equals whole") == 2


def main() -> None:
    """What each process of `launch` runs."""
    import accelerate

    from pipelines.cli import leave, leave_group
    from rlhf.recipe import load_recipe

    torch.set_num_threads(1)
    for root in map(Path, sys.argv[1:]):
        with pytest.MonkeyPatch.context() as patch:
            record(patch, root, int(os.environ["RANK"]))
            run_stage(ppo_stage.STAGE, load_recipe(str(root / "toy.yaml")), root, "toy")
    state = accelerate.PartialState()
    print(json.dumps({"rank": state.process_index, "processes": state.num_processes}), flush=True)
    leave_group()
    leave(0)


if __name__ == "__main__":
    main()
