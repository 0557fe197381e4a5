"""Labels that a reward model needs when pairs are selected: `python -m benchmarks.label_efficiency --embedder DIR`.

Active selection in rounds, as `make label-select` does it, on sets whose labels are known: 0.25 per cent of the labels
at random, then by each method up to a half, a Bradley-Terry head on frozen features after every round, accuracy on
pairs of topics or prompts that no label came from. RLHF_DATA names the folder of the sets; `--table` writes the page.

`--full MODEL --device cuda` trains whole reward models: on all labels, and on 20 per cent at random and selected. On a
CPU `--layers 4` makes a small model of the base's first layers. Each accuracy is written at once, and the same command
goes on after an interruption.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import t as student
from torch.nn import ModuleList

from benchmarks.start import with_measured
from rlhf.data import Renderer, load_data_recipe, load_rows
from rlhf.data.cleaning.semantic import load_embedder
from rlhf.data.recipe import SplitSpec
from rlhf.errors import UserError
from rlhf.labels.features import embedding_differences, longer, pair_ids, state_differences, word_differences
from rlhf.labels.selection import METHODS, Pool, fit, prepared, select

SETS = ("ukp_convarg1_dev", "rmb_harmless_dev")
# What accuracies of --full that stand side by side have in common.
FULL_SETTINGS = ("layers", "epochs", "least_steps", "batch", "learning_rate", "max_length", "method", "limit", "device")
SHOWN_SETTINGS = ("epochs", "least_steps", "batch", "learning_rate", "max_length", "limit", "device")
SIDES = ("chosen_ids", "rejected_ids")
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
SEEDS = 5
TEST_SHARE = 0.25  # of the topics or prompts
GOAL_SHARE = 0.2
TARGET = 0.95  # of the full-data accuracy above chance: how many labels until there?
MAX_LENGTH = 256  # tokens of prompt and response that a model's features see
RESAMPLES = 2000
ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "label_efficiency.json"
PAGE = ROOT.parent / "docs" / "label_efficiency.md"


# ------------------------------------------------------------------------------------------------------------ the data
def load_set(name: str, limit: int | None = None) -> tuple[list[dict], np.ndarray]:
    """All pairs of a set, `response_a` the preferred one, and each pair's group: its topic, or its prompt."""
    recipe = load_data_recipe(name)
    whole = recipe.model_copy(update={"clean": [], "split": SplitSpec(fractions={"all": 1.0})})
    pairs = load_rows(whole, "all", "pairs", limit=limit)
    prompts = [pair["prompt"] if isinstance(pair["prompt"], str) else json.dumps(pair["prompt"]) for pair in pairs]
    return pairs, np.unique([prompt.split(" Stance:")[0] for prompt in prompts], return_inverse=True)[1]


def features_of(pairs: list[dict], kind: str, source: str | None, device: str) -> np.ndarray:
    """[N,D] feature differences of the pairs."""
    if kind == "words":
        return word_differences(pairs)
    if kind == "embedder":
        return embedding_differences(pairs, load_embedder(source, device=device))
    tokenizer, model = load_causal(source)
    return state_differences(pairs, model.to(device), Renderer(tokenizer, False), MAX_LENGTH)


def load_causal(source: str) -> tuple[Any, Any]:
    """Tokenizer and model of a folder, or the base of a recipe (`smollm2`)."""
    from rlhf.models import load_base_model, load_base_tokenizer, load_model, load_tokenizer
    from rlhf.recipe import load_recipe

    if Path(source).is_dir():
        return load_tokenizer(source), load_model(source)
    section = load_recipe(source).model
    tokenizer = load_base_tokenizer(section)
    return tokenizer, load_base_model(section, tokenizer)


def cached(path: Path | None, compute: Any) -> np.ndarray:
    """What `compute` gives, from `path` where it is there."""
    if path is None:
        return compute()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, compute().astype(np.float32))
    return np.load(path).astype(np.float64)


def held_out(groups: np.ndarray, seed: int) -> np.ndarray:
    """[N] bool: the pairs of a quarter of the groups."""
    order = np.random.default_rng([seed, 1]).permutation(groups.max() + 1)
    return np.isin(groups, order[: math.ceil(TEST_SHARE * len(order))])


