"""Cross-validation of a reward model over prompts, beside TF-IDF, on one or several preference sets.

    export RLHF_DATA=/folder/of/the/data
    make convert RECIPE=smollm2
    python -m benchmarks.reward_cv --base bases/smollm2 --chat --out cv.json \
        --data rmb_harmless_dev rmb_helpful_dev ukp_convarg1_dev hh_harmless_dev

All sets are cut into the same number of folds by prompt. For each fold one reward model is trained on the other folds
of all sets together, and on each set measured on the fold: accuracy, accuracy where the better answer is the shorter
one, the lead over TF-IDF (fitted on the same folds of that set) with a paired bootstrap over prompts, and accuracy of
the sum of both. A fold is written when it is done, and the same command continues. `key=value` are settings of the
recipe's `reward` section.

The base must not know the pairs: an SFT model that was taught the preferred answers of these sets has seen the fold.
`--sft-epochs` does it for each fold, without the fold. `--members` averages reward models of several seeds.
`--only` makes some of the folds; `--publish` puts files together. `--compare "as it is=a.json" "one epoch=b.json"`
writes a table of several settings on the same folds, each beside the first, with a paired bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import RewardConfig, SFTConfig

from benchmarks.start import with_measured
from pipelines.cli import keep_freed_memory
from rlhf.artifacts import sha256_json, write_json
from rlhf.data import Renderer, load_data_recipe, load_rows
from rlhf.data.splits import group_key
from rlhf.evaluation.statistics import bootstrap_interval
from rlhf.models import check_position_limit, load_model, load_tokenizer, new_reward_model
from rlhf.recipe import Recipe, apply_override
from rlhf.reward import train as reward
from rlhf.reward.baselines import tfidf_baseline
from rlhf.sampling import score_sequences
from rlhf.sft import ExactSFTTrainer, rendered_rows
from rlhf.stage import StageContext, git_commit, package_versions
from rlhf.trainers import trainer_args
from rlhf.yamlio import validate

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "reward_cv.json"
SETTINGS = RESULTS.with_name("reward_cv_settings.json")
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
RUN = "cv"  # folder below the artifact directory; TF-IDF's margins are always there


def folds_of(rows: Sequence[Row], folds: int, seed: int) -> list[int]:
    """The fold of each row: prompts in a seeded order, dealt out; rows of a prompt share one."""
    keys = sorted({group_key(row["prompt"]) for row in rows})
    random.Random(seed).shuffle(keys)
    fold = {key: place % folds for place, key in enumerate(keys)}
    return [fold[group_key(row["prompt"])] for row in rows]


def load_sets(names: Sequence[str], root: Path, limit: int | None) -> dict[str, list[Row]]:
    """All rows of each data recipe, whatever split they are in."""
    sets = {}
    for name in names:
        recipe = load_data_recipe(name)
        rows = [row for split in recipe.split.names for row in load_rows(recipe, split, "preference", root=root)]
        sets[recipe.name] = rows[:limit]
    return sets


def recipe_of(args: argparse.Namespace) -> Recipe:
    """A recipe with the reward section that was asked for."""
    data: dict[str, Any] = {"name": "cv", "model": {"base": args.base, "chat": args.chat}, "sft": {"data": "none"}}
    data |= {"reward": {"data": "none", "trainer": {}}, "hardware": {"device": args.device}}
    data["logging"] = {"report_to": []}
    for override in args.overrides:
        apply_override(data, f"reward.{override}")
    return validate(Recipe, data, "benchmark")


def preferred(rows: list[Row], renderer: Renderer, max_length: int) -> Any:
    """The preferred answers of `rows`, tokenised for SFT."""
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return rendered_rows(texts, renderer, max_length, "cv sft")


def tuned_base(args: argparse.Namespace, ctx: StageContext, renderer: Renderer, data: Any) -> Path:
    """The base after `--sft-epochs` on `data`."""
    options = {"num_train_epochs": args.sft_epochs, "learning_rate": args.sft_learning_rate, "warmup_steps": 20}
    options |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "save_strategy": "no"}
    options |= {"train_sampling_strategy": "group_by_length", "disable_tqdm": True, "eval_strategy": "no"}
    config = trainer_args(SFTConfig, options, ctx, max_length=None, completion_only_loss=True)
    trainer = ExactSFTTrainer(
        load_model(args.base), args=config, train_dataset=data, processing_class=renderer.tokenizer
    )
    trainer.graph_steps("sft", "auto")
    trainer.earlier, trainer.began = {}, time.time()
    trainer.train()
    folder = ctx.dir / "sft"
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


def train(args: argparse.Namespace, recipe: Recipe, rows: list[Row], root: Path) -> tuple[list[Any], Renderer, float]:
    """Reward models of `rows`, `--members` of them, their renderer, and the seconds that training took.

    Loading, recording of graphs and saving between SFT and reward models count; tokenisation of the rows does not.
    """
    ctx = StageContext(reward.STAGE, recipe, root, args.run)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    check_position_limit(args.base, recipe.reward.max_length, "max_length")
    tokenizer = load_tokenizer(args.base)
    renderer = Renderer(tokenizer, args.chat)
    pairs, _ = reward.training_pairs(rows, renderer, recipe.reward, args.seed, "cv")
    answers = preferred(rows, renderer, recipe.reward.max_length) if args.sft_epochs else None
    options = {"train_sampling_strategy": "group_by_length", "save_strategy": "no", "disable_tqdm": True}
    started, members = time.perf_counter(), []
    base = tuned_base(args, ctx, renderer, answers) if args.sft_epochs else Path(args.base)
    ctx.inputs["sft"] = SimpleNamespace(model_dir=base)  # of reward.lm_coef
    for seed in range(args.seed, args.seed + args.members):
        config = trainer_args(RewardConfig, options | recipe.reward.trainer, ctx, max_length=None)
        config.seed = config.data_seed = seed
        torch.manual_seed(seed)
        trainer = reward.reward_trainer(ctx, new_reward_model(base, seed), config, tokenizer, pairs, pairs)
        trainer.earlier, trainer.began = {}, time.time()
        trainer.train()
        members.append(trainer.accelerator.unwrap_model(trainer.model).eval())
    return members, renderer, time.perf_counter() - started


def margins_of(members: Sequence[Any], renderer: Renderer, pairs: Any) -> np.ndarray:
    """[n], score of the chosen minus that of the rejected sequence; of several models the mean, each by its own std."""
    pad, margins = renderer.tokenizer.pad_token_id, []
    for model in members:
        with torch.compiler.set_stance("force_eager"):
            chosen, rejected = (score_sequences(model, pairs[side], pad) for side in ("chosen_ids", "rejected_ids"))
        margin = np.array(chosen) - np.array(rejected)
        margins.append(margin / margin.std() if len(members) > 1 else margin)
    return np.mean(margins, axis=0)


def right(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer leads, one half for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def tfidf_margins(kept: Path, training: list[Row], rows: list[Row]) -> list[float]:
    """TF-IDF's, fitted on the training pairs of one set; kept for the next reward model on these folds."""
    key = sha256_json([[(row["chosen"], row["rejected"]) for row in part] for part in (training, rows)])
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if key not in found:
        found = {key: np.asarray(tfidf_baseline(training, rows).margins).round(6).tolist()}
        mine = kept.with_name(f"{kept.stem}-{os.getpid()}.json")  # another setting may be at the same fold
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(mine, found)
        os.replace(mine, kept)
    return found[key]


