"""What single settings of PPO are worth: one run a setting and seed, judged by a reward model that PPO never saw.

    python -m benchmarks.ablations        # the table of docs/results.md; an hour and more on two CPU cores

On the `tiny` recipe. The training pairs are cut into two halves: PPO maximises a reward model of the one (or several,
which differ in their seed), and one of the other half judges, beside a classifier of film reviews. Finished stages are
skipped, so the same command continues. What differs from the recipe is in `SETTINGS`, one thing at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.start import provenance, with_measured
from pipelines.sweep import share
from rlhf.artifacts import Artifact

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "ablations.json"
ENSEMBLES = ROOT / "results" / "ablations_ensembles.json"  # once more, on another machine, with the mean
BLOCKS = {RESULTS: None, ENSEMBLES: "ensembles"}  # of the page
PAGE = ROOT.parent / "docs" / "results.md"
RECIPE = "tiny"
BASE = "halves"
HALVES = "reward.data=movie_reviews_pairs_halves"
REWARDS = {  # artifact -> what it is trained on
    "reward": ["reward.split=half_a"],
    "reward_b": ["reward.split=half_b"],
    "reward_2": ["reward.split=half_a", "reward.seed=1"],
    "reward_3": ["reward.split=half_a", "reward.seed=2"],
}
JUDGES = "[{name: held_back, artifact: reward_b}, {name: judge, sentiment: movie_reviews_imdb_judge}]"
# The gate rightly fails a reward model of half the pairs (docs/evaluation.md). No frontier and no perplexity: time.
COMMON = ["ppo.ignore_reward_gate=true", "ppo.keep_policies_every=null", "evaluate.best_of_n=1"]
COMMON += ["evaluate.perplexity_rows=0", "logging.report_to=[]", f"evaluate.judges={JUDGES}"]
THREE = "ppo.rewards=[{artifact: reward}, {artifact: reward_2}, {artifact: reward_3}]"
SETTINGS = {
    "as in the recipe": [],
    "kl_coef 0.03": ["ppo.kl_coef=0.03"],
    "kl_coef 0.3": ["ppo.kl_coef=0.3"],
    "kl_estimator k3": ["ppo.kl_estimator=k3"],
    "whiten_rewards": ["ppo.whiten_rewards=true"],
    "critic_init sft": ["ppo.critic_init=sft"],
    "calibrate_critic off": ["ppo.calibrate_critic=false"],
    "critic shared": ["ppo.critic=shared"],
    "3 reward models, sum": [THREE],
    "3 reward models, mean": [THREE, "ppo.reward_aggregation=mean"],
    "3 reward models, min": [THREE, "ppo.reward_aggregation=min"],
    "3 reward models, penalised": [THREE, "ppo.reward_aggregation=penalised"],
    "generator compiled": ["ppo.generator=compiled"],
}
# Name of a column -> key of the evaluate stage's metrics. Rewards: gain in standard deviations of the SFT samples.
COLUMNS = {
    "reward": "ppo_vs_sft/reward_delta",
    "held-back reward": "ppo_vs_sft/held_back_delta",
    "judge": "ppo/judge_mean",
    "wins, held-back": "ppo_vs_sft/win_rate_held_back",
    "KL": "ppo/kl_mean",
    "tokens": "ppo/length_mean",
    "distinct-2": "ppo/distinct_2",
}


def call(args: argparse.Namespace, stage: str, run: str, *more: str) -> None:
    """One stage in a process of its own; what it prints goes to a log beside the runs."""
    command = [sys.executable, "-m", f"pipelines.{stage}", "--recipe", RECIPE, "--artifacts", str(args.artifacts)]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    args.artifacts.mkdir(parents=True, exist_ok=True)
    with open(args.artifacts / f"{run}.log", "a", encoding="utf-8") as log:
        subprocess.run([*command, "--run", run, *more], env=env, stdout=log, stderr=log, check=True)


def prepare(args: argparse.Namespace) -> None:
    """The stages that all runs stand on."""
    call(args, "pretrain", BASE)
    call(args, "sft", BASE)
    for name, settings in REWARDS.items():
        call(args, "reward", BASE, "--as", name, HALVES, *settings)


def run(args: argparse.Namespace, title: str, seed: int) -> dict[str, float]:
    """Train and evaluate one policy; the metrics of its evaluation."""
    name = f"{BASE}-{'_'.join(title.replace(',', '').split())}-seed_{seed}"
    folder = args.artifacts / name
    folder.mkdir(exist_ok=True)
    share(args.artifacts / BASE, folder, ["ppo", "evaluate"])
    settings = [*COMMON, f"ppo.seed={seed}", f"evaluate.seed={seed}", HALVES, *SETTINGS[title]]
    for stage in ("ppo", "evaluate"):
        call(args, stage, name, *settings)
    print(f"{title}, seed {seed}: done", file=sys.stderr, flush=True)
    return Artifact.load(folder / "evaluate").manifest["metrics"]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds of each column."""
    lines = [f"| setting | runs | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for title, rows in results.items():
        cells = [cell([row[key] for row in rows]) for key in COLUMNS.values()]
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All settings that were asked for, with all seeds."""
    work = [(title, seed) for seed in args.seeds for title in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda one: run(args, *one), work))
    results: dict[str, list[dict[str, float]]] = {title: [] for title in args.only}
    for (title, _), metrics in zip(work, done, strict=True):
        results[title].append(metrics)
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="artifact directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help=f"JSON of all figures; {' and '.join(f.name for f in BLOCKS)} write the page",
    )
    parser.add_argument("--table", action="store_true", help=f"only write the table of {PAGE.name} from that file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    if not args.table:
        prepare(args)
        report = provenance() | {"seeds": args.seeds, "settings": measure(args)}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = table(json.loads(args.out.read_text(encoding="utf-8"))["settings"])
    print(lines)
    if args.out.resolve() in BLOCKS:
        page = with_measured(PAGE.read_text(encoding="utf-8"), lines, BLOCKS[args.out.resolve()])
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
