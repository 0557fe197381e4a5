"""Figures in the prose and tables of README.md, docs/evaluation.md and docs/reward_report.md.

    python -m benchmarks.figures --make --collect    # make the runs, read them, write figures.json and the pages
    python -m benchmarks.figures                     # the pages, from figures.json

All runs are of the recipe `tiny`: the run itself, its evaluation with best-of-64, reward models of halves of the pairs,
of other orders of the batches, and of a set whose labels like length (RLHF_DATA names its folder). Finished stages are
skipped, so `--make` continues; without it `--collect` reads what is there.

A sentence that claims something of its figures says so with `holds`: where they say otherwise, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import HALVES, call
from benchmarks.start import provenance, with_measured
from pipelines.cli import fail
from pipelines.sweep import share
from rlhf.artifacts import STAGES, Artifact
from rlhf.errors import UserError
from rlhf.evaluation.report import comparison_table
from rlhf.reward.gate import REPORT

Figures = Mapping[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "figures.json"
AFTER_SFT = ("reward", "ppo", "evaluate")
MOST = 64  # of best-of-n; the recipe has fewer
LENGTH = {f"reward_l{coefficient}": f"reward.length_decorrelation={coefficient}" for coefficient in ("0", "0.3", "1")}
LENGTH_SET = ("reward.data=ukp_convarg1_dev", "reward.max_length=120", "reward.limit=4000")
BY_LENGTH = "reward.trainer.train_sampling_strategy=group_by_length"
ORDERS = {
    "reward_by_length": [BY_LENGTH],
    "reward_seed_1": ["reward.seed=1"],
    "reward_seed_1_by_length": ["reward.seed=1", BY_LENGTH],
}
# Artifacts of `--collect`, below the artifact directory.
TINY, FRONTIER, SPLIT, LONG, SEEDS = "tiny", "frontier64", "halves", "length", "orders"


# ------------------------------------------------------------------------------------------------------------ the runs
def make(args: argparse.Namespace) -> None:
    """The runs that `collect` reads, one after another, with two threads each unless `--threads` says otherwise."""
    for stage in STAGES:
        call(args, stage, TINY)
    for run, made in ((FRONTIER, ["evaluate"]), (SPLIT, AFTER_SFT), (LONG, AFTER_SFT), (SEEDS, AFTER_SFT)):
        (args.artifacts / run).mkdir(exist_ok=True)
        share(args.artifacts / TINY, args.artifacts / run, made)
    call(args, "evaluate", FRONTIER, f"evaluate.best_of_n={MOST}")
    call(args, "reward", SPLIT, HALVES, "reward.split=half_a")
    call(args, "ppo", SPLIT, HALVES, "reward.split=half_a")
    call(args, "reward", SPLIT, "--as", "reward_b", HALVES, "reward.split=half_b")
    call(args, "evaluate", SPLIT)
    for name, setting in LENGTH.items():
        call(args, "reward", LONG, "--as", name, *LENGTH_SET, setting)
    for name, settings in ORDERS.items():
        call(args, "reward", SEEDS, "--as", name, *settings)


# --------------------------------------------------------------------------------------------------- what is kept of it
def collect(root: Path) -> dict[str, Any]:
    """What the pages need of the finished runs below `root`.

    Raises:
        UserError: a run is not finished.
    """
    tiny = {stage: Artifact.load(root / TINY / stage) for stage in STAGES}
    return provenance() | {
        "runs": {stage: origin(artifact) for stage, artifact in tiny.items()},
        "tiny": {
            "parameters": tiny["pretrain"].manifest["metrics"]["parameters"],
            "reward": reward_figures(tiny["reward"]),
            "comparison": comparison(tiny["evaluate"]),
            "frontier": curve(tiny["evaluate"]),
        },
        "best_of_64": curve(Artifact.load(root / FRONTIER / "evaluate")),
        "halves": {
            "reward": reward_figures(Artifact.load(root / SPLIT / "reward")),
            "comparison": comparison(Artifact.load(root / SPLIT / "evaluate")),
        },
        "length": [reward_figures(Artifact.load(root / LONG / name)) for name in LENGTH],
        "orders": {name: reward_figures(Artifact.load(root / SEEDS / name)) for name in ORDERS},
    }


def origin(artifact: Artifact) -> dict[str, Any]:
    """Commit and day of a stage, and what it ran on."""
    return {key: artifact.manifest[key] for key in ("git_commit", "finished", "hardware")}


def comparison(artifact: Artifact) -> dict[str, Any]:
    """What `comparison_table` needs of an evaluation."""
    found = artifact.manifest["comparison"]
    return {key: found[key] for key in ("policies", "scores", "num_prompts", "metrics")}


def curve(artifact: Artifact) -> dict[str, Any]:
    """Reward against KL of an evaluation, and what its gate says."""
    found = artifact.manifest["comparison"]["frontier"]
    keys = ("prompts", "samples", "scores", "trained", "unseen", "best_of_n", "steps", "published", "best_steps")
    return {key: found[key] for key in keys} | {"gate": artifact.manifest["gate"]}


def reward_figures(artifact: Artifact) -> dict[str, Any]:
    """The report of a reward model without its lists of scores and texts."""
    report = json.loads((artifact.path / REPORT).read_text(encoding="utf-8"))
    keys = ("train_pairs", "pairs", "accuracy", "shorter", "baselines", "leads")
    section = artifact.manifest["recipe"]["reward"]
    return {key: report[key] for key in keys} | {
        "settings": {key: section[key] for key in ("data", "split", "max_length", "length_decorrelation")},
        "calibration": {key: report["calibration"][key] for key in ("ece", "temperature")},
        "length": next((row for row in report["biases"] if row["feature"] == "length in tokens"), None),
        "edits": {row["edit"]: {key: row[key] for key in ("gain", "wins") if key in row} for row in report["edits"]},
        "padding": max((row["largest"] for row in report["padding"]), default=None),
        "gate": {key: report["gate"][key] for key in ("verdict", "thresholds")}
        | {"names": names_of(report["gate"]["checks"], report["gate"]["verdict"])},
    }


def names_of(checks: Sequence[Mapping[str, Any]], verdict: str) -> list[str]:
    """The checks that made the verdict, each once; none where everything passed."""
    found = [check["name"] for check in checks if check["verdict"] == verdict]
    return list(dict.fromkeys(found)) if verdict != "pass" else []


# ----------------------------------------------------------------------------------------------------------- the words
def holds(condition: bool, claim: str) -> None:
    """Nothing is written that the figures do not say.

    Raises:
        UserError: `condition` is false.
    """
    if not condition:
        raise UserError(
            f"figures: a sentence says that {claim}, and the figures do not: rewrite it in benchmarks/figures.py"
        )


def percent(value: float, digits: int = 1) -> str:
    """0.744 as `74.4 %`."""
    return f"{100 * value:.{digits}f} %"


def percent_of(interval: Mapping[str, float], sign: str = "") -> str:
    """A share with its 95 % interval, as `74.4 % [70.8, 77.7]`."""
    low, high = (f"{100 * interval[key]:{sign}.1f}" for key in ("low", "high"))
    return f"{100 * interval['value']:{sign}.1f} % [{low}, {high}]"


def gain(metrics: Mapping[str, float], key: str) -> str:
    """A difference with its 95 % interval, as `2.02 [1.91, 2.12]`."""
    value, low, high = (metrics[key + suffix] for suffix in ("", "_low", "_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def best_of(found: Figures, n: int) -> dict[str, Any]:
    """The row of best-of-n: its KL at most, and the scores."""
    return next(row for row in found["best_of_n"] if row["n"] == n)


def at_step(found: Figures, step: int) -> dict[str, Any]:
    """The row of a kept step of PPO."""
    return next(row for row in found["steps"] if row["step"] == step)


def trained_score(found: Figures, row: Mapping[str, Any]) -> float:
    """Mean of the score that PPO maximised."""
    return row["scores"][found["trained"]]["value"]


# ------------------------------------------------------------------------------------------------------- of README.md
def run_block(figures: Figures) -> str:
    """What `make sft reward ppo` gave, with its table."""
    tiny = figures["tiny"]
    reward = tiny["reward"]
    length, words = (reward["baselines"][name]["value"] for name in ("length-only", "TF-IDF"))
    right = reward["accuracy"]["value"]
    holds(length < right < words, "words win over the reward model, and length alone does not")
    return "\n".join(
        [
            f"The reward model is right on {percent(right)} of held-out pairs (length alone {percent(length)}, "
            f"TF-IDF {percent(words)}: with so little text, words still win).",
            "`judge` is a TF-IDF and logistic-regression classifier fitted on 10,000 reviews that no stage has seen; "
            "it reads the continuation without its prompt.",
            "",
            comparison_table(tiny["comparison"]),
        ]
    )


def price_block(figures: Figures) -> str:
    """What PPO paid."""
    metrics, weights = figures["tiny"]["comparison"]["metrics"], figures["tiny"]["parameters"]
    alike, perplexity = metrics["ppo_vs_sft/distinct_2_ratio"], metrics["ppo_vs_sft/perplexity_ratio"]
    before, after = metrics["sft/self_bleu"], metrics["ppo/self_bleu"]
    holds(metrics["ppo_vs_sft/length_delta_high"] < 0, "responses of PPO are shorter")
    holds(alike < 1 and after > before, "responses of PPO are more alike")
    holds(perplexity > 1, "PPO forgets some language")
    return (
        "Curves lie, so read the samples too (`artifacts/tiny/evaluate/report.md`): "
        f"a {weights / 1e6:.1f}-million-parameter model writes broken English, and PPO pays for its\n"
        f"praise with shorter, more alike responses (distinct-2 falls by {percent(1 - alike, 0)}, "
        f"self-BLEU rises from {before:.2f} to {after:.2f}) "
        f"and forgets some of its language (perplexity x {perplexity:.2f})."
    )


# ---------------------------------------------------------------------------------------------- of docs/evaluation.md
def frontier_block(figures: Figures) -> str:
    """Best-of-n beside PPO."""
    found, more = figures["tiny"]["frontier"], figures["best_of_64"]
    n, published = found["samples"], at_step(found, found["published"])
    ours, least = best_of(found, n), best_of(more, MOST)
    near = min(found["steps"], key=lambda row: abs(trained_score(found, row) - trained_score(found, ours)))
    return "\n".join(
        [
            "The recipe `tiny`, seed 0, two threads, "
            f"{found['prompts']} prompts: best of {n} reaches a reward of {trained_score(found, ours):.2f} for at "
            f"most {ours['kl']:.2f} nats, PPO at step {near['step']} has {trained_score(found, near):.2f} for "
            f"{near['kl']:.2f}; at the published step {found['published']} it has "
            f"{trained_score(found, published):.2f} for {published['kl']:.2f}. {beyond(found, more, least, published)}",
            favourites(found),
        ]
    )


def beyond(found: Figures, more: Figures, least: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """The sentence on best-of-64."""
    reward, reached = trained_score(more, least), trained_score(found, published)
    holds(reward < reached, f"best-of-{MOST} does not reach the published step")
    return (
        f"Best of {MOST} (the same policies and prompts, `evaluate.best_of_n={MOST}`) reaches {reward:.2f} for at most "
        f"{least['kl']:.2f} nats: {percent(reward / reached, 0)} of PPO's reward for at most "
        f"{percent(least['kl'] / published['kl'], 0)} of its KL, and {MOST} samples for each answer."
    )


def favourites(found: Figures) -> str:
    """The step that each score would have kept."""
    best = found["best_steps"]
    unseen = ", ".join(f"by `{score}` step {best[score]}" for score in found["unseen"])
    return (
        f"Of the kept steps and the SFT model (step 0) the best is {unseen}, and by the reward that PPO maximised step "
        f"{best[found['trained']]}; the published one is {found['published']}."
    )


def held_back_block(figures: Figures) -> str:
    """A policy of one half's reward model, scored by the other half's."""
    comparison, reward = figures["halves"]["comparison"], figures["halves"]["reward"]
    metrics, whole = comparison["metrics"], figures["tiny"]["comparison"]["metrics"]
    own, other = (metrics[f"ppo_vs_sft/{name}_delta"] for name in ("reward", "reward_b"))
    wins = [percent(metrics[f"ppo_vs_sft/win_rate_{name}"], 0) for name in ("reward", "reward_b")]
    right, words = reward["accuracy"]["value"], reward["baselines"]["TF-IDF"]["value"]
    holds(0 < other < own, "the held-back reward rises, and by less")
    holds(right < figures["tiny"]["reward"]["accuracy"]["value"] and right < words, "half of the pairs is worse")
    return "\n".join(
        [
            f"On `tiny`, seed 0, {comparison['num_prompts']} prompts, the reward that PPO maximised rose by "
            f"{gain(metrics, 'ppo_vs_sft/reward_delta')} standard deviations of the SFT model's scores and the "
            f"held-back one by {gain(metrics, 'ppo_vs_sft/reward_b_delta')}; they won {wins[0]} and {wins[1]}",
            f"of the comparisons with SFT. {percent(1 - other / own, 0)} of the gain is the first model's own. Half "
            f"of the pairs make a poor reward model ({percent(right, 0)} right, TF-IDF {percent(words, 0)}; its gate "
            "finds an empty answer",
            f"better than {percent(reward['edits']['empty']['wins']['value'], 0)} of the good ones): by the judge its "
            f"policy is at {metrics['ppo/judge_mean']:.3f} for {metrics['ppo/kl_mean']:.2f} nats, that of all pairs at "
            f"{whole['ppo/judge_mean']:.3f} for {whole['ppo/kl_mean']:.2f}.",
        ]
    )


# ------------------------------------------------------------------------------------------- of docs/reward_report.md
def length_block(figures: Figures) -> str:
    """What decorrelation with length does where labels like length."""
    rows = figures["length"]
    first = rows[0]
    lines = [
        f"The longer argument convinces more in {percent(first['length']['labels'], 0)} of the {first['length']['n']} "
        f"held-out pairs that differ in length. The tiny SFT model, {first['train_pairs']:,} training pairs of at most "
        f"{first['settings']['max_length']} tokens, one epoch:",
        "",
        "| `length_decorrelation` | accuracy | where the shorter is better | prefers the longer "
        "| correlation with length | gain of saying it twice | gate |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        cells = [
            f"{row['settings']['length_decorrelation']:g}",
            percent(row["accuracy"]["value"]),
            percent_of(row["shorter"]),
            percent(row["length"]["model"]),
            f"{row['length']['correlation']:+.2f}",
            f"{row['edits']['repeated']['gain']['value']:+.2f} std",
            gate(row["gate"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", length_words(rows)])


def length_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table of `length_block` says."""
    first, some, much = rows
    half, most = (f"{row['settings']['length_decorrelation']:g}" for row in (some, much))
    alone = first["baselines"]["length-only"]["value"]
    shorter = [percent(row["shorter"]["value"]) for row in rows]
    holds(first["gate"]["names"] == ["length"], "the gate fails the model without the option for length")
    holds(all("baselines" in row["gate"]["names"] for row in (some, much)), "with it the gate names baselines")
    holds(some["accuracy"]["high"] < alone, "with some of it the model is worse than counting characters")
    holds(first["shorter"]["high"] < some["shorter"]["low"], "it is better where the shorter answer is")
    holds(much["accuracy"]["low"] < some["accuracy"]["value"] < much["accuracy"]["high"], "more of it changes little")
    return (
        f"Much of what this small model had learned was length. At {half} it is right on {shorter[1]} of the pairs "
        f"whose better answer is the shorter one, {shorter[0]} before,\n"
        "and what is left over all is less than counting characters alone (the length-only baseline) has: "
        f"{percent(alone)}; the gate says so. At {most} it is\n"
        f"{shorter[2]}, and {percent(much['accuracy']['value'])} over all. An option cannot put into a model what the "
        "data and the base do not have."
    )


