"""Does it learn as TRL 1.12's PPOTrainer does? Both train from the same artifacts, and one evaluation judges both.

    make bench-env && make sft reward                  # TRL's environment; the artifacts of the tiny recipe
    python -m benchmarks.trl_learning artifacts/tiny --workdir /tmp/learning --out benchmarks/results/learning.json

Every seed of every side is a process; what is finished is not run again. Policies are saved along the way, and all are
evaluated by rlhf.evaluation on the same held-out prompts with the same random numbers: scores are compared at equal KL,
and so is the wall clock (compilation included, loading not) until TRL's last score is reached.

`--precision bf16` is autocast over float32 weights on both sides, and frozen models in bf16.

Matched: prompts, episodes, mini-batches, epochs, learning rate and its decay, Adam's epsilon, KL coefficient, GAE,
clips, temperature, lengths, scale of scores (TRL's reward model applies mean and std itself, and its critic starts as
that model, as with TRL's own scripts: without the mean every end would be a surprise), weights of the critic,
missing-EOS rule ("subtract", the one that TRL has). Ours publishes its last step here, as TRL does. Not matched: our
gradient clipping, which TRL accepts as a setting and never applies; our calibration of the critic on the first rollout
(`ppo.calibrate_critic`); random numbers; the conventions in docs/ppo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

from benchmarks.start import ENVIRONMENT, finished_run_context, side_specs
from pipelines.cli import keep_freed_memory, setup_logging
from rlhf.data import Renderer
from rlhf.evaluation import stage as evaluate_stage
from rlhf.evaluation.policies import Scores
from rlhf.models import load_model, load_tokenizer
from rlhf.recipe import load_recipe
from rlhf.sampling import fitting_rows, response_logprob_sums, sample_responses
from rlhf.stage import StageContext, git_commit, load_inputs, package_versions

HERE = Path(__file__).resolve().parent
MATCHED = ["ppo.missing_eos_mode=subtract", "ppo.best_metric=null", "ppo.eval_every=null"]
MATCHED += ["ppo.critic_learning_rate=null"]  # TRL has one rate
# Nothing of the run's own ppo stage is asked for.
POLICIES = "evaluate.policies=[{artifact: sft}, {artifact: sft, best_of: 2}]"
NO_SCORES = ("step", "seconds", "kl", "objective", "length", "eos_rate")


def context(args: argparse.Namespace, seed: int) -> StageContext:
    """The ppo stage with this seed on the artifacts of the finished run."""
    overrides = [*MATCHED, POLICIES, f"seed={seed}", "logging.report_to=[]", f"hardware.device={args.device}"]
    overrides += [f"hardware.precision={args.precision}", *args.overrides]
    recipe = load_recipe(args.recipe, overrides)
    return finished_run_context(args.workdir / "artifacts", args.run, recipe)


def train(args: argparse.Namespace, side: str, seed: int, out: Path) -> None:
    """Run one side with one seed in a process of its own; policies are left in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    trl = {"trl_micro_batch": args.trl_micro_batch, "dtype": "float32", "device": args.device}
    trl |= {"autocast": args.precision == "bf16"}
    spec = side_specs(context(args, seed), trl)[side] | {"out": str(out), "every": args.every}
    if side == "trl":
        spec["value_mean"] = spec["score_mean"]
    path = out / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    commands = {
        "trl": [*shlex.split(args.trl_python), str(HERE / "trl_side.py")],
        "ours": [sys.executable, "-m", "benchmarks.our_side"],
    }
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        env = os.environ | ENVIRONMENT
        subprocess.run(
            [*commands[side], "learn", str(path)], stdout=log, stderr=log, env=env, cwd=HERE.parent, check=True
        )
    path.unlink()


