"""Rows that cannot be used: counted by reason, written to a file, and a reason to stop when they are many."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rlhf.errors import UserError

SHOWN_ROWS = 5
SHOWN_CHARS = 2000


@dataclass
class Quarantine:
    """Collects bad rows. As a context manager it closes its file.

    Attributes:
        path: JSONL file that every bad row is written to (`where`, `reason`, `row`); None = they are only counted.
        reasons: reason -> count.
        examples: the first few records.
        rows: rows read so far, the bad ones included.
    """

    path: Path | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    rows: int = 0
    _file: TextIO | None = None

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    @property
    def count(self) -> int:
        """How many rows are bad."""
        return sum(self.reasons.values())

    def add(self, where: str, reason: str, row: Any) -> None:
        """Counts one bad row.

        Args:
            where: file and line, or the row's number.
            reason: short; equal reasons are counted together.
            row: the row or the bytes it was to be made of; the file keeps its first 2,000 characters.
        """
        self.reasons[reason] += 1
        record = {"where": where, "reason": reason, "row": _shown(row)}
        if len(self.examples) < SHOWN_ROWS:
            self.examples.append(record)
        if self.path:
            self._file = self._file or self.path.open("w", encoding="utf-8")
            self._file.write(json.dumps(record) + "\n")

    def add_unread(self, where: str, reason: str, row: Any) -> None:
        """Counts one bad row that could not even be read, so that nobody else counts it among the rows."""
        self.rows += 1
        self.add(where, reason, row)

    def check(self, share: float) -> None:
        """Stops where more than `share` of all rows are bad.

        Raises:
            UserError: with the counts and the first bad row.
        """
        if self.count > share * self.rows:
            first = self.examples[0]
            raise UserError(
                f"{self.count} of {self.rows} rows are bad, more than max_bad_rows {share:g} allows; the first is "
                f"{first['where']}: {first['reason']}; mend the data, or raise max_bad_rows to set such rows aside"
            )


def _shown(row: Any) -> str:
    if isinstance(row, bytes):
        return row[:SHOWN_CHARS].decode("utf-8", "backslashreplace")
    return (row if isinstance(row, str) else repr(row))[:SHOWN_CHARS]
