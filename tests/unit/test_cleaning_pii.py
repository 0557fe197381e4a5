"""Masking of personal data: a benchmark of planted values, and properties."""

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.cleaning import PiiStep, run_step
from rlhf.data.cleaning.pii import cn_id_valid, find_pii, iban_valid, luhn_valid, mask_row
from tests.unit.planted import MAKERS, SENTENCES_EN, SENTENCES_ZH, pii_texts

MASK = re.compile(r"<[A-Z0-9_]+_\d+>")


def masked(*texts: str, **config: Any) -> list[str]:
    """The texts of one row, masked together."""
    row, _ = mask_row({str(number): text for number, text in enumerate(texts)}, PiiStep(**config))
    return list(row.values())


@pytest.mark.parametrize("kind", MAKERS)
def test_planted_values_are_found_with_recall_and_precision_of_98_percent(kind: str) -> None:
    hits = wrong = 0
    missed = []
    for planted in pii_texts(kind, 400, seed=1):
        found = find_pii(planted.text)
        hits += planted.spans[0] in found
        wrong += sum(span != planted.spans[0] for span in found)
        if planted.spans[0] not in found:
            missed.append((planted.text[planted.spans[0][1] :][:60], found))
    assert hits / 400 >= 0.98, missed[:5]
    assert hits / (hits + wrong) >= 0.98, wrong


@pytest.mark.parametrize("sentence", SENTENCES_EN + SENTENCES_ZH)
def test_versions_dates_prices_orders_and_mathematics_stay(sentence: str) -> None:
    assert masked(sentence) == [sentence]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@b.de,c@d.org;a@B.de", "<EMAIL_1>,<EMAIL_2>;<EMAIL_1>"),
        ("+86 138 0013 8000 = 13800138000", "<PHONE_1> = <PHONE_1>"),
        ("call 2125550123 now; 2125550123 alone", "call <PHONE_1> now; 2125550123 alone"),
        ("座机 01062345678", "座机 <PHONE_1>"),
        ("4111-1111-1111-1111 / 4111111111111111", "<BANK_CARD_1> / <BANK_CARD_1>"),
        ("4111-1111-1111-1112", "4111-1111-1111-1112"),  # Luhn
        ("11010519491231002x 11010519491231002X", "<CN_ID_1> <CN_ID_1>"),
        ("110105194912310021", "110105194912310021"),  # check digit
        ("110105194913310020", "110105194913310020"),  # month 13
        ("ssn 219 09 9999", "ssn <SSN_1>"),
        ("sums: 219 09 9999", "sums: 219 09 9999"),
        ("+1 (345) 678-9012, 345-678-9012", "<PHONE_1>, <PHONE_1>"),
        ("219-09-9999, 000-12-3456, 666-12-3456", "<SSN_1>, 000-12-3456, 666-12-3456"),
        ("GB82 WEST 1234 5698 7654 32 and GB82WEST12345698765432", "<IBAN_1> and <IBAN_1>"),
        ("GB83 WEST 1234 5698 7654 32", "GB83 WEST 1234 5698 7654 32"),  # mod 97
        ("8.8.8.8 127.0.0.1 10.1.2.3 172.20.0.1 203.0.113.7", "8.8.8.8 127.0.0.1 10.1.2.3 172.20.0.1 <IPV4_1>"),
        (
            "Skype 3.6.0.244, ip 3.6.0.244, 来自3.6.0.244，Chrome 119.0.0.1",
            "Skype 3.6.0.244, ip <IPV4_1>, 来自<IPV4_1>，Chrome 119.0.0.1",
        ),
        ("2001:DB8:0:0::1 and 2001:db8::1, ::1, fe80::1, 12:30:45", "<IPV6_1> and <IPV6_1>, ::1, fe80::1, 12:30:45"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = <API_KEY_1>"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("a@b.com13800138000", "a@b.com13800138000"),  # neither ends there
        ("", ""),
    ],
)
def test_values(text: str, expected: str) -> None:
    assert masked(text) == [expected]