class Evaluation:
    """Measures a policy as the evaluate stage does: judged responses to held-out prompts, and KL to the SFT model."""

    def __init__(self, ctx: StageContext) -> None:
        section, ppo = ctx.recipe.evaluate, ctx.recipe.ppo
        self.ctx = ctx = replace(ctx, stage=evaluate_stage.STAGE)
        load_inputs(ctx)  # the judges among them
        self.renderer = Renderer(load_tokenizer(ctx.inputs["sft"].model_dir), ctx.recipe.model.chat)
        rows = ctx.rows(section.data or ppo.data, section.split, "prompts")
        fitting = fitting_rows(rows, self.renderer, ppo.max_prompt_length)
        self.prompts = [row["prompt"] for row in fitting[: section.prompts]]
        self.scores = Scores(ctx, {}, self.renderer.tokenizer.pad_token_id)
        self.reference = self._load(ctx.inputs["sft"].model_dir)

    def _load(self, directory: Path) -> PreTrainedModel:
        return load_model(directory).to(PartialState().device).eval()

    def __call__(self, directory: Path) -> dict[str, float]:
        """Means over the responses of the policy in `directory`; sampling noise is the same for every policy."""
        ppo, pad = self.ctx.recipe.ppo, self.renderer.tokenizer.pad_token_id
        model = self._load(directory)
        samples = sample_responses(model, self.renderer, self.prompts, ppo.response_length, ppo.temperature, seed=0)
        own = response_logprob_sums(model, samples, ppo.temperature, pad)
        reference = response_logprob_sums(self.reference, samples, ppo.temperature, pad)
        kl = [a - b for a, b in zip(own, reference, strict=True)]
        scores = self.scores(samples)
        result = {name: mean(values) for name, values in scores.items()} | {"kl": mean(kl)}
        if (objective := self.scores.rlhf_reward(scores, samples, kl)) is not None:
            result["objective"] = mean(objective)  # the missing-EOS rule counted in
        return result | {"length": mean(samples.lengths), "eos_rate": samples.eos_rate}


