"""From a source to native rows: read, select, split, normalise, convert, filter. One row after the other."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from rlhf.data.cleaning.pii import mask_row
from rlhf.data.filters import failed_filter, normalize
from rlhf.data.formats import (
    FORMATS,
    WITH_PROMPT,
    DropRow,
    FormatOptions,
    convert_rows,
    detect_format,
)
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import DataRecipe
from rlhf.data.sources import iter_rows
from rlhf.data.splits import group_key, needs_sizes, split_sides
from rlhf.errors import UserError
from rlhf.yamlio import nearest, validate

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PEEK_ROWS = 1000  # what columns there are is decided on the first so many rows
SHOWN_DROPS = 3
SHOWN_CHARS = 300


def options_of(recipe: DataRecipe) -> FormatOptions:
    """The recipe's fields that converters depend on."""
    return FormatOptions(**{name: getattr(recipe, name) for name in FormatOptions.__dataclass_fields__})


@dataclass
class Counts:
    """What became of the rows of a source.

    Attributes:
        quarantine: the rows that could not be used for what they are.
        selected: rows that `where` let through.
        in_split: split -> rows of it, before anything is done to them.
        kept: split -> rows that are left.
        dropped: reason -> rows that format or filters left out.
        examples: reason -> the first few of them, shortened.
    """

    quarantine: Quarantine
    selected: int = 0
    in_split: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, row: Row) -> None:
        """Counts a row that is left out; personal data in the shown ones is masked."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN_DROPS:
            shown.append(repr(mask_row(row)[0])[:SHOWN_CHARS])


def named(recipe: DataRecipe) -> str:
    """The format of a recipe that names one, or for which it has been detected."""
    if recipe.format is None:
        raise UserError("format: not named and not detected yet")
    return recipe.format


def detected(recipe: DataRecipe) -> DataRecipe:
    """The recipe with its format: the named one, or the one that the first rows of the source have.

    Raises:
        UserError: no format fits the columns, or no row can be read.
    """
    if recipe.format is not None or recipe.source is None:
        return recipe
    quarantine = Quarantine()
    first = list(islice(iter_rows(recipe.source, quarantine), PEEK_ROWS))
    if not first:
        quarantine.check(recipe.max_bad_rows)
    renamed = [_renamed(row, recipe.mapping) for row in first]
    name, reason = detect_format(renamed)
    logger.info("data recipe %r: format %s, because %s", recipe.name, name, reason)
    return validate(
        DataRecipe, recipe.model_dump(exclude_unset=True) | {"format": name}, f"data recipe {recipe.name!r}"
    )


def native_rows(recipe: DataRecipe, counts: Counts, only: str | None = None) -> Iterator[tuple[str, Row]]:
    """Reads, selects, splits, normalises, converts and filters, one row after the other.

    Memory does not grow with the source, unless `split.rows` or `split.max_rows` ask for all group keys first.

    Args:
        recipe: with a source and a format (`detected`).
        counts: added to.
        only: rows of this split alone; None = of all.

    Yields:
        (split name, native row of the recipe's format).
    """
    for _, split, row in numbered_rows(recipe, counts, only):
        yield split, row


def numbered_rows(recipe: DataRecipe, counts: Counts, only: str | None = None) -> Iterator[tuple[int, str, Row]]:
    """`native_rows`, each with its number in the source, from 1."""
    side = split_sides(recipe.split, _group_sizes(recipe) if needs_sizes(recipe.split) else {})
    options, form = options_of(recipe), FORMATS[named(recipe)]
    steps = [name for name, wanted in recipe.normalize.model_dump().items() if wanted]
    columns = set(form.columns)
    for number, row, key in _keyed_rows(recipe, counts):
        split = side(key)
        if split is None or (only is not None and split != only):
            continue
        counts.in_split[split] += 1
        if steps:
            row = {k: normalize(v, steps) if k in columns else v for k, v in row.items()}
        native = _converted(row, recipe, options, counts, f"row {number}")
        if native is None:
            continue
        failed = failed_filter([t for c in form.responses for t in _filter_texts(native[c])], recipe.filters)
        if failed is not None:
            counts.drop(failed, row)
            continue
        counts.kept[split] += 1
        yield number, split, native


def _converted(row: Row, recipe: DataRecipe, options: FormatOptions, counts: Counts, where: str) -> Row | None:
    name = named(recipe)
    reasons: Counter[str] = Counter()
    missing = [column for column in FORMATS[name].required if column not in row]
    if missing:
        counts.quarantine.add(where, f"no column {missing[0]!r}", row)
        return None
    try:
        converted = convert_rows(name, [row], options, reasons)
    except UserError as error:
        counts.quarantine.add(where, str(error), row)
        return None
    for reason in reasons:
        counts.drop(reason, row)
    return converted[0] if converted else None


def _group_sizes(recipe: DataRecipe) -> Counter[str]:
    counts = Counts(Quarantine())
    sizes = Counter(key for _, _, key in _keyed_rows(recipe, counts))
    counts.quarantine.check(recipe.max_bad_rows)  # or a split that is too small would be said to be the fault
    return sizes


def _keyed_rows(recipe: DataRecipe, counts: Counts) -> Iterator[tuple[int, Row, str]]:
    """(number in the source, row with the format's column names, group key) of each row that `where` selects."""
    if recipe.source is None:
        raise UserError("a mixture has no rows of its own")
    columns: set[str] = set()
    rows = _select(_watched(iter_rows(recipe.source, counts.quarantine), columns), recipe.where, columns)
    renamed = ((number, _renamed(row, _names(recipe))) for number, row in rows)
    head = list(islice(renamed, PEEK_ROWS))
    _require_columns(recipe, columns)
    group = _group_function(recipe, [row for _, row in head])
    for number, row in chain(head, renamed):
        counts.selected += 1
        yield number, row, group(row)


def _watched(rows: Iterable[Row], columns: set[str]) -> Iterator[tuple[int, Row]]:
    """Numbers the rows and collects the names of their columns."""
    for number, row in enumerate(rows, start=1):
        columns.update(row)
        yield number, row


def _select(rows: Iterable[tuple[int, Row]], where: dict[str, Any], columns: set[str]) -> Iterator[tuple[int, Row]]:
    """Rows that pass every condition. Compared as text: a CSV cell is the string "1" where Parquet has a number."""
    wanted = {
        c: {_as_text(v) for v in (allowed if isinstance(allowed, list) else [allowed])} for c, allowed in where.items()
    }
    seen: dict[str, set[str]] = {column: set() for column in where}
    passed: Counter[str] = Counter()
    for number, row in rows:
        for column, values in wanted.items():
            text = _as_text(row.get(column))
            if text not in values:
                if len(seen[column]) < PEEK_ROWS:
                    seen[column].add(text[:40])
                break
            passed[column] += 1
        else:
            yield number, row
    for column, allowed in where.items():
        _require_column(column, columns, f"where.{column}")
        if not passed[column]:
            shown = ", ".join(sorted(seen[column])[:5])
            raise UserError(f"where.{column}: no row has {allowed!r}; the column holds {shown} ...")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(recipe: DataRecipe) -> dict[str, str]:
    """Format column -> source column."""
    return {column: recipe.mapping.get(column, column) for column in FORMATS[named(recipe)].columns}


def _renamed(row: Row, names: dict[str, str]) -> Row:
    """Gives the mapped columns the format's names; a source column that happens to have such a name gives way."""
    used = set(names.values())
    return {column: value for column, value in row.items() if column not in used} | {
        column: row[source] for column, source in names.items() if source in row
    }


def _require_columns(recipe: DataRecipe, columns: set[str]) -> None:
    if not columns:
        return  # not one row could be read; the quarantine says why
    for column in FORMATS[named(recipe)].required:
        _require_column(recipe.mapping.get(column, column), columns, f"mapping.{column}")
    for column, source in recipe.mapping.items():
        _require_column(source, columns, f"mapping.{column}")
    for name, source in recipe.keep.items():
        _require_column(source, columns, f"keep.{name}")


def _require_column(column: str, columns: set[str], where: str) -> None:
    if column not in columns:
        present = sorted(columns)
        raise UserError(
            f"{where}: the source has no column {column!r}{nearest(column, present)}; it has {', '.join(present)}: "
            "name one of them there"
        )


def _group_function(recipe: DataRecipe, head: list[Row]) -> Callable[[Row], str]:
    """Which rows must stay together; `head` shows what columns there are."""
    by = recipe.split.by
    if by == "row":
        return group_key
    if not head or any(by in row for row in head):
        return lambda row: group_key(row.get(by))
    if by == "prompt" and FORMATS[named(recipe)].native in WITH_PROMPT:
        return lambda row: _converted_prompt(row, recipe)
    present = sorted({name for row in head for name in row})
    raise UserError(f"split.by: no column {by!r}{nearest(by, present)}; the rows have {', '.join(present)}")


def _converted_prompt(row: Row, recipe: DataRecipe) -> str:
    """The prompt that a format computes (a dialogue's common prefix); a row that will be dropped stands for itself."""
    try:
        return group_key(FORMATS[named(recipe)].convert(row, options_of(recipe))["prompt"])
    except (DropRow, UserError):
        return group_key(row)


def _filter_texts(value: Any) -> list[str]:
    """What a filter reads: a text, all of several responses, or the last message of a conversational prompt."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return value
    if isinstance(value, list):
        return [value[-1]["content"]]
    return [value or ""]