def run_fold(args: argparse.Namespace, sets: dict[str, list[Row]], fold: int, root: Path) -> dict[str, Any]:
    """Train without a fold, measure on it; per set the margins of both models."""
    known = {name: folds_of(rows, args.folds, args.seed) for name, rows in sets.items()}
    training = {
        name: [row for row, at in zip(rows, known[name], strict=True) if at != fold] for name, rows in sets.items()
    }
    held = {name: [row for row, at in zip(rows, known[name], strict=True) if at == fold] for name, rows in sets.items()}
    mixed = [row for rows in training.values() for row in rows]
    random.Random(args.seed).shuffle(mixed)
    recipe = recipe_of(args)
    members, renderer, seconds = train(args, recipe, mixed, root)
    result: dict[str, Any] = {"fold": fold, "train_pairs": len(mixed), "seconds": seconds, "sets": {}}
    for name in held:
        pairs, rows = reward.rendered_pairs(held[name], renderer, recipe.reward.max_length, name)
        kept = root / RUN / f"tfidf-margins-{name}-{args.folds}-{args.seed}-{fold}.json"
        margins = margins_of(members, renderer, pairs)
        result["sets"][name] = {
            "prompts": [group_key(row["prompt"]) for row in rows],
            "model": margins.round(6).tolist(),
            "tfidf": tfidf_margins(kept, training[name], rows),
            "shorter": [len(row["chosen"]) < len(row["rejected"]) for row in rows],
            "too_long": len(held[name]) - len(rows),
        }
        print(f"fold {fold} {name}: {np.mean(right(margins)):.3f}", file=sys.stderr, flush=True)
    return result


