"""What every cleaning step shares: its config's base class, its result, and how a row's texts are reached."""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from rlhf.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")

_NO_TEXT = {"role", "from", "name"}  # of a message: who speaks, not what is said


class StepConfig(BaseModel):
    """Base of every step's config."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    columns: list[str] | None = Field(
        default=None, min_length=1, description="Columns whose texts the step reads; null = all that hold text."
    )


@dataclass(frozen=True)
class Dropped:
    """A row that a step took out.

    Attributes:
        index: where the row stood in the step's input.
        row: the row as the step got it.
        reason: short and of few values, to count by: `near_duplicate`.
        detail: what to look at: the value and the limit, or the row that stays.
    """

    index: int
    row: Row
    reason: str
    detail: str = ""


@dataclass
class StepResult:
    """What a step made of its rows.

    Attributes:
        rows: the kept rows, in input order; changed rows are copies, the input is never written to.
        index: for each kept row, where it stood in the input (the caller carries splits and other side data along).
        dropped: the rows taken out, in input order.
        report: JSON-like figures. Those of a row step are counts and may be added up over chunks.
    """

    rows: list[Row]
    index: list[int]
    dropped: list[Dropped]
    report: dict[str, Any] = field(default_factory=dict)


def texts_of(row: Row, columns: Sequence[str] | None = None) -> Iterator[str]:
    """The texts of a row in the order of its columns; of messages the contents, without the roles."""
    for name, value in row.items():
        if columns is None or name in columns:
            yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _NO_TEXT:
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def map_texts(row: Row, function: Callable[[str], str], columns: Sequence[str] | None = None) -> Row:
    """A copy of the row with `function` applied to the texts that `texts_of` gives; the same row if none changed."""
    new = {
        name: _mapped(value, function) if columns is None or name in columns else value for name, value in row.items()
    }
    return row if new == row else new


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {name: item if name in _NO_TEXT else _mapped(item, function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, function) for item in value]
    return value


def joined(value: Any) -> str:
    """All texts inside a value (a text, messages), one after the other."""
    return "\n".join(_strings(value))


def split_result(
    rows: Sequence[Row], reasons: dict[int, tuple[str, str]], report: dict[str, Any] | None = None
) -> StepResult:
    """The result of a step that changes no row: `reasons` holds (reason, detail) by the index of a dropped row."""
    index = [number for number in range(len(rows)) if number not in reasons]
    dropped = [Dropped(number, rows[number], *reasons[number]) for number in sorted(reasons)]
    return StepResult([rows[number] for number in index], index, dropped, report or {})


def added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The sum of two reports of counts, key by key."""
    total = dict(first)
    for name, value in second.items():
        total[name] = added(total.get(name, {}), value) if isinstance(value, dict) else total.get(name, 0) + value
    return total


def progress(items: Collection[T], what: str) -> Iterable[T]:
    """The items, with a bar where somebody looks at a terminal."""
    bar: Iterable[T] = tqdm(items, desc=what, unit=" rows", leave=False, disable=None)
    return bar


def optional_module(name: str, package: str, step: str, extra: str = "data") -> ModuleType:
    """Imports a module of an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"cleaning step {step!r} needs the package {package}, which is not installed: pip install '.[{extra}]'"
        ) from error
