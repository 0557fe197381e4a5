"""Rows on disk: written once, then asked for by their number, so that a step over all rows needs no memory for them."""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

Row = dict[str, Any]


class RowFile(Sequence[Row]):
    """The rows of a JSON Lines file. In memory are 9 bytes per row: its place and its split.

    Attributes:
        path: the file, one `[split, row]` per line.
        splits: name of each row's split.
    """

    def __init__(self, path: Path, rows: Iterable[tuple[str, Row]]) -> None:
        """Writes all rows to `path`."""
        self.path = path
        self._names: list[str] = []
        self._split_numbers, self._offsets = array("B"), array("Q")
        numbers: dict[str, int] = {}
        with path.open("wb") as file:
            for split, row in rows:
                if split not in numbers:
                    numbers[split] = len(numbers)
                    self._names.append(split)
                self._split_numbers.append(numbers[split])
                self._offsets.append(file.tell())
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        self._file = path.open("rb")
        self.splits: Sequence[str] = _Names(self._split_numbers, self._names)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        self._file.seek(self._offsets[number])
        row: Row = json.loads(self._file.readline())
        return row

    def take(self, numbers: Iterable[int]) -> Iterator[tuple[str, Row]]:
        """(split, row) of each number."""
        for number in numbers:
            yield self.splits[number], self[number]

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class _Names(Sequence[str]):
    """A sequence of names, a byte each."""

    def __init__(self, numbers: "array[int]", names: list[str]) -> None:
        self._numbers, self._known = numbers, names

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._known[at] for at in self._numbers[number]]
        return self._known[self._numbers[number]]
