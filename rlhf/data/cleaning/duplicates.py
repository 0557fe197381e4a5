"""Exact and near duplicates, across splits too: the row of the weaker split goes.

Near duplicates by MinHash (Broder 1997) and banded locality-sensitive hashing, the candidates confirmed by their true
Jaccard similarity. Per row and in memory are 16 bytes of hash (exact), or those of one band while the others are in a
file (near); shingles are made twice instead of being kept. Rensa does the hashing (docs/cleaning.md: why not
datasketch).
"""

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, joined, optional_module, progress, split_result

_NOT_WORD = re.compile(r"[\W_]+")
_ASCII_NOT_WORD = {code: " " for code in range(128) if _NOT_WORD.match(chr(code))}  # ten times as fast
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_BATCH = 2000  # rows, and
_BATCH_SHINGLES = 1_000_000  # shingles, about 100 bytes each, in memory at once
_FULL_GROUP = 16  # rows in one bucket that are all compared with each other; of more, each with the first ones
PRIORITY = ["test", "validation", "train"]


class _Duplicates(StepConfig):
    priority: list[str] = Field(
        default=PRIORITY,
        description="Splits whose rows stay, strongest first; splits not named come before the last one.",
    )

    across_only: bool = Field(
        default=False, description="A row goes only for a row of another split: leaks, not repetition inside a split."
    )


class ExactStep(_Duplicates):
    """Drops rows whose texts equal another row's but for case, spacing, punctuation and Unicode form."""

    step: Literal["exact_duplicates"] = "exact_duplicates"


class NearStep(_Duplicates):
    """Drops rows whose texts are nearly another row's."""

    step: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity of shingles from which a row goes."
    )
    min_column: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Each column alone must be so similar too: other answers to one long prompt are no duplicates.",
    )
    bands: int = Field(default=20, ge=1, description="Bands of the signature; more find more and cost more.")
    rows_per_band: int = Field(default=6, ge=1, description="Hashes per band; more make a band stricter.")
    shingle: int = Field(default=5, ge=1, description="Characters per shingle.")
    shingle_cjk: int = Field(default=3, ge=1, description="The same for mostly Chinese or Japanese texts.")
    seed: int = Field(default=0, ge=0, description="Seed of the hash functions.")


def plain(text: str) -> str:
    """A text as duplicates are compared: NFKC, lower case, only letters and digits, one space between words."""
    if text.isascii():
        return " ".join(text.lower().translate(_ASCII_NOT_WORD).split())
    text = unicodedata.normalize("NFKC", text)
    return _NOT_WORD.sub(" ", text.lower()).strip()


Reasons = dict[int, tuple[str, str]]


def exact_step(rows: Sequence[Row], config: ExactStep, splits: Sequence[str] | None = None) -> StepResult:
    """Of rows with equal texts the first of the strongest split stays. Memory: 16 bytes of hash per row."""
    return split_result(rows, *exact_reasons(rows, config, splits))


