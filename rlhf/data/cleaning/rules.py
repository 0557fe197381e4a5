"""Rules that need no model: length, repetition, boilerplate lines, sensitive words."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, map_texts, split_result, texts_of
from rlhf.errors import UserError

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")


def units(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation; each Chinese character or Japanese kana is one unit."""
    return _UNIT.findall(text.lower())


def cjk_share(text: str) -> float:
    """Share of the text's units that are Chinese characters or kana; 0 without units."""
    found = _UNIT.findall(text)
    return sum(map(len, _IS_CJK.findall(text))) / len(found) if found else 0.0


class LengthStep(StepConfig):
    """Bounds on the length of each text."""

    step: Literal["length"] = "length"
    min_chars: int = Field(default=1, ge=0, description="Fewest characters of a text, spaces at its ends not counted.")
    max_chars: int = Field(default=100_000, ge=1, description="Most characters of a text.")
    min_words: int = Field(default=0, ge=0, description="Fewest words; a Chinese character counts as one.")
    max_words: int | None = Field(default=None, ge=1, description="Most words; null = no limit.")


def length_step(rows: Sequence[Row], config: LengthStep) -> StepResult:
    """Drops rows with a text outside the bounds."""
    return _by_text(rows, config, _length_fault)


def _length_fault(text: str, config: LengthStep) -> tuple[str, str] | None:
    chars = len(text.strip())
    if chars < config.min_chars:
        return "too_short", f"{chars} characters, min_chars {config.min_chars}"
    if chars > config.max_chars:
        return "too_long", f"{chars} characters, max_chars {config.max_chars}"
    if config.min_words or config.max_words is not None:
        words = len(_UNIT.findall(text))
        if words < config.min_words:
            return "too_short", f"{words} words, min_words {config.min_words}"
        if config.max_words is not None and words > config.max_words:
            return "too_long", f"{words} words, max_words {config.max_words}"
    return None


class RepetitionStep(StepConfig):
    """Repetition within one text, after table A1 of Gopher (Rae et al. 2021).

    Gopher's limits are for web pages. Answers repeat more, in lists and in code, so the n-gram limits here are 1.5
    times (most frequent) and twice (repeated) Gopher's; docs/cleaning.md has the shares of texts that go under either.
    """

    step: Literal["repetition"] = "repetition"
    min_units: int = Field(
        default=50, ge=1, description="Shorter texts get only the `max_run` rule: shares of few words mean nothing."
    )
    max_run: int = Field(default=20, ge=2, description="Most times that one word or character may stand in a row.")
    duplicate_lines: float = Field(default=0.3, gt=0, le=1, description="Largest share of lines that came before.")
    duplicate_line_chars: float = Field(default=0.2, gt=0, le=1, description="The same by characters.")
    duplicate_paragraphs: float = Field(default=0.3, gt=0, le=1, description="Largest share of repeated paragraphs.")
    duplicate_paragraph_chars: float = Field(default=0.2, gt=0, le=1, description="The same by characters.")
    top_ngrams: dict[int, float] = Field(
        default={2: 0.30, 3: 0.27, 4: 0.24},
        description="n: largest share of the text's characters that its most frequent n-gram of words covers.",
    )
    duplicate_ngrams: dict[int, float] = Field(
        default={5: 0.30, 6: 0.28, 7: 0.26, 8: 0.24, 9: 0.22, 10: 0.20},
        description="n: largest share of characters inside n-grams of words that occur more than once.",
    )
    chars_per_word: int = Field(
        default=2, ge=1, description="Mostly Chinese texts: an n-gram of words is n times this many characters."
    )


def repetition_step(rows: Sequence[Row], config: RepetitionStep) -> StepResult:
    """Drops rows with a text that repeats itself."""
    return _by_text(rows, config, _repetition_fault)


def _repetition_fault(text: str, config: RepetitionStep) -> tuple[str, str] | None:
    found = units(text)
    # Cheap first: a run of n + 1 has n repetitions.
    if len(found) - len(set(found)) >= config.max_run and (run := _longest_run(found)) > config.max_run:
        return "repeated_unit", f"one word {run} times in a row, max_run {config.max_run}"
    if len(found) < config.min_units:
        return None
    return _line_fault(text, config) or _ngram_fault(found, config)


def _longest_run(found: list[str]) -> int:
    longest = run = 1
    for before, unit in pairwise(found):
        run = run + 1 if unit == before else 1
        longest = max(longest, run)
    return longest


