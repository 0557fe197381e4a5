"""Our PPOTrainer, driven as benchmarks/ppo_vs_trl.py needs it: one update per line "step" on stdin.

python -m benchmarks.our_side SPEC.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.start import context_of
from pipelines.cli import keep_freed_memory, setup_logging
from rlhf.logs import append_row
from rlhf.models import load_tokenizer
from rlhf.ppo.stage import build_trainer
from rlhf.ppo.trainer import PPOTrainer
from rlhf.recipe import Recipe
from rlhf.stage import package_versions, peak_memory_gib
from rlhf.yamlio import validate

MARK = "@@ "


def say(row: dict[str, Any]) -> None:
    """One JSON line for the process that started this one."""
    print(MARK + json.dumps(row), flush=True)


def dtypes_of(trainer: PPOTrainer) -> dict[str, str]:
    """dtypes of trained weights, Adam's state, the frozen reference, and matrix products."""
    state = [value.dtype for entry in trainer.optimizer.state.values() for value in entry.values() if value.numel() > 1]
    frozen = getattr(trainer.reference, "frozen", None)
    names = {
        "weights": {p.dtype for p in trainer.parameters},
        "adam": set(state),
        "frozen": {p.dtype for p in frozen.parameters()} if frozen is not None else set(),
    }
    found = {name: "/".join(sorted(str(d).removeprefix("torch.") for d in kinds)) for name, kinds in names.items()}
    return found | {"autocast": trainer.accelerator.mixed_precision}


def timed_step(trainer: PPOTrainer) -> dict[str, Any]:
    """One ppo_step and what it took."""
    started = time.perf_counter()
    metrics, _ = trainer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    trainer.ppo_step += 1
    phases = {name: metrics[f"perf/{name}_seconds"] for name in ("generate", "score", "train")}
    row = {"seconds": seconds, **phases, "peak_gib": peak_memory_gib(), "dtypes": dtypes_of(trainer)}
    flops = metrics["perf/mfu"] * trainer.peak * phases["train"]  # what an update needs; see rlhf.ppo.perf
    return row | {"train_flops": flops, "peak_flops": trainer.peak}


def time_updates(trainer: PPOTrainer, spec: dict[str, Any]) -> None:
    """Updates on demand, for benchmarks/ppo_vs_trl.py."""
    say({"ready": True, "packages": package_versions()})
    while sys.stdin.readline():
        say(timed_step(trainer))


def learn(trainer: PPOTrainer, spec: dict[str, Any]) -> None:
    """A whole run, for benchmarks/trl_learning.py: `OUT/step_<n>/` every few updates and after the last."""
    out, total, started = Path(spec["out"]), trainer.config.total_steps, time.perf_counter()
    while trainer.ppo_step < total:
        metrics, _ = trainer.step()
        trainer.ppo_step += 1
        if trainer.ppo_step % spec["every"] == 0 or trainer.ppo_step == total:
            policy = trainer.accelerator.unwrap_model(trainer.model).policy
            policy.save_pretrained(out / f"step_{trainer.ppo_step:04d}")
        row = {"ppo_step": trainer.ppo_step, "seconds": time.perf_counter() - started} | metrics
        append_row(out / "metrics.jsonl", row)


def main() -> None:
    """Command line."""
    setup_logging()
    keep_freed_memory()
    command, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    recipe = validate(Recipe, spec["recipe"], "benchmark")
    ctx = context_of(recipe, Path(spec["root"]), spec["run"])
    trainer = build_trainer(ctx, load_tokenizer(ctx.inputs["sft"].model_dir))
    {"time": time_updates, "learn": learn}[command](trainer, spec)


if __name__ == "__main__":
    main()
