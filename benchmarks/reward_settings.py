"""What helps a reward model: one thing changed at a time, the same folds for all, one table.

    export RLHF_DATA=/folder/of/the/data
    make convert RECIPE=smollm2
    python -m benchmarks.reward_settings --base bases/smollm2 --workdir settings --gpus 0 1
    python -m benchmarks.reward_settings --base bases/smollm2 --workdir settings --gpus 0 1 --minutes 9     # in pieces
    python -m benchmarks.reward_settings --base bases/smollm2 --workdir settings \
      trainer.per_device_train_batch_size=8 trainer.gradient_accumulation_steps=4         # a card with less memory

Every setting is a call of `benchmarks.reward_cv` on one fold, alone on its GPU. What is finished is not run again, and
with `--minutes` none begins that could not end in time (`--each`, and three times that for three models). The table
compares each with the first, pair by pair; `--publish` writes it into docs/results.md once all are finished. Overrides
are for all settings, but for what a setting changes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.reward_cv import compared, load_sets, publish_settings, settings_table

ROOT = Path(__file__).resolve().parent.parent
DATA = ["rmb_harmless_dev", "rmb_helpful_dev", "ukp_convarg1_dev", "hh_harmless_dev"]
CHAT = "--chat"
BASE = ["trainer.per_device_train_batch_size=32", "trainer.learning_rate=1e-4", "trainer.num_train_epochs=2"]
BASE += ["trainer.lr_scheduler_type=cosine", "trainer.warmup_steps=20"]
SETTINGS = {
    "as in the five folds": [],
    "the same once more": [],
    "LM loss on chosen answers, 0.1": ["lm_coef=0.1"],
    "length decorrelation, 1": ["length_decorrelation=1"],
    "answers to other prompts, half": ["mismatched=0.5"],
    "mean of three seeds": ["--members", "3"],
    "smoothed": ["loss=smoothed"],
    "robust": ["loss=robust"],
    "one epoch": ["trainer.num_train_epochs=1"],
    "three epochs": ["trainer.num_train_epochs=3"],
    "half the rate": ["trainer.learning_rate=5e-5"],
    "SFT first, one epoch": ["--sft-epochs", "1", "--sft-learning-rate", "5e-5"],
    "plain text": [],
}


def out_of(args: argparse.Namespace, label: str) -> Path:
    """The file of a setting."""
    return args.workdir / f"{label.replace(' ', '_').replace(',', '')}.json"


def command(args: argparse.Namespace, label: str) -> list[str]:
    """The call of reward_cv."""
    more = [] if label == "plain text" else [CHAT]
    more += ["--limit", str(args.limit)] if args.limit else []
    folders = ["--artifacts", str(args.artifacts), "--run", out_of(args, label).stem, "--out", str(out_of(args, label))]
    call = [sys.executable, "-m", "benchmarks.reward_cv", "--base", args.base, "--data", *args.data, *folders, *more]
    return [*call, "--only", str(args.fold), "--device", args.device, *BASE, *args.overrides, *SETTINGS[label]]


def finished(args: argparse.Namespace, label: str) -> bool:
    """Whether the fold is there.

    Raises:
        SystemExit: what is there came from another command.
    """
    path, told = out_of(args, label), told_of(args, label)
    if not path.is_file():
        return False
    if told.is_file() and told.read_text("utf-8") != shlex.join(command(args, label)[1:]):
        raise SystemExit(f"error: {told} holds another command than this one's: name another --workdir")
    return args.fold in {fold["fold"] for fold in json.loads(path.read_text("utf-8"))["folds"]}


def told_of(args: argparse.Namespace, label: str) -> Path:
    """The file with the command of a setting."""
    return out_of(args, label).with_suffix(".command")


def minutes_of(args: argparse.Namespace, label: str) -> float:
    """What a setting is taken to need."""
    more = SETTINGS[label]
    return args.each * (int(more[more.index("--members") + 1]) if "--members" in more else 1)


def run_all(args: argparse.Namespace) -> list[str]:
    """Run what is not finished, a process on each GPU; returns what failed."""
    waiting = [label for label in args.only or SETTINGS if not finished(args, label)]
    end = time.monotonic() + 60 * (args.minutes or float("inf"))
    failed, one = [], threading.Lock()

    def next_one() -> str | None:
        with one:
            fits = (label for label in waiting if time.monotonic() + 60 * minutes_of(args, label) < end)
            if (label := next(fits, None)) is not None:
                waiting.remove(label)
            return label

    def worker(gpu: str) -> None:
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        while (label := next_one()) is not None:
            told_of(args, label).write_text(shlex.join(command(args, label)[1:]), encoding="utf-8")
            with open(out_of(args, label).with_suffix(".log"), "w", encoding="utf-8") as log:
                done = subprocess.run(command(args, label), stdout=log, stderr=log, env=env, cwd=ROOT, check=False)
            print(
                f"{label}: {'done' if not done.returncode else f'failed, see {log.name}'}", file=sys.stderr, flush=True
            )
            if done.returncode:
                failed.append(label)

    with ThreadPoolExecutor(len(args.gpus)) as pool:
        list(pool.map(worker, args.gpus))
    return failed


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all settings, of the reward section, such as max_length=512")
    parser.add_argument("--base", required=True, help="folder of the model that the reward models start from")
    parser.add_argument("--workdir", type=Path, required=True, help="a file for each setting; kept, to go on from")
    parser.add_argument("--data", nargs="+", default=DATA, help="data recipes")
    parser.add_argument(
        "--only", nargs="+", choices=list(SETTINGS), metavar="SETTING", help="these alone; the first is compared with"
    )
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--gpus", nargs="+", default=[""], help="such as 0 1: a setting at a time on each")
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end in this time")
    parser.add_argument("--each", type=float, default=4.0, help="minutes that one reward model is taken to need")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="where cleaned data go")
    parser.add_argument("--limit", type=int, help="rows of each set, to try it")
    parser.add_argument(
        "--publish", action="store_true", help="write the table into docs/results.md, if none is missing"
    )
    args = parser.parse_intermixed_args()
    if args.publish and args.overrides:
        parser.error("--publish names the settings of the five folds: with others, publish with reward_cv --compare")
    return args


def main() -> None:
    """Measure, print, publish."""
    args = parse()
    args.workdir, args.artifacts = args.workdir.resolve(), args.artifacts.resolve()
    args.workdir.mkdir(parents=True, exist_ok=True)
    load_sets(args.data, args.artifacts, args.limit)  # cleaned once, before several processes want them
    failed = run_all(args)
    wanted = args.only or list(SETTINGS)
    there = [label for label in wanted if finished(args, label)]
    missing = [label for label in wanted if label not in there]
    if there and wanted[0] in there:
        print(settings_table(compared([(label, out_of(args, label)) for label in there])))
    if missing:
        raise SystemExit(f"not finished: {', '.join(missing)}" + (f" (failed: {', '.join(failed)})" if failed else ""))
    if args.publish:
        publish_settings([f"{label}={out_of(args, label)}" for label in there])


if __name__ == "__main__":
    main()
