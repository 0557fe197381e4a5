"""Writes the clean rows of a data recipe to a folder, with what was dropped and why. One row in memory at a time."""

import json
import os
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from rlhf.artifacts import MANIFEST, hash_files, partial_dir, write_json
from rlhf.data.pipeline import Counts, Row, clean_rows, data_fingerprint, detected, named
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import DataRecipe
from rlhf.data.sources import AnySource, describe, source_hash
from rlhf.errors import UserError

BINS = (0, 64, 256, 1024, 4096, 16384)  # lower ends of the length classes, in characters


def prepare(recipe: DataRecipe, final: Path, force: bool = False) -> dict[str, Any]:
    """Writes `<split>.jsonl` (native rows in the source's order), `quarantine.jsonl`, a card and a manifest.

    The folder appears only when it is whole, and is left as it is where neither recipe nor source changed.

    Args:
        recipe: with a source; a mixture is made of its parts when it is loaded.
        final: folder to make.
        force: write it again although nothing changed.

    Returns:
        The manifest.

    Raises:
        UserError: what `load_rows` raises for a recipe, or a mixture.
    """
    if recipe.source is None:
        raise UserError(f"data recipe {recipe.name!r}: a mixture has no rows of its own; prepare its parts")
    fingerprint = data_fingerprint(recipe)
    if (final / MANIFEST).is_file() and not force:
        manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] == fingerprint:
            return manifest
    source, recipe = recipe.source, detected(recipe)
    folder = partial_dir(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        counts = Counts(quarantine)
        lengths = _write_splits(recipe, folder, counts)
        quarantine.check(recipe.max_bad_rows)
    manifest = _manifest(recipe, source, counts, lengths) | {"fingerprint": fingerprint}
    (folder / "README.md").write_text(_card(manifest), encoding="utf-8")
    write_json(folder / MANIFEST, manifest | {"files": hash_files(folder)})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder, final)
    return manifest


def _write_splits(recipe: DataRecipe, folder: Path, counts: Counts) -> dict[str, Counter[int]]:
    """Writes each row to its split's file; returns the rows per length class and split."""
    lengths: dict[str, Counter[int]] = {split: Counter() for split in recipe.split.names}
    with ExitStack() as stack:
        files: dict[str, TextIO] = {
            split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8")) for split in lengths
        }
        for split, row in clean_rows(recipe, counts):
            files[split].write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            size = _characters(row)
            lengths[split][max(low for low in BINS if low <= size)] += 1
    return lengths


def _characters(value: Row | list[Any] | str | object) -> int:
    """How many characters the texts of a row have, wherever they stand."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for item in value.values())
    return sum(_characters(item) for item in value) if isinstance(value, list) else 0


def _manifest(
    recipe: DataRecipe, source: AnySource, counts: Counts, lengths: dict[str, Counter[int]]
) -> dict[str, Any]:
    quarantine = counts.quarantine
    return {
        "schema_version": 1,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "format": named(recipe),
        "source": describe(source),
        "source_hash": source_hash(source),
        "licence": recipe.licence,
        "homepage": recipe.homepage,
        "steps": {
            "read": quarantine.rows,
            "bad": quarantine.count,
            "selected": counts.selected,
            "in a split": counts.in_split,
            "kept": sum(counts.kept.values()),
        },
        "bad": dict(quarantine.reasons),
        "dropped": dict(counts.dropped),
        "dropped_examples": counts.examples,
        "splits": {split: counts.kept[split] for split in recipe.split.names},
        "characters": {split: {str(low): count for low, count in sorted(c.items())} for split, c in lengths.items()},
    }


def _card(manifest: dict[str, Any]) -> str:
    """The figures of a manifest for people; no text of the data, which may not be ours to show."""
    parts = [f"# {manifest['name']}", ""]
    parts += [f"{manifest['licence'] or 'Licence not stated'}. {manifest['homepage'] or ''}".rstrip(), ""]
    parts += [f"Format `{manifest['format']}`, source sha256 `{manifest['source_hash'][:16]}`.", ""]
    tables = (("step", "steps"), ("bad rows, by reason", "bad"), ("dropped, by reason", "dropped"), ("split", "splits"))
    for title, key in tables:
        if manifest[key]:
            parts += [f"| {title} | rows |", "| --- | --- |"]
            parts += [f"| {name} | {count} |" for name, count in manifest[key].items()]
            parts += [""]
    parts += [
        "| characters | " + " | ".join(manifest["characters"]) + " |",
        "| --- |" + " --- |" * len(manifest["splits"]),
    ]
    for low in BINS:
        cells = [str(classes.get(str(low), 0)) for classes in manifest["characters"].values()]
        parts += [f"| from {low} | " + " | ".join(cells) + " |"]
    return "\n".join(parts) + "\n"