def _line_fault(text: str, config: RepetitionStep) -> tuple[str, str] | None:
    for name, parts, share, char_share in (
        ("lines", text.split("\n"), config.duplicate_lines, config.duplicate_line_chars),
        ("paragraphs", text.split("\n\n"), config.duplicate_paragraphs, config.duplicate_paragraph_chars),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        if len(set(parts)) == len(parts):
            continue
        seen: set[str] = set()
        repeated = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
        lines = len(repeated) / len(parts)
        chars = sum(map(len, repeated)) / sum(map(len, parts))
        if lines > share or chars > char_share:
            return f"repeated_{name}", f"{lines:.2f} of {name}, {chars:.2f} of characters; limits {share}, {char_share}"
    return None


def _ngram_fault(found: list[str], config: RepetitionStep) -> tuple[str, str] | None:
    chinese = sum(map(bool, map(_IS_CJK.match, found))) > len(found) / 2
    scale = config.chars_per_word if chinese else 1
    lengths = [len(unit) for unit in found]
    total = sum(lengths)
    for n, limit in sorted(config.top_ngrams.items()):
        gram, count = Counter(_ngrams(found, n * scale)).most_common(1)[0]
        share = count * sum(map(len, gram)) / total
        if count > 1 and share > limit:
            return "top_ngram", f"one {n * scale}-gram covers {share:.2f} of the text, limit {limit}: {_show(gram)}"
    for n, limit in sorted(config.duplicate_ngrams.items()):
        grams = _ngrams(found, n * scale)
        if len(set(grams)) == len(grams):
            return None  # without a repeated n-gram there is no repeated longer one
        share = _repeated_chars(grams, lengths, n * scale) / total
        if share > limit:
            return "repeated_ngrams", f"repeated {n * scale}-grams cover {share:.2f} of the text, limit {limit}"
    return None


def _ngrams(found: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(found[start:] for start in range(n)), strict=False)) or [tuple(found)]


def _repeated_chars(grams: list[tuple[str, ...]], lengths: list[int], n: int) -> int:
    """Characters inside the second and later occurrences of an n-gram, each character counted once."""
    seen: set[tuple[str, ...]] = set()
    total = covered = 0  # covered: first unit that no counted n-gram reaches
    for start, gram in enumerate(grams):
        if gram in seen:
            total += sum(lengths[max(covered, start) : start + n])
            covered = start + n
        seen.add(gram)
    return total


def _show(gram: tuple[str, ...]) -> str:
    return repr(" ".join(gram)[:40])


_BOILERPLATE = [
    r"(?:copyright|©|\(c\))\s.{0,60}(?:\d{4}|all rights reserved).{0,60}",
    r"all rights reserved\.?",
    r"(?:this|our) (?:web)?site uses cookies.{0,200}",
    r"(?:please )?(?:accept|enable) (?:all )?(?:cookies|javascript).{0,100}",
    r"(?:click|tap) here to .{0,80}",
    r"(?:subscribe|sign up) (?:to|for) (?:our|the) .{0,40}(?:newsletter|channel|mailing list|updates).{0,60}",
    r"(?:share|follow us|like us) on (?:facebook|twitter|instagram|linkedin|pinterest|x)\b.{0,80}",
    r"(?:(?:terms of (?:use|service)|privacy policy|contact us)(?:\s*[|·/&,-]\s*|$)){1,4}",
    r"skip to (?:main )?content",
    r"(?:read more|continue reading|load more|back to top)[ .…»>]*",
    r"lorem ipsum dolor sit amet.{0,500}",
    r"版权所有.{0,60}",
    r"(?:本文|文章)?(?:未经(?:授权|许可|允许|本站同意)).{0,20}(?:转载|复制|使用).{0,40}",
    r"(?:转载请注明|欢迎转载|本文转自|文章来源[:：]|原文链接[:：]).{0,100}",
    r"(?:点击|扫码|扫描二维码|长按).{0,20}(?:关注|订阅|下载|阅读原文|查看更多).{0,40}",
    r"(?:阅读原文|上一篇|下一篇|返回顶部|返回首页|查看更多|加载更多)(?:[:：].{0,60})?",
    r"(?:责任编辑|责编)[:：].{0,40}",
    r"(?:京|沪|粤|浙|苏)ICP备\d+号.{0,40}",
]


class BoilerplateStep(StepConfig):
    """Lines of web pages that say nothing: cookie notices, copyright, navigation."""

    step: Literal["boilerplate"] = "boilerplate"
    patterns: list[str] = Field(
        default_factory=list, description="Further regular expressions; each must match a whole line, case ignored."
    )
    shipped: bool = Field(default=True, description="Use the shipped English and Chinese patterns.")
    max_share: float = Field(
        default=0.5, gt=0, le=1, description="A text that loses more than this share of its characters is dropped."
    )

    @model_validator(mode="after")
    def _check(self) -> "BoilerplateStep":
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is not a regular expression ({error})") from error
        if not self.shipped and not self.patterns:
            raise ValueError("shipped is false and patterns is empty; give patterns, or remove the step")
        return self


