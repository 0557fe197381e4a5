"""Kill -9 at random moments of every stage, start again, and compare with a run that nobody disturbed.

    python benchmarks/crash_test.py --kills 20 --processes 1
    python benchmarks/crash_test.py --kills 10 --processes 2 --signal SIGTERM

With SIGTERM or SIGINT, one rank is asked to stop; a training stage must save and end with exit code 143 or 130.

Every stage of a recipe of a few thousand weights is run once undisturbed. Then each is killed: half the kills at a
random time, half while something is being written (a `.tmp` name, a checkpoint without its seal, a model, a manifest).
The same command is run again until the stage is done. Its model files (sha256), rows of metrics.jsonl and
samples.jsonl, and what the manifest says it measured, must be those of the undisturbed run. Exit code 0 means that no
run diverged.

Stages run as forks of this process, which has imported everything once: an attempt costs no import.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from pipelines import cli
from rlhf.artifacts import PAYLOAD, Artifact, read_jsonl
from rlhf.checkpoints import SEAL

MODULES = {
    "pretrain": "rlhf.pretrain",
    "sft": "rlhf.sft",
    "reward": "rlhf.reward.train",
    "ppo": "rlhf.ppo.stage",
    "evaluate": "rlhf.evaluation.stage",
}
# Intervals that do not divide each other: rows, evaluations and checkpoints fall on different steps.
TRAINER = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 3, "save_steps": 5}
RECIPE: dict[str, Any] = {
    "name": "crash",
    "pretrain": {
        "architecture": {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "block_size": 32,
        "trainer": TRAINER | {"max_steps": 98},
    },
    "sft": {
        "max_length": 48,
        "eos_prompts": 8,
        "trainer": TRAINER | {"num_train_epochs": 5, "eval_strategy": "epoch"},
    },
    "reward": {
        "max_length": 48,
        "normalize_samples": 16,
        "trainer": TRAINER | {"num_train_epochs": 5, "eval_strategy": "steps", "eval_steps": 7},
    },
    "ppo": {
        "total_episodes": 160,
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "num_ppo_epochs": 2,
        "max_prompt_length": 24,
        "response_length": 12,
        "max_tokens_per_micro_batch": 256,
        "learning_rate": 3e-3,
        "kl_target": 0.5,
        "kl_horizon": 200,
        "normalize_scores": True,
        "eval_every": 3,
        "eval_prompts": 8,
        "checkpoint_every": 2,
        "sample_every": 4,
        "ignore_reward_gate": True,  # the longer of two made-up answers is the better one: its report says so
    },
    "evaluate": {"prompts": 16, "bootstrap": 200, "judges": [{"name": "vader", "vader": True}]},
    "hardware": {"device": "cpu"},
    "logging": {"report_to": [], "samples": 3},
}
WORDS = ("the", "a", "film", "plot", "is", "was", "dull", "bright", "slow", "warm", "great", "bad", "never", "and")


@dataclass
class Tally:
    """What happened to one stage."""

    stage: str
    seconds: float
    kills: int = 0
    writing: int = 0
    starts: int = 0
    continued: int = 0
    runs: int = 0
    divergences: list[str] = field(default_factory=list)


def write_inputs(directory: Path) -> Path:
    """Data recipes with made-up reviews and the recipe of all stages; returns its path."""
    numbers = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(numbers.choices(WORDS, k=numbers.randint(least, most)))

    rows: dict[str, list[dict[str, str]]] = {
        "text": [{"text": text(8, 20)} for _ in range(300)],
        "prompt_completion": [{"prompt": text(3, 6), "completion": " " + text(2, 6)} for _ in range(120)],
        "preference": [
            {"prompt": text(3, 6), "chosen": " " + text(4, 6), "rejected": " " + text(1, 3)} for _ in range(120)
        ],
        "prompts": [{"prompt": text(3, 6)} for _ in range(100)],
    }
    for form, made in rows.items():
        file = directory / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        split = {"by": "row", "rows": {"train": 60, "validation": 20, "test": 20}}
        if form == "text":
            split["rows"] = {"train": 280, "validation": 10, "test": 10}
        data = {"name": form, "source": {"files": str(file)}, "format": form, "split": split, "clean": []}
        (directory / f"{form}.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    named = {"pretrain": ["text"], "sft": "prompt_completion", "reward": "preference", "ppo": "prompts"}
    recipe = json.loads(json.dumps(RECIPE))
    for stage, name in named.items():
        paths = [str(directory / f"{part}.yaml") for part in (name if isinstance(name, list) else [name])]
        recipe[stage]["data"] = paths if isinstance(name, list) else paths[0]
    path = directory / "crash.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Attempt:
    """One start of a stage: a fork per rank."""

    def __init__(self, stage: str, command: list[str], log: Path, processes: int) -> None:
        port = free_port()
        self.log, self.printed = log, len(log.read_text(encoding="utf-8")) if log.exists() else 0
        self.pids = [self._fork(stage, command, rank, processes, port) for rank in range(processes)]
        self.codes: dict[int, int] = {}

    def _fork(self, stage: str, command: list[str], rank: int, processes: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout.reconfigure(line_buffering=True)  # what it said before it was killed counts
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            code = cli.main(stage, MODULES[stage], command)
        finally:
            os._exit(code)

    def running(self) -> bool:
        """Whether a rank still runs. A rank that failed ends the attempt."""
        for pid in self.pids:
            if pid not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(ended[1])
        return len(self.codes) < len(self.pids) and not any(self.codes.values())

    def ask(self, number: int, rank: int) -> None:
        """Send `number` to one rank; what has not ended by itself a while later is killed.

        Raises:
            SystemExit: an exit code or a message that is not what a stopped stage says.
        """
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)
        begun = time.monotonic()
        while len(self.codes) < len(self.pids) and time.monotonic() - begun < 60:
            self.running()
            if self.codes.get(self.pids[rank]) and not self.saved():
                break  # it was not training: a launcher would end the other ranks now
            time.sleep(0.005)
        codes = [self.codes.get(pid) for pid in self.pids]
        right = {128 + number, -number, 0}  # -number: before the handler stood or after it went; 0: just finished
        if (self.saved() and set(codes) != {128 + number}) or codes[rank] not in right or "Traceback" in self.said():
            raise SystemExit(
                f"{signal.Signals(number).name} to rank {rank}: exit codes {codes}:\n{self.said()[-3000:]}"
            )
        self.kill()

    def said(self) -> str:
        """What this attempt printed."""
        return self.log.read_text(encoding="utf-8")[self.printed :]

    def saved(self) -> bool:
        """Whether it says that it saved before it stopped."""
        return "saved: run the same command again to continue" in self.said()

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            if pid not in self.codes:
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def being_written(partial: Path) -> bool:
    """Whether something below `partial` is half there."""
    try:
        if (partial / "manifest.json").exists():
            return True
        checkpoints = partial / "checkpoints"
        names = (*partial.iterdir(), *(checkpoints.iterdir() if checkpoints.is_dir() else ()))
        return any(
            path.suffix == ".tmp"
            or path.name in ("model", "critic", "report.md")
            or (path.name.startswith("checkpoint-") and not (path / SEAL).exists())
            for path in names
        )
    except FileNotFoundError:
        return False


def disturb(
    attempt: Attempt, partial: Path, seconds: float, numbers: random.Random, number: signal.Signals
) -> str | None:
    """Kill an attempt somewhere; returns where ("time" or "write"), None when it ended before."""
    on_write = numbers.random() < 0.5
    begun, after = time.monotonic(), numbers.uniform(0, seconds)
    while attempt.running():
        late = time.monotonic() - begun > after
        writes = late and on_write and being_written(partial)
        if writes:
            time.sleep(numbers.choice((0, 0, 0.001, 0.003)))
        if writes or (late and not on_write):
            if number == signal.SIGKILL:
                attempt.kill()
            else:
                attempt.ask(number, numbers.randrange(len(attempt.pids)))
            return "write" if writes else "time"
        time.sleep(0.0005)
    attempt.kill()  # what is left of an attempt that failed
    return None


def essence(artifact: Artifact) -> dict[str, Any]:
    """What must be equal: model files by sha256, logged rows and samples, measurements; nothing of the clock."""
    files = {name: digest for name, digest in artifact.manifest["files"].items() if name.startswith(PAYLOAD)}
    rows = [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_jsonl(artifact.path / "metrics.jsonl")
    ]
    measured = {key: artifact.manifest.get(key) for key in ("metrics", "reward_statistics", "comparison", "continued")}
    samples = read_jsonl(artifact.path / "samples.jsonl")
    return files | measured | {"hash": artifact.hash, "metrics.jsonl": rows, "samples.jsonl": samples}


def compare(whole: Artifact, other: Artifact) -> list[str]:
    """Names of what differs."""
    other.verify()
    first, second = essence(whole), essence(other)
    return [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]


class Crashes:
    """The undisturbed run, and the disturbed ones beside it."""

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        self.directory, self.arguments = directory, arguments
        self.recipe = write_inputs(directory)
        self.root, self.whole = directory / "root", directory / "whole"  # all run at one path: adapters name their base
        self.numbers = random.Random(arguments.seed)
        self.stages = list(MODULES)[: max(list(MODULES).index(stage) for stage in arguments.stages) + 1]

    def start(self, stage: str, root: Path) -> Attempt:
        """An attempt at `stage` below `root`; its output goes to `stage.log` there."""
        command = ["--recipe", str(self.recipe), "--artifacts", str(root), *self.arguments.overrides]
        root.mkdir(parents=True, exist_ok=True)
        return Attempt(stage, command, root / f"{stage}.log", self.arguments.processes)

    def undisturbed(self) -> dict[str, float]:
        """Seconds of each stage."""
        seconds = {}
        for stage in self.stages:
            begun = time.monotonic()
            attempt = self.start(stage, self.root)
            while attempt.running():
                time.sleep(0.01)
            self.expect_success(attempt)
            seconds[stage] = time.monotonic() - begun
        self.root.rename(self.whole)
        return seconds

    def expect_success(self, attempt: Attempt) -> None:
        """End the test where an attempt failed by itself."""
        if any(attempt.codes.values()):
            attempt.kill()
            raise SystemExit(f"exit codes {list(attempt.codes.values())}:\n{attempt.log.read_text()[-3000:]}")

    def crash(self, stage: str, seconds: float) -> Tally:
        """Disturbed runs of one stage until there were enough kills."""
        tally = Tally(stage, seconds)
        while tally.kills < self.arguments.kills:
            for before in self.stages[: self.stages.index(stage)]:
                shutil.copytree(self.whole / "crash" / before, self.root / "crash" / before)
            self.disturbed_run(stage, self.root, tally)
            tally.runs += 1
            one, other = (Artifact.load(root / "crash" / stage) for root in (self.whole, self.root))
            different = compare(one, other)
            if different:
                kept = self.root.rename(self.directory / f"{stage}-{tally.runs}")
                tally.divergences.append(f"{kept}: {', '.join(different)}")
            else:
                shutil.rmtree(self.root)
        return tally

    def disturbed_run(self, stage: str, root: Path, tally: Tally) -> None:
        """Kill and start again until the stage is done; at most six kills a run, or it might never end."""
        for kills in range(7):
            attempt = self.start(stage, root)
            tally.starts += 1
            enough = kills == 6 or tally.kills >= self.arguments.kills
            span = float("inf") if enough else tally.seconds / (1 + 2 * self.numbers.random())
            where = None
            if enough:
                while attempt.running():
                    time.sleep(0.01)
            else:
                partial = root / "crash" / f"{stage}.partial"
                where = disturb(attempt, partial, span, self.numbers, signal.Signals[self.arguments.signal])
            if where is None:
                self.expect_success(attempt)
                break
            tally.kills += 1
            tally.writing += where == "write"
        tally.continued += (root / f"{stage}.log").read_text().count("continuing ")


def show(tallies: list[Tally], processes: int) -> None:
    """The table."""
    print(f"\n{processes} process(es)\n")
    print("| stage | seconds | runs | kills | while writing | starts | continued from a checkpoint | divergences |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for t in tallies:
        print(
            f"| {t.stage} | {t.seconds:.1f} | {t.runs} | {t.kills} | {t.writing} | {t.starts} | {t.continued} "
            f"| {len(t.divergences)} |"
        )
    for t in tallies:
        for line in t.divergences:
            print(f"DIVERGED {t.stage}: {line}")


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per stage")
    parser.add_argument("--stages", default=",".join(MODULES), type=lambda text: text.split(","))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as peft.r=4")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run and report; 1 where something diverged."""
    arguments = parse()
    torch.set_num_threads(1)
    for module in MODULES.values():
        importlib.import_module(module)
    directory = arguments.dir or Path(tempfile.mkdtemp(prefix="crash-"))
    directory.mkdir(parents=True, exist_ok=True)
    crashes = Crashes(directory, arguments)
    seconds = crashes.undisturbed()
    tallies = []
    for stage in arguments.stages:
        tallies.append(crashes.crash(stage, seconds[stage]))
        print(f"{stage}: {tallies[-1].kills} kills, {len(tallies[-1].divergences)} divergences", flush=True)
    show(tallies, arguments.processes)
    diverged = any(tally.divergences for tally in tallies)
    if not diverged and arguments.dir is None:
        shutil.rmtree(directory)
    return int(diverged)


if __name__ == "__main__":
    sys.exit(main())
