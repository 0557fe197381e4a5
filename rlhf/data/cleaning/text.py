"""Unicode repair and normalisation: what a text looks like, never what it says."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal

from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, map_texts, optional_module

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # terminal colours, pasted with logs
# C0 and C1 but tab and newline, zero-width space, word joiner, BOM, soft hyphen, bidirectional overrides. ZWJ and ZWNJ
# stay: emoji and Persian need them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_NEWLINE = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL_OR_NEWLINE = re.compile(f"{_CONTROL.pattern}|{_NEWLINE.pattern}")
_FULL_WIDTH = re.compile("[\u3000\uff01-\uff5e]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_LINE_END = re.compile(r"[ \t\u3000]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WIDE = range(0xFF01, 0xFF5F)  # full-width forms of ! to ~
_ALNUM_WIDTH = {code: code - 0xFEE0 for code in _WIDE if chr(code - 0xFEE0).isalnum()}
_ALL_WIDTH = {code: code - 0xFEE0 for code in _WIDE} | {0x3000: 0x20}
_DIRTY_ASCII = re.compile("[\x00-\x08\x0b-\x1f\x7f]|[ \t](?=\n|\\Z)|\n{3}|\\A\\s")
_MAX_ROUNDS = 5  # of repair: text that was broken several times over; real texts settle after two


class UnicodeStep(StepConfig):
    """Unicode repair and normalisation."""

    step: Literal["unicode"] = "unicode"
    repair: bool = Field(default=True, description="Undo mojibake (UTF-8 read as another encoding) with ftfy.")
    form: Literal["NFC", "NFKC", "none"] = Field(
        default="NFC", description="Unicode form. NFKC also rewrites ², ﬁ, ① and all full-width characters."
    )
    full_width: Literal["keep", "alphanumerics", "all"] = Field(
        default="alphanumerics",
        description="Full-width forms made half-width: letters and digits, or punctuation (，！？：) too.",
    )
    whitespace: bool = Field(
        default=True, description="Odd spaces to spaces, none at the end of a line, at most one blank line."
    )
    trim: bool = Field(
        default=True,
        description="With `whitespace`: ends trimmed. A completion of a plain prompt may begin with a space.",
    )


def clean_text(text: str, config: UnicodeStep) -> str:
    """Repairs and normalises one text. Applied to its own output it changes nothing.

    Line breaks become newlines, control characters, terminal codes and invisible characters go, a pair of surrogates
    becomes its character and a lone one U+FFFD.

    Raises:
        UserError: `repair` without ftfy.
    """
    if config.whitespace and not config.trim and (body := text.strip()) != text:
        start = text.index(body) if body else len(text)
        return text[:start] + clean_text(body, config) + text[start + len(body) :]
    if text.isascii() and ((text.isprintable() and text == text.strip()) or not _DIRTY_ASCII.search(text)):
        return text
    for _ in range(_MAX_ROUNDS):
        new = _once(text, config)
        if new == text:
            break
        text = new
    return text


@lru_cache(maxsize=1)
def _is_bad() -> Callable[[str], bool]:
    """ftfy's test for mojibake, which `fix_encoding` makes too, after slower preparations."""
    return optional_module("ftfy.badness", "ftfy", "unicode").is_bad


def _once(text: str, config: UnicodeStep) -> str:
    if not text.isascii():
        if _SURROGATE.search(text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if config.repair and _is_bad()(text):
            text = optional_module("ftfy", "ftfy", "unicode").fix_encoding(text)
    if not text.isprintable() and _CONTROL_OR_NEWLINE.search(text):
        text = _CONTROL.sub("", _NEWLINE.sub("\n", _ANSI.sub("", text)))
    if not text.isascii():
        if config.full_width != "keep" and _FULL_WIDTH.search(text):
            text = text.translate(_ALNUM_WIDTH if config.full_width == "alphanumerics" else _ALL_WIDTH)
        if config.form != "none" and not unicodedata.is_normalized(config.form, text):
            text = unicodedata.normalize(config.form, text)
    if config.whitespace and text.isprintable():  # no line breaks, no spaces but the plain one
        text = text.strip()
    elif config.whitespace:
        if not text.isascii():
            text = _SPACE.sub(" ", text)
        text = _BLANK_LINES.sub("\n\n", _LINE_END.sub("", text)).strip()
    return text


def unicode_step(rows: Sequence[Row], config: UnicodeStep) -> StepResult:
    """Applies `clean_text`; drops nothing. Report: `changed` rows."""
    clean = [map_texts(row, partial(clean_text, config=config), config.columns) for row in rows]
    changed = sum(new is not old for new, old in zip(clean, rows, strict=True))
    return StepResult(clean, list(range(len(clean))), [], {"changed": changed})
