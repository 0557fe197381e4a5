"""What docs/reliability.md promises of resuming: signals, damage, a full disk, another environment, kill -9."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import sft, trainers
from rlhf.artifacts import Artifact, partial_dir, write_json
from rlhf.checkpoints import SEAL
from rlhf.errors import UserError
from rlhf.interrupt import Interrupted
from rlhf.ppo import checkpoint as ppo_checkpoint
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo import trainer as ppo_trainer
from rlhf.reward import train as reward
from rlhf.stage import run_stage
from tests.builders import build_model, build_recipe, build_tokenizer
from tests.ppo_toys import PEFT, build_artifacts, rows_of

ROOT = Path(__file__).resolve().parents[2]
SFT = {"eval_split": "validation", "eos_prompts": 4}
# 12 rows, 2 a step: 6 steps an epoch. Rows, evaluations and checkpoints fall on different steps.
TRAINER = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 3,
    "save_steps": 2,
    "eval_strategy": "epoch",
}
PPO = {
    "total_episodes": 20,
    "learning_rate": 1e-2,
    "checkpoint_every": 1,
    "eval_every": 2,
    "eval_prompts": 4,
    "kl_target": 0.01,
    "kl_horizon": 40,
    "normalize_scores": True,
}
STAGES = {
    "sft": (sft.STAGE, trainers),
    "sft-lora": (sft.STAGE, trainers),
    "sft-by-length": (sft.STAGE, trainers),
    "reward": (reward.STAGE, trainers),
    "ppo": (ppo_stage.STAGE, ppo_trainer),
}


class Case:
    """A stage on tiny inputs, below a folder of its own."""

    def __init__(self, name: str, root: Path) -> None:
        self.stage, self.module = STAGES[name]
        self.root, self.final = root, root / "toy" / self.stage.name
        root.mkdir(parents=True)
        peft = PEFT | {"stages": ["sft"]} if name == "sft-lora" else None
        if name == "ppo":
            build_artifacts(root, lora=False)
            self.recipe = build_recipe(root, ppo=PPO)
        elif name == "reward":
            build_artifacts(root, lora=False)
            shutil.rmtree(self.final)  # this one is made by the stage
            self.recipe = build_recipe(root, reward={"trainer": TRAINER, "baselines": False})
        else:
            tokenizer = build_tokenizer()
            build_model(tokenizer).save_pretrained(root / "base")
            tokenizer.save_pretrained(root / "base")
            order = {"train_sampling_strategy": "group_by_length"} if name == "sft-by-length" else {}
            self.recipe = build_recipe(root, peft=peft, sft=SFT | {"trainer": TRAINER | order})

    def run(self) -> Artifact:
        return run_stage(self.stage, self.recipe, self.root, "toy")

    def stop(self, monkeypatch, after: int) -> Interrupted:
        """Run until SIGTERM is noticed at the end of the step with that number."""
        asked = []

        def requested() -> int:
            asked.append(1)
            return signal.SIGTERM if len(asked) == after else 0

        with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
            patch.setattr(self.module, "requested", requested)
            self.run()
        assert len(asked) == after
        return stopped.value

    def checkpoints(self) -> list[str]:
        names = [path.name for path in (partial_dir(self.final) / "checkpoints").iterdir() if path.is_dir()]
        return sorted(name for name in names if not name.startswith("best"))


def essence(artifact: Artifact) -> dict:
    """What must not depend on an interruption."""
    files = {n: d for n, d in artifact.manifest["files"].items() if n.endswith(".safetensors") or n == "samples.jsonl"}
    assert "model/model.safetensors" in files
    return files | {"rows": rows_of(artifact.path / "metrics.jsonl"), "metrics": artifact.manifest["metrics"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Essence of an uninterrupted run by case, made once."""
    made: dict[str, dict] = {}

    def of(name: str) -> dict:
        if name not in made:
            made[name] = essence(Case(name, tmp_path_factory.mktemp("whole") / "root").run())
        return made[name]

    return of


# 5: between rows and checkpoints. 6: the end of an epoch, with its evaluation. 12: the last step.
STOPS = [("sft", 5), ("sft", 6), ("sft", 12), ("sft-lora", 5), ("sft-by-length", 8), ("reward", 8), ("ppo", 5)]


@pytest.mark.parametrize(("name", "step"), STOPS)
def test_sigterm_saves_and_the_next_run_ends_as_if_nothing_had_been(tmp_path, monkeypatch, whole, name, step):
    case = Case(name, tmp_path / "root")
    stopped = case.stop(monkeypatch, step)
    last = {"sft": 12, "reward": 12, "ppo": 5}[case.stage.name]
    assert stopped.number == signal.SIGTERM and f"step {step} of {last} is done and saved" in str(stopped)
    assert case.checkpoints()[-1] in (f"checkpoint-{step}", f"step_{step:06d}")
    assert essence(case.run()) == whole(name)


