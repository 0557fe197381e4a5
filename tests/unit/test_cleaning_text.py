"""Unicode repair and normalisation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ftfy")

from rlhf.data.cleaning import UnicodeStep, run_step
from rlhf.data.cleaning.text import clean_text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("The caf\u00c3\u00a9 isn\u00e2\u0080\u0099t open", "The café isn\u2019t open"),  # UTF-8 read as Latin-1
        ("\u00e4\u00bd\u00a0\u00e5\u00a5\u00bd\u00ef\u00bc\u008c\u00e4\u00b8\u0096\u00e7\u0095\u008c", "你好，世界"),
        ("cafe\u0301", "caf\u00e9"),  # NFC
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a\x00b\x07c\ufeff\u200bd\u00ade", "abcde"),
        ("\x1b[31merror\x1b[0m: x", "error: x"),
        ("safe\u202egpj.exe", "safegpj.exe"),  # bidirectional override
        ("a\u00a0b\u2009c", "a b c"),
        ("line  \n\n\n\nend\t ", "line\n\nend"),
        ("def f():\n    return  1", "def f():\n    return  1"),  # indentation stays
        ("\ud83d\ude00", "\U0001f600"),  # a pair of surrogates
        ("a\ud800b", "a\ufffdb"),  # a lone one
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),  # joiners stay
        ("ＡＢＣ１２３，你好！（是）", "ABC123，你好！（是）"),  # letters and digits, not punctuation
        ("x² ﬁ ①", "x² ﬁ ①"),  # NFC leaves what NFKC would rewrite
        ("“你好”——世界……《书》、「引」", "“你好”——世界……《书》、「引」"),
    ],
)
def test_text_is_repaired_and_nothing_else_changes(dirty: str, clean: str) -> None:
    assert clean_text(dirty, UnicodeStep()) == clean


@pytest.mark.parametrize(
    ("config", "clean"),
    [
        (UnicodeStep(full_width="keep"), "Ａ，１\u3000Ｂ ²"),
        (UnicodeStep(full_width="alphanumerics"), "A，1\u3000B ²"),
        (UnicodeStep(full_width="all"), "A,1 B ²"),
        (UnicodeStep(form="NFKC"), "A,1 B 2"),
        (UnicodeStep(form="none", full_width="keep"), "Ａ，１\u3000Ｂ ²"),
    ],
)
def test_width_and_form_can_be_chosen(config: UnicodeStep, clean: str) -> None:
    assert clean_text("Ａ，１\u3000Ｂ ²", config) == clean


def test_repair_and_whitespace_can_be_switched_off() -> None:
    assert clean_text("caf\u00c3\u00a9", UnicodeStep(repair=False)) == "caf\u00c3\u00a9"
    assert clean_text(" a \n\n\n\nb ", UnicodeStep(whitespace=False)) == " a \n\n\n\nb "
    assert clean_text(" a \n\n\n\u00a0b \n", UnicodeStep(trim=False)) == " a\n\n b \n"
    assert clean_text(" \n", UnicodeStep(trim=False)) == " \n"


@given(st.text(st.characters(codec=None, exclude_categories=[]), max_size=60))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean_text(text, UnicodeStep())
    assert clean_text(once, UnicodeStep()) == once
    untrimmed = clean_text(text, UnicodeStep(trim=False))
    assert clean_text(untrimmed, UnicodeStep(trim=False)) == untrimmed
    if text.strip() and not text[0].isspace() and not text[-1].isspace():
        assert untrimmed == once
    once.encode("utf-8")  # no lone surrogate is left


@given(
    st.text("的一是不了人我在有他这，。！？「」\n abcXYZ019.,!?'\"-", max_size=60).map(lambda t: " ".join(t.split()))
)
def test_clean_text_stays_as_it_is(text: str) -> None:
    assert clean_text(text, UnicodeStep()) == text


def test_messages_are_cleaned_and_roles_are_not() -> None:
    row = {"prompt": [{"role": "us\u200ber", "content": "a\u200bb"}], "label": 3, "completion": "ok"}
    result = run_step(UnicodeStep(), [row, {"completion": "ok"}])
    assert result.rows == [
        {"prompt": [{"role": "us\u200ber", "content": "ab"}], "label": 3, "completion": "ok"},
        {"completion": "ok"},
    ]
    assert result.report == {"changed": 1}
    assert row["prompt"] == [{"role": "us\u200ber", "content": "a\u200bb"}]  # the input is not written to


def test_only_the_named_columns_are_cleaned() -> None:
    assert run_step(UnicodeStep(columns=["a"]), [{"a": "x\x00", "b": "x\x00"}]).rows == [{"a": "x", "b": "x\x00"}]