# ---------------------------------------------------------------------------------------------------------- the rounds
def rounds(pairs: np.ndarray, method: str, seed: int, shares: tuple[float, ...]) -> list[np.ndarray]:
    """Rows that have a label after each round. `pairs` have the preferred response first; selection never sees that."""
    rng = np.random.default_rng([seed, 2])
    shown = pairs * rng.choice([-1.0, 1.0], size=(len(pairs), 1))
    picked = rng.permutation(len(pairs))[: max(2, round(shares[0] * len(pairs)))]
    found = [picked]
    for share in shares[1:]:
        rest = np.setdiff1d(np.arange(len(pairs)), picked)
        pool = Pool(shown[rest], pairs[picked])
        more = round(share * len(pairs)) - len(picked)
        if more > 0:
            picked = np.concatenate([picked, rest[select(method, pool, more, seed).rows]])
        found.append(picked)
    return found


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins; ties count one half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def sweep(
    pairs: np.ndarray, groups: np.ndarray, methods: list[str], seeds: int, shares: tuple[float, ...] = SHARES
) -> dict[str, list[list[float]]]:
    """Held-out accuracy by method, seed and share."""
    found: dict[str, list[list[float]]] = {method: [] for method in methods}
    for seed in range(seeds):
        test = held_out(groups, seed)
        train, held = pairs[~test], pairs[test]
        whole = accuracy(held @ fit(train))
        for method in methods:
            steps = rounds(train, method, seed, shares[:-1])
            found[method].append([accuracy(held @ fit(train[rows])) for rows in steps] + [whole])
            print(f"  seed {seed} {method}: " + " ".join(f"{value:.3f}" for value in found[method][-1]), flush=True)
    return found


# -------------------------------------------------------------------------------------------------------- the summary
def summary(found: dict[str, list[list[float]]], shares: tuple[float, ...]) -> dict[str, Any]:
    """Means with 95 % intervals over seeds, what is kept at 20 %, and labels needed, against random."""
    random = np.array(found["random"])
    goal = shares.index(GOAL_SHARE)
    result = {}
    for method in (method for method in METHODS if method in found):
        values = np.array(found[method])
        kept = (values[:, goal] - 0.5) / (values[:, -1] - 0.5)
        result[method] = {
            "accuracy": [interval(column) for column in values.T],
            "kept_at_goal": interval(kept),
            "gain_at_goal": interval(values[:, goal] - random[:, goal]),
            "gain_over_curve": interval((values - random)[:, 1:-1].mean(axis=1)),
            "by_seed": values.round(5).tolist(),
        } | saving(values, random, shares)
    return result


