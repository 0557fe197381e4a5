"""The report on a reward model, which `make reward` ends with and `make report STAGE=reward` redoes.

`measure` asks everything once and returns plain data, `report.json`. The page, the tables, the figures and the gate are
made from that file alone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from rlhf.artifacts import MANIFEST, Artifact, finish, publish, write_json
from rlhf.data import Renderer, lineage, load_data_recipe
from rlhf.data.splits import group_key
from rlhf.errors import UserError
from rlhf.evaluation.statistics import bootstrap_interval
from rlhf.models import load_model, load_tokenizer, position_limit
from rlhf.recipe import OtherPairs, RewardReportSection
from rlhf.reward import bias, gate
from rlhf.reward.baselines import length_baseline, tfidf_baseline
from rlhf.reward.calibration import calibration
from rlhf.reward.gate import REPORT, SCHEMA
from rlhf.reward.learning_curve import features, learning_curve
from rlhf.reward.page import write_page
from rlhf.reward.probes import Pair, Subject, edits, padding, paraphrases, relevance
from rlhf.reward.slices import accuracy, accuracy_table, correct, slice_labels
from rlhf.stage import StageContext

logger = logging.getLogger(__name__)

PAGE = "report.html"
SHOWN_PAIRS = 2000  # whose scores stand in report.json one by one, for the figures


def measure(
    subject: Subject,
    train_rows: Sequence[Mapping[str, Any]],
    test_rows: Sequence[Mapping[str, Any]],
    settings: RewardReportSection,
    seed: int,
    baselines: bool = True,
) -> dict[str, Any]:
    """Everything that needs the reward model and its held-out pairs; see docs/reward_report.md.

    Args:
        subject: the published reward model.
        train_rows: pairs that it was trained on, for the baselines and to know which prompts it has seen.
        test_rows: held-out pairs that fit the model.
        settings: `reward.report` of the recipe.
        seed: of samples, shuffles and intervals.
        baselines: whether length-only and TF-IDF baselines are fitted.

    Raises:
        UserError: a score is not finite.
    """
    pairs = [subject.pair(row) for row in test_rows]
    chosen, rejected = subject.scores_of(pairs, "held-out pairs")
    margins = chosen - rejected
    std = float(max(np.concatenate([chosen, rejected]).std(), 1e-6))
    lengths = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    others = _baseline_margins(train_rows, test_rows) if baselines else {}
    prompts = [group_key(row["prompt"]) for row in test_rows]
    labels = slice_labels(test_rows, lengths, {group_key(row["prompt"]) for row in train_rows})
    few = pairs[: settings.edit_pairs]  # rows come in a seeded order: the first ones are a fair sample
    return {
        "schema": SCHEMA,
        "pairs": len(pairs),
        "train_pairs": len(train_rows),
        "accuracy": accuracy(margins),
        "margin": float(margins.mean()),
        "shorter": _part(margins, lengths[:, 0] < lengths[:, 1]),
        "longer": _part(margins, lengths[:, 0] > lengths[:, 1]),
        "baselines": {name: accuracy(other) for name, other in others.items()},
        "leads": {name: _lead(margins, other, prompts, seed) for name, other in others.items()},
        "slices": accuracy_table(margins, others, labels),
        "calibration": calibration(margins),
        "score_std": std,
        "biases": bias.biases([(r["chosen"], r["rejected"]) for r in test_rows], lengths, chosen, rejected, seed),
        "edits": edits(subject, few, (chosen[: len(few)], rejected[: len(few)]), std, seed),
        "relevance": relevance(subject, few, chosen[: len(few)], std, seed),
        "padding": padding(subject, few, std),
        "paraphrases": paraphrases(subject, few, margins[: len(few)], settings.paraphrases),
        "failures": _failures(subject.renderer, pairs, chosen, rejected, settings.failures),
        "table": {
            "chosen": _rounded(chosen),
            "rejected": _rounded(rejected),
            "chosen_tokens": lengths[:SHOWN_PAIRS, 0].tolist(),
            "rejected_tokens": lengths[:SHOWN_PAIRS, 1].tolist(),
        },
        "ood": [],
        "learning_curve": [],
    }


def _baseline_margins(
    train_rows: Sequence[Mapping[str, Any]], test_rows: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    return {
        "length-only": length_baseline(train_rows, test_rows).margins,
        "TF-IDF": tfidf_baseline(train_rows, test_rows).margins,
    }


def _part(margins: np.ndarray, picked: np.ndarray) -> dict[str, float] | None:
    return accuracy(margins[picked]) if picked.any() else None


def _lead(margins: np.ndarray, other: np.ndarray, prompts: list[str], seed: int) -> dict[str, float]:
    """Accuracy of the model minus that of a baseline on the same pairs, with a bootstrap interval over prompts."""
    return dataclasses.asdict(bootstrap_interval(correct(margins) - correct(other), clusters=prompts, seed=seed))


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values[:SHOWN_PAIRS]]


def _failures(
    renderer: Renderer, pairs: Sequence[Pair], chosen: np.ndarray, rejected: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """Wrong pairs as text: half of them those it is surest of, half those it missed by least."""
    wrong = [int(i) for i in np.argsort(chosen - rejected, kind="stable") if chosen[i] <= rejected[i]]
    surest = wrong[: count - count // 2]
    nearest = [number for number in wrong[::-1] if number not in surest][: count // 2]
    return [
        {
            "kind": kind,
            "prompt": renderer.prompt_text(pairs[number].row["prompt"]),
            "chosen": pairs[number].row["chosen"],
            "rejected": pairs[number].row["rejected"],
            "chosen_score": float(chosen[number]),
            "rejected_score": float(rejected[number]),
        }
        for kind, numbers in (("surest", surest), ("nearest", nearest))
        for number in numbers
    ]


# ---------------------------------------------------------------------------------------------------- of an artifact
def report_on(ctx: StageContext, directory: Path, train_rows: list[dict], test_rows: list[dict]) -> dict[str, Any]:
    """Measure the model in `directory`/model, judge it, write `report.json` and `report.html` beside it.

    Raises:
        UserError: an out-of-distribution set cannot be read, or a score is not finite.
    """
    recipe, settings, device = ctx.recipe, ctx.recipe.reward.report, PartialState().device
    sft_dir = ctx.inputs["sft"].model_dir
    renderer = Renderer(load_tokenizer(sft_dir), recipe.model.chat)
    model = load_model(directory / "model", "score").to(device).eval()
    limit = position_limit(directory / "model") or 2 * recipe.reward.max_length
    subject = Subject(model, renderer, limit)
    report = measure(subject, train_rows, test_rows, settings, ctx.seed, recipe.reward.baselines)
    report["ood"] = [_other_set(ctx, subject, other) for other in settings.ood]
    if settings.learning_curve_pairs:
        trunk = load_model(sft_dir).to(device).eval()
        report["learning_curve"] = _labels_curve(trunk, subject, train_rows, test_rows, settings, ctx.seed)
    checks = gate.judge(report, recipe.reward.gate)
    report = {"run": ctx.run, "recipe": recipe.name, "data": recipe.reward.data, "seed": ctx.seed} | report
    report["gate"] = gate.as_json(checks, recipe.reward.gate)
    write_json(directory / REPORT, report)
    write_page(report, directory / PAGE)
    return report


def _other_set(ctx: StageContext, subject: Subject, other: OtherPairs) -> dict[str, Any]:
    """Accuracy on a preference set from elsewhere; longer answers than the model takes are left out."""
    rows = ctx.rows(other.data, other.split, "preference", limit=other.limit)
    chosen, rejected = subject.scores_of([subject.pair(row) for row in rows], f"pairs of {other.data}")
    fits = ~np.isnan(chosen) & ~np.isnan(rejected)
    if not fits.any():
        raise UserError(
            f"reward.report.ood {other.data}: none of {len(rows)} pairs fits {subject.limit} tokens: filter it"
        )
    kept = [row for row, fit in zip(rows, fits, strict=True) if fit]
    longer = np.array([float(len(row["chosen"]) > len(row["rejected"])) for row in kept])
    return {
        "name": other.data,
        "split": other.split,
        "from": lineage(load_data_recipe(other.data)),
        "accuracy": accuracy((chosen - rejected)[fits]),
        "longer_is_better": float(longer.mean()),
        "left_out": len(rows) - len(kept),
    }


def _labels_curve(
    trunk: Any,
    subject: Subject,
    train_rows: list[dict],
    test_rows: list[dict],
    settings: RewardReportSection,
    seed: int,
) -> list[dict[str, Any]]:
    def differences(rows: list[dict]) -> np.ndarray:
        pairs = [subject.pair(row) for row in rows]
        sides = [
            [pair.prompt_ids + ids for pair, ids in zip(pairs, responses, strict=True)]
            for responses in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
        ]
        return features(trunk, sides[0], subject.pad_id) - features(trunk, sides[1], subject.pad_id)

    return learning_curve(
        differences(train_rows[: settings.learning_curve_pairs]), differences(test_rows[:SHOWN_PAIRS]), seed
    )


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the gate."""
    checks = [gate.Check(**check) for check in report["gate"]["checks"]]
    return {"verdict": report["gate"]["verdict"], "reasons": gate.lines(checks)}


def say(report: Mapping[str, Any], place: Path) -> None:
    """Log the gate's verdict, each warning and failure with its reason, and where the page will be."""
    found = summary(report)
    logger.info("reward gate: %s (%s)", found["verdict"].upper(), place / PAGE)
    for line in found["reasons"]:
        logger.warning("reward gate: %s", line)


def redo(ctx: StageContext, artifact: Artifact, train_rows: list[dict], test_rows: list[dict]) -> Artifact:
    """A new report in a published artifact, whole or not at all; the model stays what it is.

    It is made in a copy (hard links) beside the artifact, which then takes its place.
    """
    copy = artifact.path.with_name(artifact.path.name + ".report")
    shutil.rmtree(copy, ignore_errors=True)
    left_out = shutil.ignore_patterns(MANIFEST, REPORT, PAGE)
    shutil.copytree(artifact.path, copy, copy_function=_link, ignore=left_out)
    report = report_on(ctx, copy, train_rows, test_rows)
    own = {key: value for key, value in artifact.manifest.items() if key not in ("files", "payload_hash")}
    say(report, artifact.path)
    finish(copy, own | {"gate": summary(report)})
    return publish(copy, artifact.path)


def _link(source: str, target: str) -> None:
    """A second name for the same bytes; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
