"""Speed of PPO updates: TRL 1.12's PPOTrainer and ours, same weights, prompts and hyperparameters, in turn.

    make bench-env                                     # once: .venv-trl with TRL 1.12.0
    python -m benchmarks.ppo_vs_trl tiny --trl-python .venv-trl/bin/python
    python -m benchmarks.ppo_vs_trl 135m --device cuda --trl-python "env PYTHONPATH=/path/of/trl112 python3"

Each side is a process of its own with its own interpreter; it loads its models, and then the two take turns, one update
each, so that both see the same machine. Weights are random and drawn here, once, for both. Writes rows and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.start import ENVIRONMENT, Shape, finished_run_context, provenance, random_context, side_specs
from rlhf.recipe import load_recipe
from rlhf.stage import StageContext

MARK = "@@ "
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Workload:
    """Models, sizes of a rollout, and how many episodes TRL takes through one forward and backward."""

    shape: Shape
    ppo: dict[str, Any]
    trl_micro_batch: int


LLAMA_PPO = {
    "rollout_batch_size": 64,
    "mini_batch_size": 64,
    "response_length": 128,
    "num_ppo_epochs": 4,
    "missing_eos_penalty": None,
    "eval_every": None,
}
TINY_PPO = {
    "rollout_batch_size": 128,
    "mini_batch_size": 64,
    "response_length": 32,
    "num_ppo_epochs": 4,
    "max_tokens_per_micro_batch": 4096,
    "learning_rate": 3e-4,
    "eval_every": None,
}
SMALL = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
LARGE = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
SHRUNK = {"num_hidden_layers": 2, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
WORKLOADS = {
    # The tiny recipe's sizes with random weights, so that every response has full length; --run takes a real run.
    "tiny": Workload(
        Shape("gpt2", 4096, {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}, (3, 9)), TINY_PPO, 64
    ),
    "135m": Workload(
        Shape("llama", 49152, SMALL | {"intermediate_size": 1536}),
        LLAMA_PPO | {"max_tokens_per_micro_batch": 16384},
        64,
    ),
    "1.2b": Workload(
        Shape("llama", 128256, LARGE | {"intermediate_size": 8192}),
        LLAMA_PPO | {"max_tokens_per_micro_batch": 4096},
        16,
    ),
    # 135m's shape made small, to try the harness itself.
    "shrunk": Workload(
        Shape("llama", 512, SHRUNK | {"intermediate_size": 192}, (16, 16)),
        LLAMA_PPO | {"rollout_batch_size": 8, "mini_batch_size": 8, "response_length": 16},
        8,
    ),
}


class Side:
    """One process that does an update when told to."""

    def __init__(self, name: str, command: list[str], threads: int | None) -> None:
        env = os.environ | ENVIRONMENT
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=HERE.parent
        )

    def answer(self) -> dict[str, Any]:
        """The next line that is meant for us."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            print(f"[{self.name}] {line}", end="", file=sys.stderr)
        raise SystemExit(f"error: the {self.name} side ended with exit code {self.process.wait()}: see its messages")

    def step(self) -> dict[str, Any]:
        """One update."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """The end of its input ends it."""
        self.process.stdin.close()
        self.process.wait()


def context(args: argparse.Namespace, root: Path) -> tuple[StageContext, int]:
    """The ppo stage that is timed, and TRL's micro-batch."""
    workload = WORKLOADS[args.workload]
    episodes = workload.ppo["rollout_batch_size"] * (args.warmup + args.updates)
    overrides = [f"ppo.total_episodes={episodes}", "ppo.eval_every=null", *args.overrides]
    if args.run:
        recipe = load_recipe("tiny", [*overrides, f"hardware.device={args.device}", "logging.report_to=[]"])
        ctx = finished_run_context(root, Path(args.run), recipe)
    else:
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        ctx = random_context(root, workload.shape, workload.ppo, overrides, args.seed, dtype, args.device)
    return ctx, args.trl_micro_batch or workload.trl_micro_batch


