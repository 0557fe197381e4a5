"""The data card: the figures of a prepared set for people. No text of the data, which may not be ours to show."""

from array import array
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.cleaning.base import Row, texts_of
from rlhf.data.cleaning.rules import units
from rlhf.data.steps import TEXT_COLUMNS

TokenCount = Callable[[str], int]
PERCENTILES = (5, 50, 95, 99)


class Sizes:
    """Characters, words and, with a tokenizer, tokens of each row; 8 bytes a row and unit."""

    def __init__(self, splits: list[str], tokens: TokenCount | None = None) -> None:
        self._count: dict[str, Callable[[str], int]] = {"characters": len, "words": count_words}
        if tokens:
            self._count["tokens"] = tokens
        self.values = {split: {unit: array("Q") for unit in self._count} for split in splits}

    def add(self, split: str, row: Row) -> None:
        """Measures the texts of a row, the contents of messages and lists among them."""
        texts = _texts(row)
        for unit, count in self._count.items():
            self.values[split][unit].append(sum(map(count, texts)))

    def rows(self, split: str) -> int:
        """How many rows of a split have been added."""
        return len(self.values[split]["characters"])

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """split -> unit -> total, mean and percentiles per row."""
        return {
            split: {unit: _summary(np.array(values)) for unit, values in units.items()}
            for split, units in self.values.items()
        }


def count_words(text: str) -> int:
    """Words between spaces; in text that is not ASCII each Chinese character or kana is a word."""
    return len(text.split() if text.isascii() else units(text))


def _summary(values: Any) -> dict[str, float]:
    if not len(values):
        return {"total": 0}
    points = {f"p{q}": int(np.percentile(values, q)) for q in PERCENTILES}
    return {"total": int(values.sum()), "mean": round(float(values.mean()), 1), **points, "max": int(values.max())}


def _texts(row: Row) -> list[str]:
    return list(texts_of(row, [name for name in TEXT_COLUMNS if name != "turns"]))  # the first of them is the prompt


def markdown(manifest: dict[str, Any], picture: str) -> str:
    """The card as Markdown.

    Args:
        manifest: of a prepared set.
        picture: path of what `draw` wrote, from the card's folder.
    """
    wrote = {True: "Written by a model. ", False: "Written by people. ", None: ""}[manifest["synthetic"]]
    parts = [f"# {manifest['name']}", ""]
    parts += [f"{wrote}Licence: {manifest['licence'] or 'not stated'}. {manifest['homepage'] or ''}".rstrip(), ""]
    parts += [f"Format `{manifest['format']}`, source sha256 `{manifest['source_hash'][:16]}`.", ""]
    parts += [f"![Rows left after each step, and words per row]({picture})", ""]
    for title, key in (("reading", "steps"), ("bad rows, by reason", "bad"), ("not converted, by reason", "dropped")):
        if manifest[key]:
            parts += [*_table([title, "rows"], manifest[key].items()), ""]
    if manifest["cleaning"]:
        rows = [
            (f"`{s['step']}`", s["rows"], s["kept"], _reasons(s), _figures(s["report"])) for s in manifest["cleaning"]
        ]
        parts += [*_table(["cleaning step", "rows", "kept", "dropped", "found"], rows), ""]
    parts += _size_table(manifest)
    return "\n".join(parts) + "\n"


def _table(head: list[str], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def _reasons(step: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in step["dropped"].items()) or "-"


def _figures(report: dict[str, Any], prefix: str = "") -> str:
    """The numbers of a report; texts and lists, such as examples of clusters, stay in the manifest."""
    parts = []
    for name, value in report.items():
        if isinstance(value, dict):
            parts.append(_figures(value, f"{prefix}{name} "))
        elif isinstance(value, bool):
            parts.append(f"{prefix}{name} {str(value).lower()}")
        elif isinstance(value, float):
            parts.append(f"{prefix}{name} {value:.3g}")
        elif isinstance(value, int) and value:
            parts.append(f"{prefix}{name} {value}")
        elif isinstance(value, list) and name == "clusters":
            parts.append(f"clusters {len(value)}")
    return ", ".join(part for part in parts if part)


def _size_table(manifest: dict[str, Any]) -> list[str]:
    head = ["split", "rows", "per row", "total", "mean", *(f"{q} %" for q in PERCENTILES), "most"]
    rows = []
    for split, found in manifest["sizes"].items():
        for unit, size in found.items():
            points = [size.get(f"p{q}", 0) for q in PERCENTILES]
            rows.append(
                (
                    split,
                    manifest["splits"][split],
                    unit,
                    size["total"],
                    size.get("mean", 0),
                    *points,
                    size.get("max", 0),
                )
            )
    counted = f" Tokens by `{manifest['tokenizer']}`." if manifest["tokenizer"] else ""
    note = f"A Chinese character counts as one word.{counted} Texts without a chat template."
    return [*_table(head, rows), "", note]


def draw(manifest: dict[str, Any], sizes: Sizes, path: Path) -> None:
    """Writes the card's picture: rows left after each step, and the distribution of words per row, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["read", *(f"{n + 1} {step['step']}" for n, step in enumerate(manifest["cleaning"])), "kept"]
    counts = [manifest["steps"]["read"], *(step["kept"] for step in manifest["cleaning"]), manifest["steps"]["kept"]]
    left.barh(range(len(names)), counts, color="#4477aa")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("rows left")
    edges = 2.0 ** np.arange(0, 17)
    for split, found in sizes.values.items():
        words = np.clip(np.array(found["words"]), 1, edges[-1] - 1)
        if len(words):
            right.hist(words, edges, weights=np.full(len(words), 1 / len(words)), histtype="step", label=split)
    right.set_xscale("log", base=2)
    right.set_xlabel("words per row")
    right.set_ylabel("share of the split")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "card", "svg.fonttype": "none"}):
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(" ".join(drawn.getvalue().split()) + "\n", encoding="utf-8")