def gate(found: Mapping[str, Any]) -> str:
    """The verdict and the checks that made it."""
    return ": ".join(filter(None, [found["verdict"], ", ".join(found["names"])]))


def example_block(figures: Figures) -> str:
    """The report on the reward model of `tiny`."""
    reward, others = figures["tiny"]["reward"], figures["orders"].values()
    asked, lead, edits = reward["gate"]["thresholds"], reward["leads"]["TF-IDF"], reward["edits"]
    points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * lead[key] for key in ("value", "low", "high")))
    thanks, twice, shuffled = (edits[name]["gain"] for name in ("thanks", "repeated", "shuffled"))
    right = [found["accuracy"]["value"] for found in (reward, *others)]
    padding = f"1e{math.ceil(math.log10(reward['padding']))}"  # the power of ten that is not exceeded
    error = [found["calibration"]["ece"] for found in (reward, *others)]
    holds(lead["value"] < 0, "TF-IDF leads")
    holds(thanks["high"] < 0 < twice["low"], "thanks lose and repetition gains")
    holds(abs(shuffled["value"]) < 0.05, "shuffling changes nearly nothing")
    return "\n".join(
        [
            "`make sft reward` with the `tiny` recipe (2 CPU cores, seed 0) ends with "
            f"`{gate(reward['gate']).upper()}`: {percent_of(reward['accuracy'])} of {reward['pairs']} held-out pairs "
            f"are ranked right, and TF-IDF ranks {percent(reward['baselines']['TF-IDF']['value'])} right.",
            f"By the default `min_lead: 0` that lead of {points} would "
            f"{'fail' if lead['high'] < 0 else 'be a warning'}. `tiny` asks for {100 * asked['min_lead']:.0f} points, "
            f"and lets an empty answer beat up to {percent(asked['max_empty_wins'], 0)} of the good ones "
            f"(default 50 %, here {percent(edits['empty']['wins']['value'])}): a model of",
            f"{figures['tiny']['parameters'] / 1e6:.1f} million weights without a pre-trained base is not expected to "
            "beat a bag of words, and half of its pairs make a worse one still. The calibration error is "
            f"{reward['calibration']['ece']:.3f} (allowed {asked['max_ece']:.3f}), and the margins fit better divided "
            f"by {reward['calibration']['temperature']:.2f}.",
            f"With seed 1 and with batches by length, four reward models in all, {percent(min(right))} to "
            f"{percent(max(right))} were ranked right, and the calibration error was {min(error):.3f} to "
            f"{max(error):.3f}.",
            f'Padding moves no score by more than {padding} standard deviations, "Thanks!" in front '
            f"of an answer loses {-thanks['value']:.1f}, saying it twice gains {twice['value']:.1f}. Shuffling the "
            f"words changes scores by {shuffled['value']:+.2f} on average: it reads words, not sentences.",
        ]
    )