def interval(values: np.ndarray) -> list[float]:
    """Mean and the limits of its 95 % interval over seeds (Student)."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return [round(mean, 5), round(mean - half, 5), round(mean + half, 5)]


def saving(values: np.ndarray, random: np.ndarray, shares: tuple[float, ...]) -> dict[str, list[float]]:
    """Share of the labels until `TARGET` of the full accuracy above chance, and random's share over it.

    Of mean curves made monotone (isotonic regression), so that a lucky bump of one point decides nothing; with 95 %
    bootstrap intervals over seeds.
    """
    rng = np.random.default_rng(0)
    found = []
    for draw in [np.arange(len(values)), *rng.integers(len(values), size=(RESAMPLES, len(values)))]:
        ours, theirs = (monotone(curve[draw].mean(axis=0)) for curve in (values, random))
        target = 0.5 + TARGET * (values[draw, -1].mean() - 0.5)
        share = needed(ours, target, shares)
        found.append((share, needed(theirs, target, shares) / share))
    low, high = np.percentile(found[1:], [2.5, 97.5], axis=0)
    names = ("labels_to_target", "fewer_labels")
    return {name: [round(float(x[i]), 4) for x in (found[0], low, high)] for i, name in enumerate(names)}


def monotone(curve: np.ndarray) -> np.ndarray:
    """The nearest curve that never falls."""
    return isotonic_regression(curve).x


def needed(curve: np.ndarray, target: float, shares: tuple[float, ...]) -> float:
    """Share of labels at which a rising curve reaches `target` (between its points linear in the log); 1 if never."""
    at = int(np.argmax(curve >= target - 1e-9))
    if curve[at] < target - 1e-9:
        return 1.0
    if at == 0:
        return shares[0]
    part = (target - curve[at - 1]) / (curve[at] - curve[at - 1])
    return math.exp(math.log(shares[at - 1]) + part * math.log(shares[at] / shares[at - 1]))


# ------------------------------------------------------------------------------------------------- whole reward models
def full(args: argparse.Namespace, entries: list[dict[str, Any]], save: Any) -> None:
    """Train whole reward models on all labels, and on 20 % at random and by `--method`.

    Args:
        args: of the command line.
        entries: of the report, extended in place: {model, of_layers, settings, sets: {name: {pairs, runs}}}, where a
            run is {labels, accuracy, minutes} by seed and arm. What is there with these settings is not trained again.
        save: called after each run.
    """
    from rlhf.models import load_model, load_tokenizer

    entry = full_entry(entries, Path(args.full).name, {key: getattr(args, key) for key in FULL_SETTINGS})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = load_causal(args.full)
        entry["of_layers"] = model.config.num_hidden_layers
        if args.layers is not None:
            keep_first_layers(model, args.layers)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokenizer, model = load_tokenizer(folder), load_model(folder).to(args.device)
        for name in args.data:
            x, groups, ids = full_pairs(args, name, tokenizer, model, title(entry))
            found = entry["sets"].get(name)
            if found is None or found["pairs"] != len(x):  # the data have changed
                found = entry["sets"][name] = {"pairs": len(x), "runs": {}}
            for seed in range(args.seeds):
                runs = found["runs"].setdefault(str(seed), {})
                for arm, run in full_runs(args, folder, tokenizer, ids, x, groups, seed, runs):
                    runs[arm] = run
                    print(f"  full, {name}, seed {seed} {arm}: {json.dumps(run)}", flush=True)
                    save()


def full_entry(entries: list[dict[str, Any]], model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The entry of this model and these settings: the one that is there, or a new one."""
    same = [entry for entry in entries if (entry["model"], entry["settings"]) == (model, settings)]
    if not same:
        entries.append({"model": model, "settings": settings, "sets": {}})
    return (same or entries)[-1]


def keep_first_layers(model: Any, count: int) -> None:
    """Make `model` the smaller one of its first `count` layers; embedding, last norm and head stay.

    Raises:
        UserError: it does not have as many, or they are not found.
    """
    config = model.config
    if not 1 <= count <= config.num_hidden_layers:
        raise UserError(f"--layers {count}: the model has {config.num_hidden_layers} layers")
    for module in list(model.base_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ModuleList) and len(child) == config.num_hidden_layers:
                setattr(module, name, child[:count])
                config.num_hidden_layers = count
                if getattr(config, "layer_types", None):  # kinds of attention by layer
                    config.layer_types = config.layer_types[:count]
                return
    raise UserError(f"--layers: no list of {config.num_hidden_layers} layers in a {type(model).__name__}")


def full_pairs(args: argparse.Namespace, name: str, tokenizer: Any, model: Any, label: str) -> tuple[Any, Any, Any]:
    """Of the pairs that fit: what selection sees of them, their groups, and the ids of both sides."""
    renderer = Renderer(tokenizer, False)
    pairs, groups = load_set(name, args.limit)
    file = args.cache / f"{Path(name).stem}_{label}_{len(pairs)}.npy" if args.cache else None
    raw = cached(file, lambda: state_differences(pairs, model, renderer, MAX_LENGTH))
    ids = [[pair_ids(pair, side, renderer) for pair in pairs] for side in ("response_a", "response_b")]
    fits = np.array([max(len(a), len(b)) <= args.max_length for a, b in zip(*ids, strict=True)])
    ids = [[row for row, keep in zip(side, fits, strict=True) if keep] for side in ids]
    return prepared(raw, longer(pairs))[fits], groups[fits], ids