@lru_cache(maxsize=16)
def _line_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # The newline before or after goes with the line.
    union = "|".join(f"(?:{pattern})" for pattern in patterns)
    return re.compile(rf"^[ \t]*(?:{union})[ \t]*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE)


def boilerplate_step(rows: Sequence[Row], config: BoilerplateStep) -> StepResult:
    """Removes boilerplate lines; drops a row when a text is mostly boilerplate. Report: `changed` rows, `lines`."""
    pattern = _line_pattern(tuple((_BOILERPLATE if config.shipped else []) + config.patterns))
    reasons: dict[int, tuple[str, str]] = {}
    new: list[Row] = []
    report = {"changed": 0, "lines": 0}
    for number, row in enumerate(rows):
        removed = [0]

        def strip(text: str, index: int = number, removed: list[int] = removed) -> str:
            left, count = pattern.subn("", text)
            if not count:
                return text
            removed[0] += count
            share = 1 - len(left) / len(text)
            if share > config.max_share:
                reasons[index] = ("boilerplate", f"{share:.2f} of a text, max_share {config.max_share}")
            return left.rstrip("\n")

        new.append(map_texts(row, strip, config.columns))
        if removed[0] and number not in reasons:
            report["changed"] += 1
            report["lines"] += removed[0]
    result = split_result(rows, reasons, report)
    result.rows = [new[number] for number in result.index]
    return result


class SensitiveStep(StepConfig):
    """Drops rows that hold a listed word."""

    step: Literal["sensitive"] = "sensitive"
    words: list[str] = Field(default_factory=list, description="Words; Latin ones match whole words, case ignored.")
    file: str | None = Field(
        default=None, min_length=1, description="UTF-8 text file with one word a line; lines that begin with # are not."
    )
    max_hits: int = Field(default=0, ge=0, description="Most hits that a row may have.")

    @model_validator(mode="after")
    def _check(self) -> "SensitiveStep":
        if not self.file and not [word for word in self.words if word.strip()]:
            raise ValueError("words and file are both empty; give one of them, or remove the step")
        return self


def sensitive_step(rows: Sequence[Row], config: SensitiveStep) -> StepResult:
    """Drops rows with more than `max_hits` listed words. The list is the user's: none is shipped.

    Raises:
        UserError: the file is missing, not UTF-8, or holds no word.
    """
    pattern = _word_pattern(tuple(config.words), config.file)
    reasons: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        hits = [hit for text in texts_of(row, config.columns) for hit in pattern.findall(text)]
        if len(hits) > config.max_hits:
            reasons[number] = ("sensitive_word", f"{len(hits)} hits, max_hits {config.max_hits}: {hits[0]!r}")
    return split_result(rows, reasons)


@lru_cache(maxsize=4)
def _word_pattern(words: tuple[str, ...], file: str | None) -> re.Pattern[str]:
    found = [word.strip() for word in words]
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sensitive.file: cannot read {file!r} ({error}); give a UTF-8 text file") from error
        found += [line.strip() for line in lines if not line.startswith("#")]
        if not any(found):
            raise UserError(f"sensitive.file: {file!r} holds no word; write one a line")
    tree: dict[str, Any] = {}
    for word in found:
        node = tree
        for char in word.lower():
            node = node.setdefault(char, {})
        if word:
            node[""] = {}
    # A word that begins or ends with a Latin letter must begin or end there: `class` holds no `ass`.
    return re.compile(_tree_pattern(tree), re.IGNORECASE)


def _tree_pattern(tree: dict[str, Any], before: str = "") -> str:
    """A regular expression of a tree of characters: `re` walks it in one pass, however many words there are."""
    parts = []
    for char, below in sorted(tree.items(), reverse=True):  # longer words first
        if char:
            start = r"(?<![A-Za-z0-9_])" if not before and re.match(r"\w", char, re.ASCII) else ""
            parts.append(start + re.escape(char) + _tree_pattern(below, char))
        else:
            parts.append(r"(?![A-Za-z0-9_])" if re.match(r"\w", before, re.ASCII) else "")
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _by_text(rows: Sequence[Row], config: Any, fault: Any) -> StepResult:
    reasons: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        for text in texts_of(row, config.columns):
            found = fault(text, config)
            if found is not None:
                reasons[number] = found
                break
    return split_result(rows, reasons)
