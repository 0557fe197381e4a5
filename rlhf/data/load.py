"""From a data recipe to the rows of a stage: cleaned, derived, in a seeded order."""

import hashlib
import heapq
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.artifacts import DATA
from rlhf.data.cleaning import PerplexityStep
from rlhf.data.formats import FORMATS, KIND_COLUMNS, POOLED, check_derivation, derive_rows, order_key
from rlhf.data.pipeline import Counts, Row, detected, named, native_rows, options_of
from rlhf.data.prepare import ROWS, prepare
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import DataRecipe, load_data_recipe
from rlhf.errors import UserError
from rlhf.yamlio import nearest

logger = logging.getLogger(__name__)

SOURCE = "source"  # column of a mixture's pairs: the part that they are of, unless they keep one of that name
PART = "mixture_part"  # the same for its prompts, whose own columns go to reward functions: `source` is a common one


def load_rows(
    recipe: DataRecipe,
    split: str,
    kind: str,
    limit: int | None = None,
    seed: int | None = None,
    root: Path | None = None,
) -> list[Row]:
    """Loads the canonical rows of one split, in a seeded order.

    The order depends on the rows' content and the seed, not on the source (many sources are sorted by label), so the
    first rows are a fair sample and a smaller limit gives a prefix of a larger one. A `perplexity` step with an order
    puts its phases one after the other; rows of a phase stand in that order.

    Rows of a recipe with cleaning steps come from the set that `make data` wrote below `root`; it is written where it
    is missing or no longer what recipe and source give.

    Args:
        recipe: what `load_data_recipe` returned.
        split: one of the recipe's split names.
        kind: text, rated, sft, preference or prompts; rlhf/data/formats.py lists their columns.
        limit: at most this many rows, >= 1; None = all.
        seed: of the order and of the pairing; None = the recipe's. It never moves a row to another split.
        root: the artifact directory; None = cleaned rows are written to a temporary folder, each time anew.

    Raises:
        UserError: unknown split or kind, missing package, file or column, too many bad rows, or no rows left.
    """
    where = f"data recipe {recipe.name!r}, split {split!r}"
    if not recipe.mixture:
        _has_split(recipe, split)
    if kind not in KIND_COLUMNS:
        raise UserError(f"{where}: kind {kind!r} does not exist; known: {', '.join(KIND_COLUMNS)}")
    if limit is not None and limit < 1:
        raise UserError(f"{where}: limit is {limit}; must be at least 1, or null for all rows")
    seed = recipe.split.seed if seed is None else seed
    if recipe.mixture:
        mixed = _mixed_rows(recipe, split, kind, seed, root)
        ordered = sorted(mixed, key=lambda item: order_key(item[1], seed))[:limit]
        # The part is a slice of the reward report and of the evaluation.
        column = {"preference": SOURCE, "prompts": PART}.get(kind)
        return [{column: name} | row if column else row for name, row in ordered]
    try:
        known = detected(recipe)
        check_derivation(FORMATS[named(known)].native, kind)
        with _native(recipe, known, split, root) as (native, counts):
            found = _distinct(_kind_rows(known, native, kind, seed, counts), known, kind, counts)
            rows = _first_rows(found, limit, seed, _direction(recipe))
            counts.quarantine.check(recipe.max_bad_rows)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    _report(where, split, kind, rows, counts, bool(recipe.clean))
    return rows


def check_split(name: str, split: str, key: str) -> None:
    """Whether a data recipe has a split, known from the recipe alone.

    Args:
        name: of the data recipe, or its path.
        split: the one that a stage will read.
        key: the setting that names it, for the message.

    Raises:
        UserError: no such recipe, or no such split in it or in a part of it.
    """
    for part in parts_of(load_data_recipe(name)):
        try:
            _has_split(part, split)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _has_split(recipe: DataRecipe, split: str) -> None:
    if split not in recipe.split.names:
        names = ", ".join(recipe.split.names)
        raise UserError(
            f"data recipe {recipe.name!r}, split {split!r}: no such split{nearest(split, recipe.split.names)}; the "
            f"recipe has {names}"
        )


