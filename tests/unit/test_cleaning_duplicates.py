"""Duplicates and contamination: benchmarks of planted copies and leaks, priorities, bounds."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.cleaning import ContaminationStep, ExactStep, NearStep, run_step
from rlhf.data.cleaning.contamination import eval_index
from rlhf.data.cleaning.duplicates import candidate_pairs, jaccard, plain
from rlhf.errors import UserError
from tests.unit.planted import near_copy, paragraph


def test_texts_are_compared_without_case_spacing_punctuation_and_form() -> None:
    assert plain("  Héllo,\nWORLD!  ｆｕｌｌ——宽 ") == "héllo world full 宽"
    rows = [{"t": "Hello, world"}, {"t": "hello world!"}, {"t": "hello word"}, {"u": "hello world"}]
    result = run_step(ExactStep(), rows)
    assert [(item.index, item.reason, item.detail) for item in result.dropped] == [
        (1, "exact_duplicate", "row 0 stays")
    ]
    assert result.index == [0, 2, 3]


@pytest.mark.parametrize("config", [ExactStep(), NearStep()])
def test_the_training_row_goes_and_the_test_row_stays(config: ExactStep | NearStep) -> None:
    if isinstance(config, NearStep):
        pytest.importorskip("rensa")
    a, b = paragraph(random.Random(0), False), paragraph(random.Random(1), True)
    rows = [{"t": text} for text in (a, b, a, b, a)]
    result = run_step(config, rows, splits=["train", "validation", "extra", "train", "test"])
    assert result.index == [1, 4]
    assert [item.detail.split("row ")[-1] for item in result.dropped] == [
        *("4 of test stays", "4 of test stays", "1 of validation stays")
    ]
    assert result.report == {"duplicates": 3, "across_splits": 3}
    assert run_step(config, rows, splits=["train"] * 5).report == {"duplicates": 3, "across_splits": 0}


@pytest.mark.parametrize("chinese", [False, True])
def test_planted_near_duplicates_are_found_with_recall_and_precision_of_98_percent(chinese: bool) -> None:
    pytest.importorskip("rensa")
    rng = random.Random(7)
    originals = [paragraph(rng, chinese) for _ in range(600)]
    copies = [near_copy(text, rng) for text in originals[:300]]
    rows = [{"prompt": "?", "completion": text} for text in originals + copies]
    splits = ["train"] * 600 + ["test"] * 300
    result = run_step(NearStep(), rows, splits=splits)
    gone = {item.index for item in result.dropped}
    assert len(gone & set(range(300))) / 300 >= 0.98
    assert len(gone & set(range(300))) / len(gone) >= 0.98
    assert run_step(NearStep(), rows, splits=splits).dropped == result.dropped  # deterministic


def test_a_chain_of_similar_rows_does_not_collapse() -> None:
    pytest.importorskip("rensa")
    text = paragraph(random.Random(3), False).split()
    # Each row is 0.8 similar to its neighbours alone: the second goes, the third is compared with the first.
    rows = [{"t": " ".join(text[start : start + 45])} for start in (0, 4, 8)]
    shingles = [{plain(r["t"])[i : i + 5] for i in range(len(plain(r["t"])) - 4)} for r in rows]
    low = jaccard(shingles[0], shingles[2])
    high = min(jaccard(shingles[0], shingles[1]), jaccard(shingles[1], shingles[2]))
    assert low < high
    assert run_step(NearStep(threshold=(low + high) / 2, rows_per_band=2), rows).index == [0, 2]
    assert run_step(NearStep(threshold=low, rows_per_band=2), rows).index == [0]


def test_empty_and_tiny_texts_do_not_break_the_hashing() -> None:
    pytest.importorskip("rensa")
    assert run_step(NearStep(), []).rows == []
    assert run_step(NearStep(), [{"t": ""}, {"t": "a"}, {"t": "!"}, {"t": "b"}]).index == [0, 1, 2, 3]
    # Rows without the columns that are compared are nobody's duplicates.
    assert run_step(NearStep(columns=["u"]), [{"t": "a"}, {"t": "a"}]).index == [0, 1]
    assert run_step(ExactStep(columns=["u"]), [{"t": "a"}, {"t": "a"}]).index == [0, 1]


def test_other_answers_to_one_long_prompt_are_no_duplicates() -> None:
    pytest.importorskip("rensa")
    long = " ".join(paragraph(random.Random(seed), False) for seed in range(6))
    answers = [
        "Yes, a red apple is what I want.",
        "No; nothing of that kind, thank you!",
        "yes a red apple is what I want",
    ]
    rows = [{"prompt": long, "completion": answer} for answer in answers]
    assert run_step(NearStep(), rows).index == [0, 1]
    assert run_step(NearStep(min_column=0), rows).index == [0]


@pytest.mark.parametrize("config", [ExactStep(across_only=True), NearStep(across_only=True)])
def test_across_only_leaves_what_repeats_inside_a_split(config: ExactStep | NearStep) -> None:
    if isinstance(config, NearStep):
        pytest.importorskip("rensa")
    a, b = paragraph(random.Random(0), False), paragraph(random.Random(1), True)
    rows = [{"t": text} for text in (a, a, b, b, a, a)]
    result = run_step(config, rows, splits=["train", "train", "train", "train", "test", "test"])
    assert result.index == [2, 3, 4, 5]
    assert result.report == {"duplicates": 2, "across_splits": 2}
    assert run_step(config, rows).index == [0, 1, 2, 3, 4, 5]


def test_the_size_of_a_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rensa")
    rows = [{"t": paragraph(random.Random(n % 7), n % 2 == 0)} for n in range(30)] + [{"t": ""}]
    whole = run_step(NearStep(), rows).index
    monkeypatch.setattr("rlhf.data.cleaning.duplicates._BATCH_SHINGLES", 500)
    assert run_step(NearStep(), rows).index == whole
    monkeypatch.setattr("rlhf.data.cleaning.duplicates._BATCH", 1)
    assert run_step(NearStep(), rows).index == whole


def test_candidates_of_large_buckets_grow_linearly() -> None:
    same = candidate_pairs(np.ones((2, 1000), dtype=np.uint64))
    assert len(same) < 1000 * 18  # all pairs would be 499,500
    assert {int(later) for later in same[:, 0]} == set(range(1, 1000))
    assert candidate_pairs(np.arange(20, dtype=np.uint64).reshape(2, 10)).shape == (0, 2)
    assert candidate_pairs(np.array([[1, 2, 1], [9, 9, 8]], dtype=np.uint64)).tolist() == [[1, 0], [2, 0]]


def test_jaccard() -> None:
    assert jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)
    assert jaccard(set(), set()) == 1.0


@pytest.mark.parametrize("chinese", [False, True])
def test_planted_leaks_are_found_with_recall_and_precision_of_98_percent(chinese: bool) -> None:
    rng = random.Random(5)
    exam = [paragraph(rng, chinese) for _ in range(200)]
    rows = [{"prompt": "", "completion": paragraph(rng, chinese)} for _ in range(600)]
    for number in range(200):  # a piece of 13 to 20 words or characters, in the middle of another text
        units = list(exam[number]) if chinese else exam[number].split()
        length = rng.randint(22, 30) if chinese else rng.randint(13, 20)
        start = rng.randrange(len(units) - length)
        piece = ("" if chinese else " ").join(units[start : start + length])
        text = rows[number]["completion"]
        rows[number] = {"prompt": "", "completion": f"{text[:50]} {piece.upper()}, {text[50:]}"}
    result = run_step(ContaminationStep(), rows, eval_sets={"exam": exam})
    found = {item.index for item in result.dropped}
    assert len(found & set(range(200))) / 200 >= 0.98
    assert len(found & set(range(200))) / len(found) >= 0.98
    assert result.report == {"per_set": {"exam": len(found)}}


def test_contamination_of_short_texts_templates_and_columns() -> None:
    sets = {"quiz": ["What is the capital of the old kingdom?", "Why?"], "long": [" ".join("abcdefghijklmnop")]}
    rows = [
        {"p": "Tell me: what is the capital of the old kingdom", "c": "x"},  # the whole short text
        {"p": "what is the capital of the old", "c": "kingdom"},  # not over columns
        {"p": "why", "c": "x"},
        {"p": "x", "c": " ".join("zbcdefghijklmnz")},  # 13 of b..n
        {"p": "x", "c": " ".join("zbcdefghijklmz")},  # 12
    ]
    result = run_step(ContaminationStep(), rows, eval_sets=sets)
    assert [(item.index, item.detail.split(":")[0]) for item in result.dropped] == [(0, "quiz"), (3, "long")]
    assert result.report == {"per_set": {"long": 1, "quiz": 1}}
    assert run_step(ContaminationStep(columns=["p"]), rows, eval_sets=sets).index == [1, 2, 3, 4]
    template = "please answer the following question in one short sentence and then explain it: "
    many = {"exam": [f"{template} {word}" for word in "abcdefghijkl"]}
    config = ContaminationStep(max_eval_texts=11)
    assert run_step(config, [{"t": template + "new"}, {"t": template + "c"}], eval_sets=many).index == [0]


def test_evaluation_texts_that_are_too_short_are_an_error() -> None:
    with pytest.raises(UserError, match="no evaluation text of quiz has 8 words"):
        eval_index({"quiz": ["Why?"]}, ContaminationStep())


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_gives_what_the_regular_expression_gives(text: str) -> None:
    assert plain(text) == re.sub(r"[\W_]+", " ", text.lower()).strip()