def run_one(args: argparse.Namespace, side: str, seed: int, evaluation: Evaluation | None) -> dict[str, Any]:
    """Train and evaluate, or read what an earlier call left."""
    out = args.workdir / f"{side}_{seed}"
    if (out / "result.json").is_file():
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert evaluation is not None
    train(args, side, seed, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sft = evaluation.ctx.inputs["sft"].model_dir
    folders = [sft, *sorted(out.glob("step_*"))]
    seconds = {0: 0.0} | {row["ppo_step"]: row["seconds"] for row in rows}
    steps = [0 if path == sft else int(path.name[5:]) for path in folders]
    curve = [
        {"step": step, "seconds": seconds[step]} | evaluation(path) for step, path in zip(steps, folders, strict=True)
    ]
    result = {"side": side, "seed": seed, "train_seconds": rows[-1]["seconds"], "curve": curve}
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def at_kl(curve: list[dict[str, float]], kl: Any, measure: str) -> Any:
    """`measure` of a run where its KL was `kl` (a number or several), linear between the saved policies."""
    points = sorted((point["kl"], point[measure]) for point in curve)
    return np.interp(kl, [x for x, _ in points], [y for _, y in points])


def at_equal_kl(results: list[dict[str, Any]], measure: str) -> list[dict[str, float]]:
    """`measure` of both sides at equal KL, per seed that both have.

    Returns:
        Per seed: `kl`, the largest that both reached; `ours` and `trl` there; `along`, the mean of ours minus TRL's
        over all KL from 0 to there, which a single noisy policy moves less.
    """
    curves = {(row["side"], row["seed"]): row["curve"] for row in results}
    rows = []
    for seed in sorted({row["seed"] for row in results}):
        ours, trl = curves.get(("ours", seed)), curves.get(("trl", seed))
        if ours and trl:
            kl = min(max(point["kl"] for point in curve) for curve in (ours, trl))
            grid = np.linspace(0, kl, 101)
            along = float((at_kl(ours, grid, measure) - at_kl(trl, grid, measure)).mean())
            here = {"ours": float(at_kl(ours, kl, measure)), "trl": float(at_kl(trl, kl, measure))}
            rows.append({"seed": seed, "kl": kl, "along": along} | here)
    return rows


def seconds_to_reach(results: list[dict[str, Any]], measure: str) -> list[dict[str, float]]:
    """Wall clock until a saved policy of ours has TRL's last score, per seed that both have.

    Returns:
        Per seed: `score` of TRL's last policy, its `trl` seconds, and `ours`, or infinity if it was never reached.
    """
    curves = {(row["side"], row["seed"]): row["curve"] for row in results}
    rows = []
    for seed in sorted({row["seed"] for row in results}):
        ours, trl = curves.get(("ours", seed)), curves.get(("trl", seed))
        if ours and trl and "seconds" in trl[-1]:
            reached = [point["seconds"] for point in ours if point[measure] >= trl[-1][measure]]
            times = {"ours": min(reached, default=float("inf")), "trl": trl[-1]["seconds"]}
            rows.append({"seed": seed, "score": trl[-1][measure]} | times)
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def report(results: list[dict[str, Any]]) -> str:
    """Markdown: final values, scores at equal KL, and time to TRL's last scores."""
    sft = results[0]["curve"][0]
    scores = [name for name in sft if name not in NO_SCORES]
    measures = scores + [name for name in sft if name in NO_SCORES[2:]]
    sides = {side: [row for row in results if row["side"] == side] for side in ("ours", "trl")}
    lines = ["| side | seeds | " + " | ".join(measures) + " |", "| --- " * (len(measures) + 2) + "|"]
    lines.append("| SFT | - | " + " | ".join(f"{sft[name]:.3f}" for name in measures) + " |")
    for side, rows in sides.items():
        if rows:
            cells = [spread([row["curve"][-1][name] for row in rows]) for name in measures]
            lines.append(f"| {side} | {len(rows)} | " + " | ".join(cells) + " |")
    for row in results:
        lines += curve_lines(row, measures)
    for measure in scores:
        lines += equal_kl_lines(at_equal_kl(results, measure), measure)
    for measure in [*scores, *(name for name in measures if name == "objective")]:
        for row in seconds_to_reach(results, measure):
            times = f"TRL {row['trl']:.0f} s, ours "
            share = row["ours"] / row["trl"]
            times += f"{row['ours']:.0f} s ({share:.2f})" if np.isfinite(share) else "never"
            lines += ["", f"seed {row['seed']}, {measure} {row['score']:.3f}: {times}"]
    return "\n".join(lines)


def curve_lines(result: dict[str, Any], measures: list[str]) -> list[str]:
    """Table of the policies that one run saved."""
    lines = ["", f"| {result['side']}, seed {result['seed']}: update | seconds | " + " | ".join(measures) + " |"]
    lines.append("| --- " * (len(measures) + 2) + "|")
    for point in result["curve"]:
        cells = " | ".join(f"{point[name]:.3f}" for name in measures)
        lines.append(f"| {point['step']} | {point['seconds']:.0f} | {cells} |")
    return lines


def equal_kl_lines(rows: list[dict[str, float]], measure: str) -> list[str]:
    """Table of `at_equal_kl`."""
    if not rows:
        return []
    lines = ["", f"| seed | KL | {measure}, ours | {measure}, TRL | ours - TRL | the same, mean over KL |"]
    lines.append("| --- " * 6 + "|")
    for row in rows:
        numbers = [row["kl"], row["ours"], row["trl"], row["ours"] - row["trl"], row["along"]]
        lines.append(f"| {row['seed']} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    gains = spread([row["ours"] - row["trl"] for row in rows]), spread([row["along"] for row in rows])
    return [*lines, f"| all | | | | {gains[0]} | {gains[1]} |"]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run: its sft and reward artifacts are used")
    parser.add_argument("overrides", nargs="*", help="of the recipe, for both sides, such as ppo.kl_coef=0.1")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--side", choices=("ours", "trl", "both"), default="both")
    parser.add_argument("--workdir", type=Path, required=True, help="policies and results; kept, to go on from")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter (a command) with TRL 1.12")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="episodes of TRL's forward and backward")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides' training")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--every", type=int, default=5, help="updates between saved policies")
    parser.add_argument("--finished", action="store_true", help="train nothing, report what is finished in --workdir")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_intermixed_args()


def main() -> None:
    """Train, evaluate, print, write."""
    setup_logging()
    keep_freed_memory()
    args = parse()
    args.workdir = args.workdir.resolve()
    runs = [(seed, side) for seed in args.seeds for side in (("ours", "trl") if args.side == "both" else (args.side,))]
    if args.finished:
        runs = [(seed, side) for seed, side in runs if (args.workdir / f"{side}_{seed}" / "result.json").is_file()]
    evaluation = None if args.finished else Evaluation(context(args, seed=0))
    results = []
    for seed, side in runs:
        results.append(run_one(args, side, seed, evaluation))
        print(f"{side} seed {seed}: {results[-1]['curve'][-1]}", file=sys.stderr, flush=True)
    if not results:
        raise SystemExit(f"error: nothing is finished in {args.workdir}")
    print(report(results))
    if args.out:
        about = {
            "recipe": args.recipe,
            "overrides": [*MATCHED, *args.overrides],
            "every": args.every,
            "device": args.device,
            "precision": args.precision,
        }
        about |= {"commit": git_commit(), "packages": package_versions()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
