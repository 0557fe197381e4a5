"""From a data recipe to the rows of a stage: read, select, split, clean, convert, filter, derive, order."""

import hashlib
import json
import logging
from collections import Counter
from typing import Any

from rlhf.data.filters import failed_filter, normalize
from rlhf.data.formats import FORMATS, KIND_COLUMNS, DropRow, FormatOptions, convert_rows, derive_rows, order_key
from rlhf.data.recipe import DataRecipe
from rlhf.data.sources import read_rows, source_hash
from rlhf.data.splits import assign_splits, group_key
from rlhf.errors import UserError
from rlhf.yamlio import nearest

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Part of every fingerprint. Raise it when the same recipe and source begin to give other rows.
DATA_VERSION = 1


def load_rows(
    recipe: DataRecipe, split: str, kind: str, limit: int | None = None, seed: int | None = None
) -> list[Row]:
    """Loads the canonical rows of one split, in a seeded order.

    The order depends on the rows' content and the seed, not on the source (many sources are sorted by label), so the
    first rows are a fair sample and a smaller limit gives a prefix of a larger one.

    Args:
        recipe: what `load_data_recipe` returned.
        split: one of the recipe's split names.
        kind: text, rated, sft, preference or prompts; rlhf/data/formats.py lists their columns.
        limit: at most this many rows, >= 1; None = all.
        seed: of the order and of the pairing; None = the recipe's. It never moves a row to another split.

    Raises:
        UserError: unknown split or kind, missing package, file or column, wrong types, or no rows left.
    """
    where = f"data recipe {recipe.name!r}, split {split!r}"
    if split not in recipe.split.names:
        known = ", ".join(recipe.split.names)
        raise UserError(f"{where}: no such split{nearest(split, recipe.split.names)}; the recipe has {known}")
    if kind not in KIND_COLUMNS:
        raise UserError(f"{where}: kind {kind!r} does not exist; known: {', '.join(KIND_COLUMNS)}")
    if limit is not None and limit < 1:
        raise UserError(f"{where}: limit is {limit}; must be at least 1, or null for all rows")
    seed = recipe.split.seed if seed is None else seed
    dropped: Counter[str] = Counter()
    try:
        source_rows = _split_rows(recipe, split)
        rows = _prepare(recipe, source_rows, kind, seed, dropped)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"
    if not rows:
        raise UserError(
            f"{where}: no {kind} rows left of {len(source_rows)} in the split (dropped: {lost}); "
            "loosen the filters or enlarge the split"
        )
    logger.info("%s: %d %s rows from %d source rows (dropped: %s)", where, len(rows), kind, len(source_rows), lost)
    return sorted(rows, key=lambda row: order_key(row, seed))[:limit]


def data_fingerprint(recipe: DataRecipe) -> str:
    """sha256 (hex) over everything that the rows depend on: the recipe, the source's bytes, and this code's version.

    Licence and homepage are left out: correcting them must not retrain a model.

    Raises:
        UserError: the source does not exist.
    """
    content = recipe.model_dump(mode="json", exclude={"licence", "homepage"})
    parts = {"version": DATA_VERSION, "recipe": content, "source": source_hash(recipe.source)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _options(recipe: DataRecipe) -> FormatOptions:
    return FormatOptions(**{name: getattr(recipe, name) for name in FormatOptions.__dataclass_fields__})


def _split_rows(recipe: DataRecipe, split: str) -> list[Row]:
    """The source rows of one split, columns named as the format names them, otherwise untouched."""
    rows = _select(read_rows(recipe.source), recipe.where)
    rows = _rename(rows, recipe)
    sides = assign_splits(_group_keys(rows, recipe), recipe.split)
    return [row for row, side in zip(rows, sides, strict=True) if side == split]


def _select(rows: list[Row], where: dict[str, Any]) -> list[Row]:
    for column, allowed in where.items():
        _require_column(column, rows, f"where.{column}")
        # Compared as text: a CSV cell is the string "1" where a Parquet cell is the number 1.
        wanted = {_as_text(value) for value in (allowed if isinstance(allowed, list) else [allowed])}
        kept = [row for row in rows if _as_text(row.get(column)) in wanted]
        if not kept:
            seen = sorted({_as_text(row.get(column))[:40] for row in rows})[:5]
            raise UserError(f"where.{column}: no row has {allowed!r}; the column holds {', '.join(seen)} ...")
        rows = kept
    return rows


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rename(rows: list[Row], recipe: DataRecipe) -> list[Row]:
    """Gives the mapped columns the format's names; a source column that happens to have such a name gives way."""
    form = FORMATS[recipe.format]
    for column in form.required:
        _require_column(recipe.mapping.get(column, column), rows, f"mapping.{column}")
    for column, source in recipe.mapping.items():
        _require_column(source, rows, f"mapping.{column}")
    for name, source in recipe.keep.items():
        _require_column(source, rows, f"keep.{name}")
    names = {column: recipe.mapping.get(column, column) for column in form.columns}
    used = set(names.values())
    return [
        {column: value for column, value in row.items() if column not in used}
        | {column: row[source] for column, source in names.items() if source in row}
        for row in rows
    ]


def _require_column(column: str, rows: list[Row], where: str) -> None:
    if not any(column in row for row in rows):
        present = sorted({name for row in rows[:1000] for name in row})
        raise UserError(
            f"{where}: the source has no column {column!r}{nearest(column, present)}; it has {', '.join(present)}"
        )


def _group_keys(rows: list[Row], recipe: DataRecipe) -> list[str]:
    by = recipe.split.by
    if by == "row":
        return [group_key(row) for row in rows]
    if any(by in row for row in rows):
        return [group_key(row.get(by)) for row in rows]
    if by == "prompt" and FORMATS[recipe.format].native in ("sft", "preference", "prompts"):
        return [_converted_prompt(row, recipe) for row in rows]
    present = sorted({name for row in rows[:1000] for name in row})
    raise UserError(f"split.by: no column {by!r}{nearest(by, present)}; the rows have {', '.join(present)}")


def _converted_prompt(row: Row, recipe: DataRecipe) -> str:
    """The prompt that a format computes (a dialogue's common prefix); a row that will be dropped stands for itself."""
    try:
        return group_key(FORMATS[recipe.format].convert(row, _options(recipe))["prompt"])
    except DropRow:
        return group_key(row)


def _prepare(recipe: DataRecipe, rows: list[Row], kind: str, seed: int, dropped: Counter[str]) -> list[Row]:
    form = FORMATS[recipe.format]
    steps = [name for name, wanted in recipe.normalize.model_dump().items() if wanted]
    if steps:
        columns = set(form.columns)
        rows = [{k: normalize(v, steps) if k in columns else v for k, v in row.items()} for row in rows]
    options = _options(recipe)
    kept = []
    for row in convert_rows(recipe.format, rows, options, dropped):
        failed = failed_filter([_filter_text(row[column]) for column in form.responses], recipe.filters)
        if failed is None:
            kept.append(row)
        else:
            dropped[failed] += 1
    # Nothing left to derive is reported by the caller, with the counts that explain it.
    return derive_rows(form.native, kind, kept, options, seed, dropped) if kept else []


def _filter_text(value: Any) -> str:
    """What a filter reads: a text, or the last message of a conversational prompt; a missing completion is empty."""
    if isinstance(value, list):
        return value[-1]["content"]
    return value or ""
