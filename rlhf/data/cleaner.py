"""Runs the cleaning steps of a data recipe over its rows, and counts what each did.

Row steps work on chunks of rows, in other processes where there are some; the chunks are the same for any number of
them, and so is the result. Steps over the whole set read the rows from a file.
"""

import logging
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from rlhf.data.cleaning import SCOPE, ExactStep, NearStep, PiiStep, SafetyStep, SemanticStep, StepConfig, run_step
from rlhf.data.cleaning.base import Row, added, texts_of
from rlhf.data.cleaning.duplicates import exact_reasons, near_reasons
from rlhf.data.cleaning.pii import mask_row
from rlhf.data.rowfile import RowFile
from rlhf.errors import UserError

logger = logging.getLogger(__name__)

SplitRow = tuple[str, Row]
CHUNK = 1000  # rows that a process gets at once, and
CHUNK_CHARS = 4_000_000  # characters: rows may be long
FEW_CHUNKS = 8  # so many are done before other processes would have started
SHOWN_DROPS = 3
SHOWN_CHARS = 300


@dataclass
class StepCount:
    """What one step did.

    Attributes:
        config: the step.
        rows: rows that it got.
        dropped: reason -> rows that it took out.
        examples: reason -> the first few of them, with why; shortened, personal data masked.
        report: the step's own figures.
    """

    config: StepConfig
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The step's name in a recipe."""
        return str(self.config.model_dump()["step"])

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.rows - sum(self.dropped.values())

    def drop(self, reason: str, detail: str, row: Row | Callable[[], Row]) -> None:
        """Counts a dropped row; the row itself is asked for only where it is shown."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN_DROPS:
            masked, _ = mask_row(row() if callable(row) else row, PiiStep())
            shown.append(f"{detail}: {masked!r}"[:SHOWN_CHARS])

    def add(self, other: "StepCount") -> None:
        """Adds what the same step did to the next chunk."""
        self.rows += other.rows
        self.dropped.update(other.dropped)
        for reason, shown in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + shown)[:SHOWN_DROPS]
        self.report = added(self.report, other.report)


def cleaned(
    rows: Iterable[SplitRow],
    steps: list[StepConfig],
    folder: Path,
    inputs: Callable[[StepConfig], dict[str, Any]],
    workers: int = 1,
) -> tuple[Iterator[SplitRow], list[StepCount]]:
    """The rows that the steps leave, in order; nothing runs before they are asked for.

    Args:
        rows: (split, row) in the order of the source.
        steps: in the order in which they run.
        folder: for files of rows, which are gone when the last row has been given.
        inputs: what a step takes beside the rows: evaluation texts, models.
        workers: processes for row steps; 1 = this one alone.

    Returns:
        The rows, and one count per step, filled as the rows are taken.
    """
    counts = [StepCount(step) for step in steps]
    stream = iter(rows)
    for (scope, number), group in groupby(enumerate(counts), key=lambda item: _scope(item[1].config, item[0])):
        members = [count for _, count in group]
        if scope == "row":
            stream = _row_steps(stream, members, inputs, workers)
        else:
            stream = _set_step(stream, members[0], folder / f".{number}.rows", inputs)
    return stream, counts


def _scope(step: StepConfig, number: int) -> tuple[str, int]:
    """Neighbouring row steps are run together; each other step, and one that needs a model's memory, for itself."""
    if SCOPE[step.model_dump()["step"]] == "set":
        return "set", number
    return "row", -1 if not isinstance(step, SafetyStep) else number


def _row_steps(
    rows: Iterator[SplitRow], counts: list[StepCount], inputs: Callable[[StepConfig], dict[str, Any]], workers: int
) -> Iterator[SplitRow]:
    steps = [count.config for count in counts]
    work = [(step, inputs(step)) for step in steps]
    chunks = _chunks(rows)
    if any(isinstance(step, SafetyStep) for step in steps):
        workers = 1  # a model is in memory once
    for chunk, found in _in_order(chunks, work, workers):
        for count, part in zip(counts, found, strict=True):
            count.add(part)
        yield from chunk