def full_runs(
    args: argparse.Namespace, folder: str, tokenizer: Any, ids: Any, x: np.ndarray, groups: Any, seed: int, done: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm and run of one seed, without those that are `done`."""
    shares = tuple(share for share in SHARES if share <= GOAL_SHARE)
    test = held_out(groups, seed)
    train = np.flatnonzero(~test)
    for arm in full_arms(args.method):
        if arm not in done:
            rows = train if arm == "all" else train[rounds(x[train], arm, seed, shares)[-1]]
            began = time.monotonic()
            found = train_and_test(args, folder, tokenizer, ids, rows, np.flatnonzero(test), seed)
            minutes = round((time.monotonic() - began) / 60, 1)
            yield arm, {"labels": len(rows), "accuracy": found, "minutes": minutes}


def full_summary(found: dict[str, Any], method: str) -> dict[str, Any]:
    """By arm the accuracy, and what its labels keep of the full accuracy above chance; of seeds that have every arm."""
    arms = full_arms(method)
    whole = [[runs[arm]["accuracy"] for arm in arms] for runs in found["runs"].values() if set(arms) <= set(runs)]
    columns = np.array(whole).reshape(-1, len(arms)).T
    above = columns - 0.5
    values = {
        arm: {"accuracy": interval(columns[place]), "kept_at_goal": interval(above[place] / above[0])}
        for place, arm in enumerate(arms if whole else ())
    }
    return {"seeds": len(whole), "arms": values}


def full_arms(method: str) -> list[str]:
    """What labels a reward model is trained on: all, 20 % at random, and 20 % selected."""
    return list(dict.fromkeys(("all", "random", method)))


def title(entry: dict[str, Any]) -> str:
    """The model of --full in words."""
    layers = entry["settings"]["layers"]
    return entry["model"] + (f", first {layers} of {entry['of_layers']} layers" if layers else "")


def train_and_test(
    args: argparse.Namespace, folder: str, tokenizer: Any, ids: Any, rows: np.ndarray, test: np.ndarray, seed: int
) -> float:
    """Held-out accuracy of a reward model that the reward stage's trainer made of the pairs `rows`."""
    from datasets import Dataset

    from benchmarks.reward_vs_trl import our_trainer, train_plain
    from rlhf.models import new_reward_model
    from rlhf.sampling import score_sequences

    pairs = Dataset.from_dict({name: [side[row] for row in rows] for name, side in zip(SIDES, ids, strict=True)})
    # So few labels are read more often: with as many passes there would be hardly a step.
    epochs = max(args.epochs, math.ceil(args.least_steps * args.batch / len(rows)))
    options = argparse.Namespace(**vars(args) | {"epochs": epochs, "compile": "off", "graphs": "auto"})
    with tempfile.TemporaryDirectory() as root:
        trainer = our_trainer(options, new_reward_model(folder, seed), tokenizer, pairs, Path(root), seed)
        train_plain(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    sides = [[tuple(side[row]) for row in test] for side in ids]
    texts = sorted(set(sides[0] + sides[1]))  # many pairs are of few answers
    scores = dict(zip(texts, score_sequences(model, [list(ids) for ids in texts], tokenizer.pad_token_id), strict=True))
    return accuracy(np.array([scores[a] - scores[b] for a, b in zip(*sides, strict=True)]))


# ------------------------------------------------------------------------------------------------------------ the page
def tables(report: dict[str, Any]) -> str:
    """The measured tables of docs/label_efficiency.md, in Markdown."""
    columns = [report["shares"].index(share) for share in (0.05, 0.1, 0.2, 0.5, 1.0)]
    lines = []
    for name, kinds in report["sets"].items():
        for entry in kinds.values():
            lines += [
                "",
                f"**`{name}`, {entry['features']}** ({entry['pairs']} pairs in {entry['groups']} groups)",
                "",
                "| method | 5 % | 10 % | 20 % | 50 % | 100 % | kept at 20 % | against random at 20 % | fewer labels |",
                "| --- " * 9 + "|",
            ]
            for method, values in entry["methods"].items():
                cells = [_points(values["accuracy"][column]) for column in columns]
                cells.append(_percent(values["kept_at_goal"]))
                fewer = "{:.2f}x [{:.2f}, {:.2f}]".format(*values["fewer_labels"])
                cells += ["-", "-"] if method == "random" else [_points(values["gain_at_goal"], sign="+"), fewer]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_full_table(report.get("full", []))]).strip()