def test_rows_of_like_length_go_together_where_the_recipe_says_so(whole):
    assert whole("sft-by-length") != whole("sft")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "step", "file", "harm"),
    [
        ("sft", 5, "checkpoint-5/optimizer.pt", flip_a_bit),
        ("ppo", 4, "step_000004/rank_00000.pt", flip_a_bit),
        ("ppo", 4, "step_000004/trainer.json", lambda path: os.truncate(path, 10)),
        ("ppo", 4, "best_000004/weights.pt", flip_a_bit),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, monkeypatch, whole, caplog, name, step, file, harm
):
    case = Case(name, tmp_path / "root")
    case.stop(monkeypatch, step)
    directory = partial_dir(case.final) / "checkpoints"
    newest = case.checkpoints()[-1]
    if file.startswith("best"):  # whichever step that is
        best = json.loads((directory / newest / "trainer.json").read_text())["best"][1]
        file = f"best_{best:06d}/weights.pt"
    harm(directory / file)
    caplog.clear()
    artifact = case.run()
    said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert newest in said[0] and Path(file).name in said[0]
    assert len(said) == 1 or file.startswith("best")  # older checkpoints may name the same best step
    assert essence(artifact) == whole(name)


@pytest.mark.parametrize(
    ("name", "patched"), [("sft", "rlhf.trainers.seal"), ("ppo", "rlhf.ppo.checkpoint.torch.save")]
)
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, whole, name, patched):
    case = Case(name, tmp_path / "root")
    true, calls = (trainers.seal if name == "sft" else torch.save), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("write failed: No space left on device")
        return true(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(patched, full)
        case.run()
    assert error.value.errno == errno.ENOSPC
    assert case.checkpoints()
    assert essence(case.run()) == whole(name)


@pytest.mark.parametrize(("name", "refused"), [("sft", True), ("ppo", False)])
def test_another_number_of_processes(tmp_path, monkeypatch, caplog, name, refused):
    case = Case(name, tmp_path / "root")
    case.stop(monkeypatch, 3)
    path = partial_dir(case.final) / "checkpoints" / case.checkpoints()[-1]
    sealed = json.loads((path / SEAL).read_text())
    sealed["environment"]["processes"] = 2
    write_json(path / SEAL, sealed)
    if refused:
        with pytest.raises(UserError, match="processes 2 -> 1: run it with processes 2 again"):
            case.run()
        assert path.is_dir()
    else:
        assert case.run().manifest["continued"] == ["step_000003: processes 2 -> 1"]
        assert "no longer bit-equal" in caplog.text


def test_another_version_of_a_package_is_said_and_recorded(tmp_path, monkeypatch, caplog):
    case = Case("sft", tmp_path / "root")
    case.stop(monkeypatch, 3)
    path = partial_dir(case.final) / "checkpoints" / "checkpoint-3"
    sealed = json.loads((path / SEAL).read_text())
    current = sealed["environment"]["torch"]
    sealed["environment"]["torch"] = "1.0"
    write_json(path / SEAL, sealed)
    assert case.run().manifest["continued"] == [f'checkpoint-3: torch "1.0" -> "{current}"']
    assert f'torch "1.0" -> "{current}": no longer bit-equal' in caplog.text


def test_a_foreign_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """A pickle in the place of the state, sealed by whoever made it, is refused and does nothing."""
    case = Case("ppo", tmp_path / "root")
    case.stop(monkeypatch, 2)
    path = partial_dir(case.final) / "checkpoints" / "step_000002"

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"weights": Harm()}, path / "rank_00000.pt")
    ppo_checkpoint.seal(path, json.loads((path / SEAL).read_text())["environment"])
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        case.run()
    assert not (tmp_path / "harmed").exists()


def crash_test(tmp_path: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "crash_test.py"), "--dir", str(tmp_path / "crash"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    shutil.rmtree(tmp_path / "crash", ignore_errors=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_kill_9(tmp_path):
    """Few kills; `benchmarks/crash_test.py` is the long one."""
    said = crash_test(tmp_path, "--kills", "2", "--stages", "sft,ppo")
    assert "sft: 2 kills, 0 divergences" in said and "ppo: 2 kills, 0 divergences" in said


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--processes", "1"), ("--processes", "2"), ("peft.r=4",)], ids=" ".join)
def test_kill_9_in_every_stage(tmp_path, arguments):
    said = crash_test(tmp_path, "--kills", "5", *arguments)
    assert said.count("5 kills, 0 divergences") == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_in_every_stage(tmp_path, name):
    said = crash_test(tmp_path, "--kills", "3", "--processes", "2", "--signal", name)
    assert said.count("3 kills, 0 divergences") == 5