def prepared(recipe: DataRecipe, root: Path) -> None:
    """Writes the cleaned sets that `load_rows` would write, before several processes ask for them at once."""
    for part in parts_of(recipe):
        if part.clean:
            prepare(part, root / DATA / part.name, workers=_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _native(
    recipe: DataRecipe, known: DataRecipe, split: str, root: Path | None
) -> Iterator[tuple[Iterator[Row], Counts]]:
    """Native rows of a split: straight from the source, or where there are cleaning steps, from the set they wrote.

    `known` is the recipe with its format; the set is of the recipe as it was given.
    """
    with Quarantine() as quarantine:
        counts = Counts(quarantine)
        if not recipe.clean:
            yield (row for _, row in native_rows(known, counts, split)), counts
            return
    with tempfile.TemporaryDirectory() as folder:
        final = (root / DATA if root else Path(folder)) / recipe.name
        manifest = prepare(recipe, final, workers=_cores())
        counts.in_split[split] = manifest["in_split"][split]
        for dropped in [manifest["dropped"], *(step["dropped"] for step in manifest["cleaning"])]:
            counts.dropped.update(dropped)
        yield _read_rows(final / ROWS / f"{split}.jsonl"), counts


def _read_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def _report(where: str, split: str, kind: str, rows: list[Row], counts: Counts, cleaned: bool) -> None:
    quarantine = counts.quarantine
    lost = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items() if count) or "none"
    if cleaned and lost != "none":
        lost += "; all splits together"  # the cleaned set counts them so
    if quarantine.count:
        first = quarantine.examples[0]
        logger.warning(
            "%s: %d bad rows of %d left out, the first is %s: %s (`make data` writes them all to a file)",
            *(where, quarantine.count, quarantine.rows, first["where"], first["reason"]),
        )
    if not rows:
        raise UserError(
            f"{where}: no {kind} rows left of {counts.in_split[split]} in the split (dropped: {lost}); "
            "loosen the filters and cleaning steps, or enlarge the split"
        )
    logger.info(
        "%s: %d %s rows from %d source rows (dropped: %s)", where, len(rows), kind, counts.in_split[split], lost
    )


def _direction(recipe: DataRecipe) -> int:
    """1: easy phases first; -1: hard ones; 0: no curriculum."""
    orders = [step.order for step in recipe.clean if isinstance(step, PerplexityStep)]
    return {"keep": 0, "easy_first": 1, "hard_first": -1}[orders[-1]] if orders else 0


def _first_rows(rows: Iterable[tuple[int, Row]], limit: int | None, seed: int, direction: int) -> list[Row]:
    """The rows in their seeded order; with a limit, no more than so many are in memory at once."""
    keyed = ((order_key(row, seed), phase, row) for phase, row in rows)
    first = sorted if limit is None else partial(heapq.nsmallest, limit)
    found = first(keyed, key=lambda item: item[0])
    return [row for _, _, row in sorted(found, key=lambda item: direction * item[1])]


def parts_of(recipe: DataRecipe) -> list[DataRecipe]:
    """The recipes of a mixture; of another recipe, itself.

    Raises:
        UserError: a part is a mixture, or two different ones have one name and so one folder.
    """
    if not recipe.mixture:
        return [recipe]
    parts = [load_data_recipe(item.recipe) for item in recipe.mixture]
    known: dict[str, DataRecipe] = {}
    for part in parts:
        if part.mixture:
            raise UserError(f"data recipe {recipe.name!r}: {part.name!r} is a mixture itself; name its parts instead")
        if known.setdefault(part.name, part) != part:
            raise UserError(f"data recipe {recipe.name!r}: two of its parts are called {part.name!r}; rename one")
    return parts