def test_a_value_has_one_placeholder_in_all_fields_of_a_row() -> None:
    row = {
        "prompt": [{"role": "user", "content": "I am a@b.de"}, {"role": "user", "content": "or c@d.de"}],
        "chosen": "Mail c@d.de",
        "rejected": "Mail A@B.de or e@f.de",
        "label": 4111111111111111,
    }
    result = run_step(PiiStep(), [row, {"chosen": "e@f.de"}, {"chosen": "none"}])
    assert result.rows[0] == {
        "prompt": [{"role": "user", "content": "I am <EMAIL_1>"}, {"role": "user", "content": "or <EMAIL_2>"}],
        "chosen": "Mail <EMAIL_2>",
        "rejected": "Mail <EMAIL_1> or <EMAIL_3>",
        "label": 4111111111111111,
    }
    assert result.rows[1:] == [{"chosen": "<EMAIL_1>"}, {"chosen": "none"}]
    assert result.report["changed"] == 2
    assert {kind: count for kind, count in result.report["masks"].items() if count} == {"EMAIL": 6}


def test_a_placeholder_in_the_text_is_not_given_to_another_value() -> None:
    assert masked("<EMAIL_1> wrote to", "a@b.de") == ["<EMAIL_1> wrote to", "<EMAIL_2>"]


def test_kinds_and_columns_can_be_chosen() -> None:
    assert masked("a@b.de 13800138000", kinds=["PHONE"]) == ["a@b.de <PHONE_1>"]
    assert masked("a@b.de", "a@b.de", columns=["1"]) == ["a@b.de", "<EMAIL_1>"]


@pytest.mark.parametrize(
    ("valid", "number", "broken"),
    [
        (luhn_valid, "79927398713", "79927398710"),  # the example of the standard
        (luhn_valid, "378282246310005", "378282246310006"),
        (cn_id_valid, "11010519491231002X", "110105194912310029"),  # the example of GB 11643
        (iban_valid, "DE89370400440532013000", "DE88370400440532013000"),
        (iban_valid, "NO9386011117947", "NO93860111179470"),
    ],
)
def test_check_digits(valid: Any, number: str, broken: str) -> None:
    assert valid(number) and not valid(broken)


kinds = st.sampled_from(sorted(MAKERS))
pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from(SENTENCES_EN + SENTENCES_ZH),
    st.builds(lambda kind, seed: MAKERS[kind](random.Random(seed)), kinds, st.integers(0, 99)),
    st.text("0123456789 -+.()@:abcAIK_<>/", max_size=30),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=6).map("".join), st.lists(pieces, max_size=3).map("\n".join))
def test_masking_twice_is_masking_once(first: str, second: str) -> None:
    once, _ = mask_row({"a": first, "b": second})
    assert mask_row(once) == (once, {})


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=5).map(" ".join))
def test_text_around_the_values_is_unchanged(text: str) -> None:
    # Each mask stands for something; the pieces between them stand in the text, in order, from its start to its end.
    new, counts = mask_row({"t": text})
    parts = MASK.split(new["t"]) if counts else [new["t"]]
    between = "(?s:.+?)".join(re.escape(part) for part in parts)
    assert re.fullmatch(between, text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.integers(0, 999).map(str)), max_size=8).map(" ".join))
def test_text_without_at_signs_colons_and_long_numbers_is_unchanged(text: str) -> None:
    text = re.sub(r"[@:+]|\d{3}(?=\d)|eyJ", "", text)
    text = re.sub(r"(?:\d[ .()-]*){7,}", "7", text)
    assert mask_row({"t": text}) == ({"t": text}, {})


@settings(max_examples=100, deadline=None)
@given(kinds, st.integers(0, 10_000))
def test_the_same_value_gets_the_same_placeholder(kind: str, seed: int) -> None:
    value = MAKERS[kind](random.Random(seed))
    sentence = "SSN, call: {} "  # a hint for the kinds that need one
    row, counts = mask_row({"a": sentence.format(value), "b": sentence.format(value), "c": sentence.format(value)})
    assert row["a"] == row["b"] == row["c"] == sentence.format(f"<{kind}_1>")
    assert counts == {kind: 3}
