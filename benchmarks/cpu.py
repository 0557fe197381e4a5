"""The CPU part of docs/performance.md: runs each benchmark and writes their tables to one file (make bench).

    python -m benchmarks.cpu --run artifacts/tiny --trl-python .venv-trl/bin/python

Each is a command that can be run alone. What cannot run here (no TRL 1.12, no finished run) is said and left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from rlhf.stage import git_commit, package_versions

OUT = Path("benchmarks/results/cpu.md")


def commands(args: argparse.Namespace) -> dict[str, list[str] | str]:
    """Title -> command, or why it is left out."""
    threads = ["--threads", str(len(os.sched_getaffinity(0)))]
    ppo = ["ppo_vs_trl", "tiny", "--trl-python", args.trl_python, "--updates", str(args.updates), *threads]
    no_trl = None if Path(args.trl_python).exists() else f"no {args.trl_python}: make bench-env"
    no_run = (
        None if (args.run / "reward" / "manifest.json").is_file() else f"no finished run {args.run}: make sft reward"
    )
    reward = ["reward_vs_trl", "shrunk", "--pairs", "1200", "--longest", "192", "--learning-rate", "1e-3"]
    return {
        "PPO of the `tiny` recipe, a finished run's models: responses end early": no_trl
        or no_run
        or [*ppo, "--run", str(args.run)],
        "PPO of the `tiny` recipe's sizes, random weights: every response has full length": no_trl or ppo,
        "Reward training, small Llama shape, pairs of uneven length": reward,
    }


def measure(command: list[str], threads: int) -> str:
    """What a benchmark prints: its table."""
    whole = [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(whole, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("artifacts/tiny"), help="run with sft and reward artifacts")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--updates", type=int, default=5, help="PPO updates of each side")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    parts = [
        f"# Speed on {cpus} CPU cores",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {git_commit()}, {platform.machine()}. {packages}.",
    ]
    for title, command in commands(args).items():
        print(title, file=sys.stderr)
        told = f"Not run: {command}." if isinstance(command, str) else measure(command, cpus)
        line = "" if isinstance(command, str) else f"`python -m benchmarks.{shlex.join(command)}`"
        parts += [f"## {title}", *filter(None, [line]), told]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
