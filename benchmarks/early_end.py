"""What responses that end early cost: PPO updates as they are, and with everything padded to the longest response.

    python -m benchmarks.early_end 135m ppo.compile=on --device cuda
    python -m benchmarks.early_end shrunk --episodes 32

Lengths are drawn from a long tail (most responses are short, the longest has full length), the same for both sides.
The last number of the vocabulary is EOS, and the random number that picks it stands where a response is to end. The
padded side is the same trainer with three things taken away: a slot whose response ended is not refilled, the last
responses do not go on in a smaller cache, and the rows of a forward are all as long as the longest prompt and response.
The two take turns. A shape of micro-batch that comes for the first time costs some tenths of a second to record on a
GPU: `--warmup` decides how many of those are in what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.our_side import timed_step
from benchmarks.ppo_vs_trl import WORKLOADS
from benchmarks.start import provenance, random_context
from pipelines.cli import keep_freed_memory
from rlhf.models import load_tokenizer
from rlhf.ppo import trainer as trainer_module
from rlhf.ppo.rollout import Batch, Rollout
from rlhf.ppo.stage import build_trainer
from rlhf.ppo.trainer import PPOTrainer


def drawn_lengths(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Log-normal with a median of a tenth of the longest, cut at both ends; one has full length."""
    draw = random.Random(seed)
    lengths = [round(longest / 10 * math.exp(draw.gauss(0, 1))) for _ in range(count - 1)]
    return [min(longest, max(shortest, length)) for length in lengths] + [longest]


def ending_uniforms(shortest: int) -> Any:
    """`rollout.uniforms`, with the number that picks EOS at the end of each response."""
    original = trainer_module.uniforms

    def uniforms(rows: int, length: int, *key: int) -> Tensor:
        noise = original(rows, length, *key) * 0.99  # EOS is the last token: only a number near 1 picks it
        for row, end in enumerate(drawn_lengths(rows, shortest, length, key[-1])):
            noise[row, end - 1] = 1 - 2**-24
        return noise

    return uniforms


def padded_batch(rollout: Rollout, rows: Any) -> Batch:
    """Rows as wide as the whole rollout: its longest prompt and its longest response."""
    index = torch.tensor([*rows], device=rollout.prompt_ids.device)
    length = max(rollout.response_lengths)
    ids = torch.cat([rollout.prompt_ids[index], rollout.response_ids[index][:, :length]], dim=1)
    mask = torch.cat([rollout.prompt_mask[index], rollout.response_mask[index][:, :length].long()], dim=1)
    return Batch(index, len(index), ids, mask, length, torch.zeros(len(index), 1, dtype=torch.long, device=ids.device))


def padded_plan(rollout: Rollout, rows: Any, max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Rows in their order, as many as fit."""
    each = max(1, max_tokens // (rollout.prompt_ids.shape[1] + max(rollout.response_lengths)))
    return [[list(range(first, min(first + each, len(rows)))) for first in range(0, len(rows), each)]]


class Side:
    """One trainer of its own."""

    def __init__(self, args: argparse.Namespace, padded: bool, root: Path) -> None:
        workload = WORKLOADS[args.workload]
        shape = replace(workload.shape, ends=True, eos=workload.shape.vocab - 1)
        ppo = workload.ppo | {"rollout_batch_size": args.episodes, "mini_batch_size": args.episodes}
        ppo |= {"response_length": args.longest, "total_episodes": args.episodes * 1000}
        ppo |= {"generation_slots": args.episodes if padded else args.slots}
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        ctx = random_context(root, shape, ppo, args.overrides, args.seed, dtype, args.device)
        self.padded = padded
        self.trainer: PPOTrainer = build_trainer(ctx, load_tokenizer(ctx.inputs["sft"].model_dir))

    def step(self) -> dict[str, Any]:
        """One update."""
        import rlhf.ppo.generation.compiled as generation
        import rlhf.ppo.rollout as module

        ours = Rollout.batch, module.plan, generation.SHRINK
        if self.padded:
            Rollout.batch, module.plan = padded_batch, padded_plan  # type: ignore[method-assign,assignment]
            generation.SHRINK = 1 << 30
        try:
            return timed_step(self.trainer)
        finally:
            Rollout.batch, module.plan, generation.SHRINK = ours  # type: ignore[method-assign]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("overrides", nargs="*", help="of the recipe, both sides")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--slots", type=int, default=256, help="responses under way at once, our side")
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a response")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_intermixed_args()
    keep_freed_memory()
    trainer_module.uniforms = ending_uniforms(args.shortest)  # type: ignore[attr-defined]
    lengths = drawn_lengths(args.episodes, args.shortest, args.longest, 0)
    print(
        f"response tokens: mean {sum(lengths) / len(lengths):.0f}, median {median(lengths):.0f}, longest {args.longest}"
    )
    rows: dict[str, list[dict]] = {"padded": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        sides = {name: Side(args, name == "padded", Path(directory)) for name in rows}
        for number in range(args.warmup + args.updates):
            for name, side in sides.items():
                rows[name].append(side.step())
                row = {key: round(value, 2) for key, value in rows[name][-1].items() if isinstance(value, float)}
                print(f"{name} update {number}: {row}", file=sys.stderr)
    print("| side | s per update | generate | score | train | first |", "| --- " * 6 + "|", sep="\n")
    keys = ("seconds", "generate", "score", "train")
    medians = {
        name: {key: median(row[key] for row in kept[args.warmup :]) for key in keys} for name, kept in rows.items()
    }
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.2f}" for key in keys) + f" | {rows[name][0]['seconds']:.1f} |")
    print(f"\nOurs is {medians['padded']['seconds'] / medians['ours']['seconds']:.2f} times as fast as padding.")
    if args.out:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        about = provenance() | {"arguments": arguments}
        Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
