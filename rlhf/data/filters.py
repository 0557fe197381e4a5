"""Row filters and text clean-up. To add a filter, add one entry to `FILTERS`."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_PUNCTUATION = re.compile(r"([.,;:!?()\"])")
_SPACES = re.compile(r"[ \t\u00a0]+")


@dataclass(frozen=True)
class Filter:
    """A named test of one text.

    Attributes:
        argument: type of the value in the recipe, int or str.
        keep: (text, argument) -> True where the text may stay.
    """

    argument: type
    keep: Callable[[str, Any], bool]


def count_words(text: str) -> int:
    """Counts whitespace-separated words; each Chinese character or Japanese kana counts as one, for want of spaces."""
    return len(_WORD.findall(text))


FILTERS: dict[str, Filter] = {
    "min_words": Filter(int, lambda text, n: count_words(text) >= n),
    "max_words": Filter(int, lambda text, n: count_words(text) <= n),
    "min_chars": Filter(int, lambda text, n: len(text) >= n),
    "max_chars": Filter(int, lambda text, n: len(text) <= n),
    "contains": Filter(str, lambda text, pattern: re.search(pattern, text) is not None),
    "excludes": Filter(str, lambda text, pattern: re.search(pattern, text) is None),
}


def failed_filter(texts: list[str], filters: list[dict[str, int | str]]) -> str | None:
    """Returns the name of the first filter that one of `texts` fails, or None when all pass."""
    for item in filters:
        for name, argument in item.items():
            if not all(FILTERS[name].keep(text, argument) for text in texts):
                return name
    return None


def strip_html(text: str) -> str:
    """`<br>` becomes a newline, other tags vanish, entities are decoded."""
    return html.unescape(_TAG.sub("", _BREAK.sub("\n", text)))


def collapse_spaces(text: str) -> str:
    """Runs of spaces and tabs become one space; both ends of the text are trimmed."""
    return _SPACES.sub(" ", text).strip()


def space_punctuation(text: str) -> str:
    """Sentence punctuation stands alone, as in tokenised corpora: `so, good.` becomes `so , good .`"""
    return _PUNCTUATION.sub(r" \1 ", text)


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "strip_html": strip_html,
    "lowercase": str.lower,
    "space_punctuation": space_punctuation,
    "collapse_spaces": collapse_spaces,
}


def normalize(value: Any, steps: list[str]) -> Any:
    """Applies the named clean-up steps to every string inside a value (messages are lists of dicts)."""
    if isinstance(value, str):
        for step in steps:
            value = NORMALIZERS[step](value)
        return value
    if isinstance(value, list):
        return [normalize(item, steps) for item in value]
    if isinstance(value, dict):
        return {key: normalize(item, steps) for key, item in value.items()}
    return value