# ----------------------------------------------------------------------------------------------------------- the pages
BLOCKS: dict[str, dict[str, Callable[[Figures], str]]] = {
    "README.md": {"run": run_block, "price": price_block},
    "docs/evaluation.md": {"frontier": frontier_block, "held-back": held_back_block},
    "docs/reward_report.md": {"length": length_block, "example": example_block},
}


def rendered(name: str, figures: Figures) -> str:
    """The page `name`, with every block from `figures`; see `with_measured` and `holds` for errors."""
    page = (ROOT / name).read_text(encoding="utf-8")
    for block, write in BLOCKS[name].items():
        page = with_measured(page, write(figures), block)
    return page


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", help="make the runs first; an hour on two CPU cores")
    parser.add_argument("--collect", action="store_true", help=f"write {RESULTS.name} from finished runs")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="artifact directory")
    parser.add_argument("--threads", type=int, default=2, help="of each stage")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make, collect, write the pages; the exit code is 0, or 2 where a run is missing or a sentence no longer holds."""
    args = parse(argv)
    try:
        if args.make:
            make(args)
        if args.collect:
            text = json.dumps(collect(args.artifacts), indent=1)
            RESULTS.write_text(text + "\n", encoding="utf-8")
        figures = json.loads(RESULTS.read_text(encoding="utf-8"))
        pages = {name: rendered(name, figures) for name in BLOCKS}
    except UserError as error:
        return fail(str(error))
    for name, page in pages.items():
        (ROOT / name).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