def exact_reasons(
    rows: Sequence[Row], config: ExactStep, splits: Sequence[str] | None = None
) -> tuple[Reasons, dict[str, int]]:
    """What `exact_step` drops: (reason, detail) by row number, and its report. Each row is asked for once."""
    order = split_order(len(rows), splits, config.priority)
    keys = np.zeros((len(order), 2), dtype=np.uint64)
    for place, number in enumerate(progress(order, "exact_duplicates")):
        # The column goes in too: a prompt that another row has as its completion is no duplicate.
        parts = [f"{name}\x00{text}" for name, text in _columns(rows[int(number)], config)]
        if parts:
            key = hashlib.blake2b("\x01".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            keys[place] = np.frombuffer(key, dtype=np.uint64)
    reasons: Reasons = {}
    places = np.lexsort(keys.T)  # stable: of equal keys the first in the order comes first
    places = places[keys[places].any(axis=1)]  # no text, no duplicate
    new = np.r_[True, (keys[places[1:]] != keys[places[:-1]]).any(axis=1)][: len(places)]
    starts = np.flatnonzero(new)
    for at in np.flatnonzero(~new).tolist():
        first, number = (int(order[places[i]]) for i in (starts[np.searchsorted(starts, at) - 1], at))
        if not config.across_only or _apart(first, number, splits):
            reasons[number] = ("exact_duplicate", _stays(first, splits))
    return reasons, _across(reasons, splits)


def near_step(rows: Sequence[Row], config: NearStep, splits: Sequence[str] | None = None) -> StepResult:
    """Drops each row that is at least `threshold` similar to a row that stays and stands before it.

    Rows are taken in the order of `priority`, then of the input: a training row never removes a test row. Similar to a
    dropped row alone is no reason to go, so chains do not collapse.

    Raises:
        UserError: rensa is not installed.
    """
    return split_result(rows, *near_reasons(rows, config, splits))


def near_reasons(
    rows: Sequence[Row], config: NearStep, splits: Sequence[str] | None = None, folder: Path | None = None
) -> tuple[Reasons, dict[str, int]]:
    """What `near_step` drops: (reason, detail) by row number, and its report. Rows are asked for again and again.

    In `folder` is a nameless file meanwhile, of 8 bytes per row and band.
    """
    order = split_order(len(rows), splits, config.priority)
    texts = _Texts(rows, config)
    shingles = (texts.shingles(int(number)) for number in progress(order, "near_duplicates"))
    reasons: Reasons = {}
    pairs = candidate_pairs(band_hashes(shingles, len(order), config, folder))
    for later, earlier in progress(pairs, "near_duplicates, candidates"):
        number, other = int(order[later]), int(order[earlier])
        if number in reasons or other in reasons or (config.across_only and not _apart(number, other, splits)):
            continue
        similarity = texts.similarity(number, other)
        if similarity >= config.threshold:
            reasons[number] = ("near_duplicate", f"similarity {similarity:.2f}, {_stays(other, splits)}")
    return reasons, _across(reasons, splits)


class _Texts:
    """Shingles of rows, made when asked for."""

    def __init__(self, rows: Sequence[Row], config: NearStep) -> None:
        self.rows, self.config = rows, config
        self._row = lru_cache(maxsize=_FULL_GROUP + 2)(self._uncached_row)  # candidates come in groups

    def shingles(self, number: int) -> set[str]:
        """Of the whole row; none where it has no text."""
        return self._row(number)[1]

    def similarity(self, first: int, second: int) -> float:
        """Of the whole rows; 0 where a column alone is below `min_column`."""
        (mine, my_shingles), (other, other_shingles) = self._row(first), self._row(second)
        if mine.keys() != other.keys():
            return 0.0
        whole = jaccard(my_shingles, other_shingles)
        if len(mine) == 1 or whole < self.config.threshold:
            return whole
        alone = min(jaccard(self._shingled(mine[name]), self._shingled(other[name])) for name in mine)
        return whole if alone >= self.config.min_column else 0.0

    def _uncached_row(self, number: int) -> tuple[dict[str, str], set[str]]:
        texts = dict(_columns(self.rows[number], self.config))
        return texts, self._shingled(" ".join(texts.values()))

    def _shingled(self, text: str) -> set[str]:
        if not text:
            return set()
        chinese = len(_CJK.findall(text)) > len(text) / 2
        size = self.config.shingle_cjk if chinese else self.config.shingle
        return {text[start : start + size] for start in range(max(1, len(text) - size + 1))}


def _columns(row: Row, config: StepConfig) -> Iterator[tuple[str, str]]:
    """The columns that hold letters or digits, as they are compared."""
    for name, value in sorted(row.items()):
        if isinstance(value, str | list | dict) and (config.columns is None or name in config.columns):
            text = plain(joined(value))
            if text:
                yield name, text


def _apart(first: int, second: int, splits: Sequence[str] | None) -> bool:
    return splits is not None and splits[first] != splits[second]


def split_order(count: int, splits: Sequence[str] | None, priority: Sequence[str]) -> NDArray[np.int64]:
    """Row numbers, rows of the strongest split first, otherwise in input order."""
    if splits is None:
        return np.arange(count)
    ranks = {name: float(rank) for rank, name in enumerate(priority)}
    values = (ranks.get(split, len(priority) - 1.5) for split in splits)
    return np.argsort(np.fromiter(values, dtype=np.float32, count=count), kind="stable")


def band_hashes(
    shingles: Iterator[set[str]], count: int, config: NearStep, folder: Path | None = None
) -> Iterator[NDArray[np.uint64]]:
    """The band hashes of MinHash signatures, a band (count) at a time. Rows without shingles have zeros."""
    minhash = optional_module("rensa", "rensa", "near_duplicates").RMinHash
    size, start = config.bands * config.rows_per_band, 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for batch in _batches(shingles):
            signatures = minhash.digest_matrix_from_token_sets(batch, size, config.seed).to_rows()
            bands = np.array(signatures, dtype=np.uint64).reshape(len(batch), config.bands, config.rows_per_band)
            folded = np.zeros(bands.shape[:2], dtype=np.uint64)
            for row in range(config.rows_per_band):  # FNV-1a, a 32-bit hash at a time
                folded = (folded ^ bands[:, :, row]) * np.uint64(0x100000001B3) + np.uint64(0x9E3779B97F4A7C15)
            folded[[number for number, tokens in enumerate(batch) if not tokens]] = 0
            for band, hashes in enumerate(folded.T):
                file.seek(8 * (band * count + start))
                file.write(hashes.tobytes())
            start += len(batch)
        for band in range(config.bands):
            file.seek(8 * band * count)
            yield np.frombuffer(file.read(8 * count), dtype=np.uint64)


def _batches(shingles: Iterator[set[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    held = 0
    for row in shingles:
        batch.append(list(row))
        held += len(row)
        if len(batch) == _BATCH or held >= _BATCH_SHINGLES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def candidate_pairs(bands: Iterable[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Pairs of rows that share a band.

    Args:
        bands: of each the hashes (rows), as `band_hashes` gives them.

    Returns:
        (pairs, 2): later row, earlier row; sorted, each once. Of buckets with more than 16 rows, each row is paired
        with the first 16 and with the one before it: memory stays linear when thousands of rows are alike.
    """
    pairs: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    for band in bands:
        order = np.argsort(band, kind="stable")
        order = order[np.searchsorted(band[order], 1) :]  # zeros: rows without text
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0])
        ends = np.r_[starts[1:], len(order)]
        found: list[tuple[int, int]] = []
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            group = order[start:end].tolist()
            head = group[:_FULL_GROUP]
            found += [(later, earlier) for at, later in enumerate(head) for earlier in head[:at]]
            found += [(later, earlier) for later in group[_FULL_GROUP:] for earlier in head]
            found += [(later, earlier) for earlier, later in pairwise(group[_FULL_GROUP - 1 :])]
        if found:
            pairs.append(np.array(found, dtype=np.int64))
    return np.unique(np.concatenate(pairs), axis=0)


def jaccard(first: set[str], second: set[str]) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def _stays(number: int, splits: Sequence[str] | None) -> str:
    return f"row {number}" + (f" of {splits[number]}" if splits is not None else "") + " stays"


def _across(reasons: dict[int, tuple[str, str]], splits: Sequence[str] | None) -> dict[str, int]:
    """How many dropped rows there are, and how many of them stood in another split than the row that stays."""
    report = {"duplicates": len(reasons)}
    if splits is not None:
        report["across_splits"] = sum(
            not detail.endswith(f" of {splits[number]} stays") for number, (_, detail) in reasons.items()
        )
    return report
