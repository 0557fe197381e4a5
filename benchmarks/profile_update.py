"""Where the time of one PPO update goes: torch.profiler over a step, after some that compile and record.

    python -m benchmarks.profile_update tiny --run artifacts/tiny
    python -m benchmarks.profile_update 135m ppo.compile=on --device cuda

Prints the phases, the share of the time in which the device computed, and the kernels (on a CPU: operators) by their
own time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.our_side import timed_step
from benchmarks.ppo_vs_trl import WORKLOADS, context
from pipelines.cli import keep_freed_memory
from rlhf.models import load_tokenizer
from rlhf.ppo.stage import build_trainer


def own_times(events: Any, device: str) -> dict[str, tuple[float, int]]:
    """Seconds of its own, and calls, of each kernel or operator."""
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kinds = [event for event in events if device == "cpu" or str(event.device_type).endswith("CUDA")]
    return {event.key: (getattr(event, name) / 1e6, event.count) for event in kinds}


def table(times: dict[str, tuple[float, int]], seconds: float, most: int) -> str:
    """Markdown, the longest first."""
    busy = sum(own for own, _ in times.values())
    rows = sorted(times.items(), key=lambda item: -item[1][0])[:most]
    lines = ["| kernel or operator | calls | seconds | share |", "| --- | --- | --- | --- |"]
    lines += [f"| `{key[:70]}` | {calls} | {own:.3f} | {own / busy:.1%} |" for key, (own, calls) in rows]
    return "\n".join([f"computing {busy:.2f} s of {seconds:.2f} s ({busy / seconds:.0%})", "", *lines])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as ppo.compile=on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--run", help="`tiny` only: folder of a finished run")
    parser.add_argument("--warmup", type=int, default=2, help="updates before the one that is looked at")
    parser.add_argument("--most", type=int, default=15, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    args.updates, args.trl_micro_batch = 1, None
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        ctx, _ = context(args, Path(directory))
        trainer = build_trainer(ctx, load_tokenizer(ctx.inputs["sft"].model_dir))
        for _ in range(args.warmup):
            timed_step(trainer)
        activities = [ProfilerActivity.CUDA] if args.device == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            row = timed_step(trainer)
    phases = ", ".join(f"{name} {row[name]:.2f}" for name in ("generate", "score", "train"))
    print(f"update {row['seconds']:.2f} s ({phases}), with the profiler on; {torch.get_num_threads()} threads\n")
    print(table(own_times(profiler.key_averages(), args.device), row["seconds"], args.most))


if __name__ == "__main__":
    main()