def write_specs(args: argparse.Namespace, root: Path) -> dict[str, Path]:
    """What each side reads."""
    ctx, micro_batch = context(args, root)
    dtype = args.trl_dtype or ("bfloat16" if args.device == "cuda" else "float32")
    specs = side_specs(ctx, {"trl_micro_batch": micro_batch, "dtype": dtype, "device": args.device})
    paths = {name: root / f"{name}.json" for name in specs}
    for name, spec in specs.items():
        paths[name].write_text(json.dumps(spec), encoding="utf-8")
    return paths


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of every update of both sides, warm-up included; versions of each side's packages."""
    rows: list[dict[str, Any]] = []
    packages = {}
    with tempfile.TemporaryDirectory(dir=args.workdir) as directory:
        specs = write_specs(args, Path(directory))
        commands = {
            "trl": [*shlex.split(args.trl_python), str(HERE / "trl_side.py"), "time", str(specs["trl"])],
            "ours": [sys.executable, "-m", "benchmarks.our_side", "time", str(specs["ours"])],
        }
        groups = [[name] for name in args.sides] if args.apart else [list(args.sides)]
        for group in groups:
            sides = [Side(name, commands[name], args.threads) for name in group]
            for side in sides:
                packages[side.name] = side.answer().get("packages")  # ready
            for number in range(args.warmup + args.updates):
                for side in sides:
                    row = {"side": side.name, "update": number, "warmup": number < args.warmup} | side.step()
                    rows.append(row)
                    print(f"{side.name} update {number}: {row['seconds']:.2f} s", file=sys.stderr)
            for side in sides:
                side.close()
    return rows, packages


def summary(rows: list[dict[str, Any]], episodes: int) -> dict[str, dict[str, Any]]:
    """Medians per side over the updates that count; `first` is the first update, compilation and caches included.

    `roofline`: of the training phase, the share of its time in which the operations that the update needs (no padding,
    no logits of prompts) could be done at the rate of a large matrix product on this machine. The same operations for
    both sides, as ours counts them.
    """
    result = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        mine = [row for row in rows if row["side"] == side]
        counted = [row for row in mine if not row["warmup"]]
        entry = {key: median(row[key] for row in counted) for key in ("seconds", "generate", "score", "train")}
        entry |= {"episodes_per_second": episodes / entry["seconds"], "first": mine[0]["seconds"]}
        entry |= {"spread": [min(row["seconds"] for row in counted), max(row["seconds"] for row in counted)]}
        entry |= {"peak_gib": max(row["peak_gib"] for row in mine), "dtypes": mine[-1]["dtypes"]}
        result[side] = entry
    ours = [row for row in rows if row["side"] == "ours" and not row["warmup"]]
    for entry in result.values() if ours else ():
        needed = median(row["train_flops"] / row["peak_flops"] for row in ours)
        entry |= {"roofline": needed / entry["train"]}
    return result


def table(result: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| side | episodes/s | s per update (min - max) | generate | score | train | roofline | first | GiB | dtypes |",
        "| --- " * 10 + "|",
    ]
    for side, row in result.items():
        low, high = row["spread"]
        share = f"{row['roofline']:.0%}" if "roofline" in row else "-"
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in row["dtypes"].items() if dtype)
        lines.append(
            f"| {side} | {row['episodes_per_second']:.2f} | {row['seconds']:.2f} ({low:.2f} - {high:.2f}) | "
            f"{row['generate']:.2f} | {row['score']:.2f} | {row['train']:.2f} | {share} | {row['first']:.2f} | "
            f"{row['peak_gib']:.2f} | {dtypes} |"
        )
    if len(result) == 2:
        ratio = result["trl"]["seconds"] / result["ours"]["seconds"]
        memory = result["ours"]["peak_gib"] / result["trl"]["peak_gib"]
        lines += ["", f"Ours is {ratio:.2f} times as fast as TRL 1.12, with {memory:.2f} times its peak memory."]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("overrides", nargs="*", help="of our recipe and TRL's settings, such as ppo.num_ppo_epochs=2")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter (a command) with TRL 1.12")
    parser.add_argument("--sides", nargs="+", choices=("trl", "ours"), default=["trl", "ours"])
    parser.add_argument("--apart", action="store_true", help="one after the other, where memory does not hold both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--updates", type=int, default=5, help="that count")
    parser.add_argument("--warmup", type=int, default=1, help="updates before them")
    parser.add_argument("--trl-micro-batch", type=int, help="episodes of TRL's forward and backward")
    parser.add_argument("--trl-dtype", choices=("float32", "bfloat16"), help="of all its weights and Adam's state")
    parser.add_argument("--run", help="`tiny` only: folder of a finished run, whose sft and reward artifacts are used")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", help="where weights are written for the time of the measurement")
    parser.add_argument("--out", help="JSON file for rows and summary")
    return parser.parse_intermixed_args()


def main() -> None:
    """Measure, print, write."""
    args = parse()
    rows, packages = measure(args)
    overrides = dict(item.split("=", 1) for item in args.overrides)
    episodes = int(overrides.get("ppo.rollout_batch_size", WORKLOADS[args.workload].ppo["rollout_batch_size"]))
    result = summary(rows, episodes)
    about = provenance() | {"trl_packages": packages.get("trl"), "threads": args.threads, "apart": args.apart}
    about |= {"trl_micro_batch": args.trl_micro_batch or WORKLOADS[args.workload].trl_micro_batch}
    print(table(result))
    if args.out:
        Path(args.out).write_text(json.dumps(about | {"summary": result, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