def _mixed_rows(recipe: DataRecipe, split: str, kind: str, seed: int, root: Path | None) -> list[tuple[str, Row]]:
    """Of each part its share of the largest mixture that needs no row twice, the first ones in their seeded order.

    Without fractions all rows of all parts. Each as (name of its part, row).
    """
    parts = parts_of(recipe)
    if len({(part.split.by, part.split.seed, str(part.split.shares)) for part in parts}) > 1:
        logger.warning(
            "data recipe %r: its parts are split in different ways (by, fractions or seed): a prompt that two of them "
            "share may be trained on and tested on",
            recipe.name,
        )
    loaded = [load_rows(part, split, kind, seed=seed, root=root) for part in parts]
    shares = [item.fraction for item in recipe.mixture or ()]
    total = min(len(rows) / share if share else len(rows) for rows, share in zip(loaded, shares, strict=True))
    taken = [rows[: round(total * share)] if share else rows for rows, share in zip(loaded, shares, strict=True)]
    shown = ", ".join(
        f"{len(kept)} of {len(rows)} {part.name}" for kept, rows, part in zip(taken, loaded, parts, strict=True)
    )
    share, unknown = _synthetic([(part.synthetic, len(rows)) for part, rows in zip(parts, taken, strict=True)])
    logger.info(
        "data recipe %r, split %r: mixture of %s; %.0f %% of the rows synthetic, %.0f %% not known",
        *(recipe.name, split, shown, 100 * share, 100 * unknown),
    )
    if recipe.max_synthetic is not None and share > recipe.max_synthetic + 1e-9:
        raise UserError(
            f"data recipe {recipe.name!r}, split {split!r}: {share:.3f} of the rows are synthetic, more than "
            f"max_synthetic {recipe.max_synthetic:g}; lower the fractions of such parts"
        )
    return [(part.name, row) for part, rows in zip(parts, taken, strict=True) for row in rows]


def _synthetic(parts: list[tuple[bool | None, int]]) -> tuple[float, float]:
    """(share of rows known to be synthetic, share of which nothing is known)."""
    total = max(1, sum(count for _, count in parts))
    return sum(n for flag, n in parts if flag) / total, sum(n for flag, n in parts if flag is None) / total


def _kind_rows(
    recipe: DataRecipe, native_split: Iterator[Row], kind: str, seed: int, counts: Counts
) -> Iterable[tuple[int, Row]]:
    """(phase, row of `kind`): one after the other, unless pairing needs all of them."""
    native, options = FORMATS[named(recipe)].native, options_of(recipe)
    if (native, kind) in POOLED:
        rows = list(native_split)
        # Nothing left to derive is reported by the caller, with the counts that explain it.
        found = derive_rows(native, kind, rows, options, seed, counts.dropped) if rows else []
        return ((0, row) for row in found)
    return (
        (_phase(row), out)
        for row in native_split
        for out in derive_rows(native, kind, [row], options, seed, counts.dropped)
    )


def _distinct(
    rows: Iterable[tuple[int, Row]], recipe: DataRecipe, kind: str, counts: Counts
) -> Iterator[tuple[int, Row]]:
    """Without what answers of one prompt become when the rest of their row is left out: the same prompt several times.

    Rows that are used as they are written may repeat, and so may openings that two texts share.
    """
    native = FORMATS[named(recipe)].native
    if native in (kind, "rated") or kind not in ("sft", "prompts"):
        yield from rows
        return
    seen: set[bytes] = set()
    for phase, row in rows:
        content = json.dumps([row["prompt"], row.get("completion") if kind == "sft" else None], sort_keys=True)
        key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in seen:
            counts.dropped["repeated"] += 1
            continue
        seen.add(key)
        yield phase, row


def _phase(row: dict[str, Any]) -> int:
    phase = row.get("phase")
    return phase if isinstance(phase, int) else 0