def _full_table(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        sets = {name: full_summary(found, entry["settings"]["method"]) for name, found in entry["sets"].items()}
        sets = {name: found for name, found in sets.items() if found["seeds"]}
        if not sets:
            continue
        shown = {key.replace("_", " "): entry["settings"][key] for key in SHOWN_SETTINGS}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
        lines += ["", f"**Whole reward models, {title(entry)}** ({settings})", ""]
        lines += ["| set | seeds | labels | accuracy | kept of all labels |", "| --- " * 5 + "|"]
        for name, found in sets.items():
            for arm, values in found["arms"].items():
                share = "all" if arm == "all" else f"20 %, {arm}"
                kept = "-" if arm == "all" else _percent(values["kept_at_goal"])
                lines.append(f"| `{name}` | {found['seeds']} | {share} | {_points(values['accuracy'])} | {kept} |")
    return lines


def _points(values: list[float], sign: str = "") -> str:
    if math.isnan(values[1]):  # of one seed
        return f"{100 * values[0]:{sign}.1f}"
    return f"{{:{sign}.1f}} [{{:{sign}.1f}}, {{:{sign}.1f}}]".format(*(100 * value for value in values))


def _percent(values: list[float]) -> str:
    if math.isnan(values[1]):
        return f"{100 * values[0]:.0f} %"
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * value for value in values))


def with_tables(page: str, report: dict[str, Any]) -> str:
    """The page with fresh tables between its two marks."""
    return with_measured(page, tables(report))


def measure(args: argparse.Namespace, name: str, entries: dict[str, Any]) -> None:
    """Sweep one set with each kind of features that is asked for; adds to `entries`."""
    pairs, groups = load_set(name, args.limit)
    wanted = {"words": "TF-IDF" if args.words else None, "embedder": args.embedder, "model": args.model}
    for kind, source in wanted.items():
        if source is None:
            continue
        label = Path(source).name
        print(f"{name}, {label}: {len(pairs)} pairs, {groups.max() + 1} groups", flush=True)
        file = args.cache / f"{name}_{label}_{len(pairs)}.npy" if args.cache else None
        raw = cached(file, partial(features_of, pairs, kind, source, args.device))
        title = label if args.seeds == SEEDS else f"{label}, {args.seeds} seeds"
        old = entries.get(title, {"methods": {}})["methods"]
        found = {method: values["by_seed"] for method, values in old.items() if method not in args.methods}
        found |= sweep(prepared(raw, longer(pairs)), groups, args.methods, args.seeds)
        entry = {"features": title, "pairs": len(pairs), "groups": int(groups.max()) + 1, "seeds": args.seeds}
        entries[title] = entry | {"methods": summary(found, SHARES)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="*", default=list(SETS))
    parser.add_argument("--words", action="store_true", help="also features from TF-IDF")
    parser.add_argument("--embedder", help="folder of a sentence-transformers model: features from it")
    parser.add_argument("--model", help="folder of a causal model, or a recipe whose base it is: features from it")
    parser.add_argument("--cache", type=Path, help="folder where features are kept")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="others keep the figures they have (all)")
    parser.add_argument("--limit", type=int, help="pairs of each set (all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help=f"only write the tables of {PAGE.name}")
    parser.add_argument("--full", metavar="MODEL", help="train whole reward models from this folder, or recipe's base")
    parser.add_argument("--layers", type=int, help="of --full: the first of the base alone (all)")
    parser.add_argument("--method", default="mix", choices=list(METHODS), help="of --full")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--least-steps", type=int, default=150, help="more epochs where labels are so few")
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; longer pairs are left out of --full")
    return parser.parse_args(argv)


def save(out: Path, report: dict[str, Any]) -> None:
    """Write the JSON file, whole or not at all, and the page where it is the project's."""
    new = out.with_name(f"{out.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(new, out)
    if out == RESULTS:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Measure, add the results to the JSON file, write the tables."""
    args = arguments(argv)
    report = json.loads(args.out.read_text()) if args.out.is_file() else {"shares": list(SHARES), "sets": {}}
    if args.full:
        full(args, report.setdefault("full", []), partial(save, args.out, report))
    elif not args.table:
        for name in args.data:
            measure(args, name, report["sets"].setdefault(name, {}))
    save(args.out, report)


if __name__ == "__main__":
    main()
