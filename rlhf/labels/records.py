"""The files of labelling: pairs for annotators, labels as they come in, and the preferences that follow from them.

selected.jsonl, one pair a line, the next one to label first:
    pair        identity: the same for both orders of the responses
    prompt      str, or a list of {"role", "content"} messages
    response_a, response_b   in an order drawn by the seed
    why         {"method", "score", "round", "order"}: how it was picked; `order` names what A was in the source
    from        {"recipe", "split", "source", "sha256", "row"}: where it comes from
    model       what the method looked at: {"features", "hash", "labels"}

labels.jsonl, one decision a line, only ever appended to: the fields of the pair, and
    label       a, b, tie, skip; or undo, which takes back this annotator's last decision on the pair
    annotator   a name
    time        when, UTC, ISO 8601
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.artifacts import fsync, sha256_json
from rlhf.errors import UserError

Row = dict[str, Any]

LABELS = "labels"  # folder below the artifact directory
PAIRS_FILE, LABELS_FILE = "selected.jsonl", "labels.jsonl"
VOTES = ("a", "b", "tie")
DECISIONS = (*VOTES, "skip", "undo")
_COLUMNS = {"pair": str, "prompt": (str, list), "response_a": str, "response_b": str}


def label_folder(artifacts: Path, data: str) -> Path:
    """Where the pairs and labels of a data recipe are, by its name or path."""
    return artifacts / LABELS / Path(data).stem


def pair_id(prompt: Any, first: str, second: str) -> str:
    """16 hex digits that name a pair, whichever response comes first."""
    return sha256_json([prompt, *sorted((first, second))])[:16]


def read_rows(path: Path, columns: Mapping[str, Any] = _COLUMNS) -> list[Row]:
    """The rows of selected.jsonl or labels.jsonl.

    Raises:
        UserError: no such file, or a line that is no such row. Empty lines are passed over, and so is a part of a row
            at the end: it was being written when the machine stopped.
    """
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): `make label-select` writes the pairs") from error
    rows = []
    for number, line in enumerate([*lines, tail] if _whole(tail) else lines, start=1):
        if not line.strip():
            continue
        row = _object(line) or {}
        wrong = [name for name, kind in columns.items() if not isinstance(row.get(name), kind)]
        if wrong:
            raise UserError(f"{path} line {number}: no row with {wrong[0]!r}: correct or remove the line")
        rows.append(row)
    return rows


def _object(line: bytes) -> Row | None:
    """What a line holds, if that is an object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _whole(tail: bytes) -> bool:
    """Whether what stands behind the last line end is a row all the same: some editors leave the end out."""
    return _object(tail) is not None


def read_labels(path: Path) -> list[Row]:
    """The rows of labels.jsonl, in the order of the decisions; none where there is no such file yet.

    Raises:
        UserError: a line that is no label.
    """
    if not path.exists():
        return []
    rows = read_rows(path, _COLUMNS | {"label": str, "annotator": str, "time": str})
    for number, row in enumerate(rows, start=1):
        if row["label"] not in DECISIONS:
            raise UserError(
                f"{path} line {number}: label {row['label']!r} is none of {', '.join(DECISIONS)}: correct it"
            )
    return rows


def append(path: Path, row: Row) -> None:
    """Adds a line and waits until the disk has it.

    A part of a row that an interrupted write left at the end goes first; a whole row without its line end stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "ab+") as file:
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _whole(content[end:]):
            file.write(b"\n")
        else:
            file.truncate(end)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        fsync(path.parent)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a whole file: the old one or the new one is there, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync(path.parent)


def decided(labels: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """pair -> annotator -> the decision that counts, in the order of the decisions: the last, unless it was undone."""
    found: dict[str, dict[str, Row]] = {}
    for row in labels:
        by_annotator = found.setdefault(row["pair"], {})
        by_annotator.pop(row["annotator"], None)
        if row["label"] != "undo":
            by_annotator[row["annotator"]] = row
    return found


def verdict(votes: Iterable[str]) -> tuple[str, float]:
    """The majority of `a`, `b` and `tie`, a draw being a tie, and the share of votes for it.

    Raises:
        ValueError: no votes.
    """
    counts = Counter(votes)
    if not counts:
        raise ValueError("no votes")
    most = max(counts.values())
    winners = [label for label, count in counts.items() if count == most]
    winner = winners[0] if len(winners) == 1 else "tie"
    return winner, counts[winner] / counts.total()


def why_of(row: Row) -> Row:
    """How a pair was picked; nothing where its file does not say it."""
    why = row.get("why")
    return why if isinstance(why, dict) else {}


def preferences(labels: Iterable[Row], ties: str = "drop", min_annotators: int = 1) -> Iterator[Row]:
    """Preference rows from labels: the majority of each pair's annotators.

    Args:
        labels: rows of labels.jsonl.
        ties: `drop` leaves them out; `both` gives a tied pair in both orders, which teaches that neither is better.
        min_annotators: pairs with fewer votes (skips do not count) are left out.

    Yields:
        prompt, chosen, rejected, and provenance: `pair`, `label`, `agreement` (share of the votes), `annotators`,
        `labelled_at` (the last vote), `method`, `from`, `model`. In the order in which pairs were first decided.
    """
    for by_annotator in decided(labels).values():
        votes = {name: row for name, row in sorted(by_annotator.items()) if row["label"] in VOTES}
        if len(votes) < max(1, min_annotators):
            continue
        label, agreement = verdict(row["label"] for row in votes.values())
        row = next(iter(votes.values()))
        sides = [(row["response_a"], row["response_b"]), (row["response_b"], row["response_a"])]
        orders = {"a": sides[:1], "b": sides[1:], "tie": sides if ties == "both" else []}[label]
        for chosen, rejected in orders:
            yield {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "pair": row["pair"],
                "label": label,
                "agreement": agreement,
                "annotators": list(votes),
                "labelled_at": max(vote["time"] for vote in votes.values()),
                "method": why_of(row).get("method"),
                "from": row.get("from"),
                "model": row.get("model"),
            }