def _chunks(rows: Iterator[SplitRow]) -> Iterator[list[SplitRow]]:
    chunk: list[SplitRow] = []
    held = 0
    for split, row in rows:
        chunk.append((split, row))
        held += sum(map(len, texts_of(row)))
        if len(chunk) == CHUNK or held >= CHUNK_CHARS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


Work = list[tuple[StepConfig, dict[str, Any]]]
_work: Work = []  # of a worker process


def _start_worker(work: Work) -> None:
    _work[:] = work


def _work_on(chunk: list[SplitRow]) -> tuple[list[SplitRow], list[StepCount]]:
    return _clean_chunk(chunk, _work)


def _in_order(
    chunks: Iterator[list[SplitRow]], work: Work, workers: int
) -> Iterator[tuple[list[SplitRow], list[StepCount]]]:
    """Cleans chunks in other processes, a few ahead of who takes the results."""
    first = list(islice(chunks, FEW_CHUNKS)) if workers > 1 else []
    if workers <= 1 or len(first) < FEW_CHUNKS:
        yield from (_clean_chunk(chunk, work) for chunk in chain(first, chunks))
        return
    # spawn: a fork would copy the threads' locks of whatever library is loaded by now
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        waiting = deque(pool.submit(_work_on, chunk) for chunk in first)
        try:
            for chunk in chunks:
                while len(waiting) > max(FEW_CHUNKS, 2 * workers):
                    yield waiting.popleft().result()
                waiting.append(pool.submit(_work_on, chunk))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a cleaning process ended, probably killed for its memory: use fewer (--workers 1); or a script of "
                "yours calls this: put the call under `if __name__ == '__main__':`"
            ) from error


def _clean_chunk(chunk: list[SplitRow], work: Work) -> tuple[list[SplitRow], list[StepCount]]:
    splits, rows = [split for split, _ in chunk], [row for _, row in chunk]
    counts = []
    for step, given in work:
        result = run_step(step, rows, **given)
        count = StepCount(step, rows=len(rows), report=result.report)
        for item in result.dropped:
            count.drop(item.reason, item.detail, item.row)
        counts.append(count)
        rows, splits = list(result.rows), [splits[number] for number in result.index]
    return list(zip(splits, rows, strict=True)), counts


def _set_step(
    rows: Iterator[SplitRow], count: StepCount, path: Path, inputs: Callable[[StepConfig], dict[str, Any]]
) -> Iterator[SplitRow]:
    """Rows to a file, the step over all of them, and what is left of them from the file."""
    file = RowFile(path, rows)
    try:
        count.rows = len(file)
        logger.info("cleaning: %s over %d rows", count.name, len(file))
        if isinstance(count.config, ExactStep | NearStep):
            yield from _without_duplicates(file, count, count.config)
        else:
            yield from _step_in_memory(file, count, inputs(count.config))
    finally:
        file.close()


def _without_duplicates(file: RowFile, count: StepCount, step: ExactStep | NearStep) -> Iterator[SplitRow]:
    if isinstance(step, ExactStep):
        reasons, count.report = exact_reasons(file, step, file.splits)
    else:
        reasons, count.report = near_reasons(file, step, file.splits, file.path.parent)
    for number in sorted(reasons):
        reason, detail = reasons[number]
        count.drop(reason, detail, lambda number=number: file[number])  # type: ignore[misc]
    yield from file.take(number for number in range(len(file)) if number not in reasons)


def _step_in_memory(file: RowFile, count: StepCount, given: dict[str, Any]) -> Iterator[SplitRow]:
    if isinstance(count.config, SemanticStep):
        given = given | {"splits": file.splits}
    result = run_step(count.config, list(file), **given)
    count.report = result.report
    for item in result.dropped:
        count.drop(item.reason, item.detail, item.row)
    for number, row in zip(result.index, result.rows, strict=True):
        yield file.splits[number], row