def joined(folds: Sequence[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """[pairs], over the folds: verdicts of both models and of their sum, each in its own standard deviations."""
    parts = [fold["sets"][name] for fold in folds]
    margins = {key: [np.array(part[key]) for part in parts] for key in ("model", "tfidf")}
    scaled = {key: [margin / (margin.std() or 1.0) for margin in values] for key, values in margins.items()}
    margins["both"] = [sum(pair) for pair in zip(*scaled.values(), strict=True)]
    verdicts = {key: right(np.concatenate(values)) for key, values in margins.items()}
    return verdicts | {key: np.concatenate([part[key] for part in parts]) for key in ("shorter", "prompts")}


def summary(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers alone, no text of the sets, of the folds in one or several files of the same settings.

    Raises:
        SystemExit: the files do not belong together.
    """
    about = states[0]["about"]
    folds = sorted((fold for state in states for fold in state["folds"]), key=lambda fold: fold["fold"])
    numbers = [fold["fold"] for fold in folds]
    if any(state["about"] != about for state in states) or len(set(numbers)) < len(numbers):
        raise SystemExit("error: the files hold other settings, or a fold twice: name those of one cross-validation")
    sets = {}
    for name in folds[0]["sets"]:
        found = joined(folds, name)
        prompts, short = found["prompts"].tolist(), found["shorter"].astype(bool)
        sets[name] = {"pairs": len(short), "shorter_is_better": int(short.sum())}
        for key in ("model", "tfidf", "both"):
            sets[name][key] = {"all": float(found[key].mean())}
            if short.any():
                sets[name][key]["shorter"] = float(found[key][short].mean())
            lead = bootstrap_interval(found[key] - found["tfidf"], clusters=prompts)
            sets[name][key]["lead"] = [lead.value, lead.low, lead.high]
    told = {"folds": numbers, "train_pairs": [fold["train_pairs"] for fold in folds]}
    told["seconds"] = [round(fold["seconds"], 1) for fold in folds]
    return {"about": about} | {key: states[0].get(key) for key in ("commit", "packages")} | told | {"sets": sets}


def table(found: dict[str, Any]) -> str:
    """Markdown of a `summary`."""
    lines = [
        "| set | pairs | TF-IDF | reward model | lead [95 %] | sum of both | lead [95 %] | shorter is better | "
        "TF-IDF | reward model | sum of both |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["sets"].items():
        cells = [name, f"{row['pairs']:,}", f"{row['tfidf']['all']:.3f}"]
        for key in ("model", "both"):
            value, low, high = row[key]["lead"]
            cells += [f"{row[key]['all']:.3f}", f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"]
        cells.append(f"{row['shorter_is_better']:,}")
        cells += [f"{row[key]['shorter']:.3f}" if "shorter" in row[key] else "-" for key in ("tfidf", "model", "both")]
        lines.append(f"| {' | '.join(cells)} |")
    low, high = min(found["seconds"]), max(found["seconds"])
    return "\n".join(lines) + f"\n\n{len(found['folds'])} folds, {low:.0f} to {high:.0f} s of training each."


def beside(found: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, Any]:
    """A setting on one set beside the first one, both as `joined` gives them.

    Returns:
        `pairs`; `all` and `tfidf`, accuracies; `shorter` and `tfidf_shorter`, those where the shorter answer is better
        (if there are such pairs); `lead` over the first setting with its limits.
    """
    short = first["shorter"].astype(bool)
    lead = bootstrap_interval(found["model"] - first["model"], clusters=first["prompts"].tolist())
    row = {"pairs": len(short), "all": float(found["model"].mean()), "lead": [lead.value, lead.low, lead.high]}
    row |= {"tfidf": float(first["tfidf"].mean())}
    if short.any():
        row |= {"shorter": float(found["model"][short].mean()), "tfidf_shorter": float(first["tfidf"][short].mean())}
    return row


def prompts_of(sets: dict[str, dict[str, np.ndarray]]) -> dict[str, list[str]]:
    """Per set the prompt of each pair."""
    return {name: found["prompts"].tolist() for name, found in sets.items()}


def compared(files: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """Several settings, each with its name, on the same folds of the same sets.

    Returns:
        Per setting: its name, `seconds` of each fold, per set what `beside` finds, settings and commit.

    Raises:
        SystemExit: two files do not hold the same pairs.
    """
    rows: list[dict[str, Any]] = []
    first: dict[str, dict[str, np.ndarray]] = {}
    for label, path in files:
        state = json.loads(path.read_text(encoding="utf-8"))
        folds = sorted(state["folds"], key=lambda fold: fold["fold"])
        found = {name: joined(folds, name) for name in folds[0]["sets"]}
        first = first or found
        if prompts_of(found) != prompts_of(first):
            raise SystemExit(f"error: {path} has other sets or pairs than {files[0][1]}: compare the same folds")
        told = {"setting": label, "about": state["about"], "commit": state.get("commit")}
        told["seconds"] = [round(fold["seconds"], 1) for fold in folds]
        rows.append(told | {"sets": {name: beside(found[name], first[name]) for name in first}})
    return rows


def mean_of(sets: dict[str, Any], key: str) -> str:
    """Mean of a number over the sets that have it, as text."""
    return f"{np.mean([found[key] for found in sets.values() if key in found]):.3f}"


def settings_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of `compared`: a line for each setting below that of TF-IDF."""
    sets = rows[0]["sets"]
    lines = [f"| setting | seconds | {' | '.join(sets)} | shorter is better, mean of the sets |"]
    lines.append("| --- " * (len(sets) + 3) + "|")
    words = " | ".join(f"{found['tfidf']:.3f}" for found in sets.values())
    lines.append(f"| TF-IDF | - | {words} | {mean_of(sets, 'tfidf_shorter')} |")
    for row in rows:
        cells = [row["setting"], f"{np.mean(row['seconds']):.0f}"]
        for found in row["sets"].values():
            lead = "({:+.3f} [{:+.3f}, {:+.3f}])".format(*found["lead"])
            cells.append(f"{found['all']:.3f}" + (f" {lead}" if row is not rows[0] else ""))
        lines.append(f"| {' | '.join(cells)} | {mean_of(row['sets'], 'shorter')} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="of the reward section, such as loss=smoothed trainer.learning_rate=1e-5"
    )
    parser.add_argument("--publish", nargs="+", type=Path, help="files of --out: their table into docs/results.md")
    parser.add_argument(
        "--compare", nargs="+", metavar="LABEL=FILE", help="files of --out, into docs/results.md as well"
    )
    parser.add_argument("--base", help="folder of the model that the reward model starts from")
    parser.add_argument("--data", nargs="+", help="data recipes")
    parser.add_argument("--chat", action="store_true", help="render with the model's chat template")
    parser.add_argument("--sft-epochs", type=float, default=0, help="first on the preferred answers of the same folds")
    parser.add_argument("--sft-learning-rate", type=float, default=3e-5)
    parser.add_argument("--members", type=int, default=1, help="reward models that differ in their seed, averaged")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", help="these folds alone")
    parser.add_argument("--limit", type=int, help="rows of each set, to try it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifacts", default="artifacts", help="where cleaned data go")
    parser.add_argument(
        "--run", default=RUN, help="folder in there for what is trained: another for each of two at once"
    )
    parser.add_argument("--out", help="JSON file; what it holds already is not done again")
    args = parser.parse_intermixed_args()
    if not (args.publish or args.compare) and not (args.base and args.data and args.out):
        parser.error("give --base, --data and --out, or --publish, or --compare")
    if args.publish and args.compare:
        parser.error("--publish and --compare write different tables: give one of them")
    if unnamed := [item for item in args.compare or [] if not item.rpartition("=")[0]]:
        parser.error(f"--compare {unnamed[0]}: give LABEL=FILE")
    return args


def publish(files: Sequence[Path]) -> None:
    """Write the summary and its table."""
    found = summary([json.loads(path.read_text(encoding="utf-8")) for path in files])
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_measured(PAGE.read_text(encoding="utf-8"), table(found), "reward_cv"), encoding="utf-8")


def publish_settings(files: Sequence[str]) -> None:
    """Write what `compared` finds, and its table."""
    pairs = [(label, Path(path)) for label, _, path in (item.rpartition("=") for item in files)]
    rows = compared(pairs)
    SETTINGS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = with_measured(PAGE.read_text(encoding="utf-8"), settings_table(rows), "reward_cv_settings")
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print, write after each fold."""
    keep_freed_memory()
    args = parse()
    if args.publish:
        return publish(args.publish)
    if args.compare:
        return publish_settings(args.compare)
    out, root = Path(args.out), Path(args.artifacts)
    about = {
        key: value
        for key, value in vars(args).items()
        if key not in ("out", "only", "artifacts", "run", "base", "publish", "compare")
    }
    state = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"about": about, "folds": []}
    if state["about"] != about:
        raise SystemExit(f"error: {out} was measured with {state['about']}: name another file")
    sets = load_sets(args.data, root, args.limit)
    for fold in args.only or range(args.folds):
        if fold not in {done["fold"] for done in state["folds"]}:
            state["folds"].append(run_fold(args, sets, fold, root))
            state |= {"commit": git_commit(), "packages": package_versions()}
            out.write_text(json.dumps(state), encoding="utf-8")
    print(table(summary([state])))


if __name__ == "__main__":
    main()
