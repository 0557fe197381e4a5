"""Formats told from the rows, scored and thumbed answers as pairs, mixtures, variables in paths, constant memory."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.data import DataRecipe, load_data_recipe, load_rows
from rlhf.data.formats import detect_format
from rlhf.data.load import parts_of
from rlhf.data.prepare import prepare
from rlhf.errors import UserError
from rlhf.yamlio import validate

ROOT = Path(__file__).resolve().parents[2]
ALL = {"split": {"fractions": {"train": 1.0}}, "clean": []}


def recipe_of(path, rows, **fields):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return validate(DataRecipe, {"name": "mine", "source": {"files": str(path)}} | ALL | fields, "mine.yaml")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "a"}, "text"),
        ({"text": "a", "label": 1}, "rated_text"),
        ({"text": "a", "label": "sport"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, "preference"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "hh"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "sharegpt_preference"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "scored"),
        ({"turns": ["a", "b"]}, "turns"),
        ({"prompt": "a"}, "prompts"),
    ],
)
def test_format_is_told_from_the_rows_and_the_reason_logged(tmp_path, row, name, caplog):
    from rlhf.data.pipeline import detected

    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert detected(recipe_of(tmp_path / "x.jsonl", [row])).format == name
    assert f"format {name}, because the rows have" in caplog.text


def test_a_format_that_cannot_be_told_names_the_columns(tmp_path):
    with pytest.raises(UserError, match=r"cannot be told from the columns \(a, b\); name it"):
        load_rows(recipe_of(tmp_path / "x.jsonl", [{"a": 1, "b": 2}]), "train", "sft")


@pytest.mark.parametrize("column", ["response", "answer", "output", "target"])
def test_answers_beside_prompts_are_not_lost_in_silence(column):
    says = rf"the rows have 'prompt' and '{column}'; say .* `mapping: {{completion: {column}}}`"
    with pytest.raises(UserError, match=says):
        detect_format([{"prompt": "a", column: "b"}])
    assert detect_format([{"prompt": "a", "id": 1}])[0] == "prompts"


def test_a_mapping_helps_detection(tmp_path):
    rows = [{"question": "你好?", "std_answer": "好"}]
    recipe = recipe_of(tmp_path / "x.jsonl", rows, mapping={"prompt": "question"})
    assert load_rows(recipe, "train", "prompts") == [{"prompt": "你好?", "std_answer": "好"}]


def test_thumbs_become_pairs_where_a_prompt_has_both(tmp_path):
    rows = [
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "p", "completion": "worse", "label": "false"},
        {"prompt": "q", "completion": "alone", "label": 1},
    ]
    recipe = recipe_of(tmp_path / "x.jsonl", rows)
    (pair,) = load_rows(recipe, "train", "preference")
    assert (pair["prompt"], pair["chosen"]) == ("p", "good")
    assert pair["rejected"] in ("bad", "worse")
    liked = load_rows(recipe, "train", "sft")
    assert sorted(row["completion"] for row in liked) == ["alone", "good"]
    assert sorted(row["prompt"] for row in load_rows(recipe, "train", "prompts")) == ["p", "q"]  # each once


def test_scored_lists_become_the_best_against_a_lower_one(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["low", "top", "mid"], "scores": [1, 5.0, "3"]},
        {"prompt": "tie", "responses": ["a", "b"], "scores": [2, 2]},
        {"prompt": "one", "responses": ["a", " "], "scores": [2, 1]},
    ]
    recipe = recipe_of(tmp_path / "x.jsonl", rows)
    (pair,) = load_rows(recipe, "train", "preference")
    assert (pair["chosen"], pair["rejected"] in ("low", "mid")) == ("top", True)
    assert {row["completion"] for row in load_rows(recipe, "train", "sft")} == {"top", "a"}


def test_ultrafeedback_as_published(tmp_path):
    answers = [{"response": "ok", "overall_score": 4.0, "s": 1}, {"response": "bad", "overall_score": 2.0, "s": 9}]
    fields = {"format": "scored", "mapping": {"prompt": "instruction", "responses": "completions"}}
    rows = [{"instruction": "问", "completions": answers}]
    recipe = recipe_of(tmp_path / "x.jsonl", rows, **fields)
    assert load_rows(recipe, "train", "preference") == [{"prompt": "问", "chosen": "ok", "rejected": "bad"}]
    by_other = recipe_of(tmp_path / "x.jsonl", rows, **fields, score="s")
    assert load_rows(by_other, "train", "preference")[0]["chosen"] == "bad"


def write_parts(folder):
    for name, count in (("a", 100), ("b", 30)):
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]
        recipe_of(folder / f"{name}.jsonl", rows)
        part = {"source": {"files": str(folder / f"{name}.jsonl")}, "format": "prompt_completion", "name": name} | ALL
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part))
    mixture = [{"recipe": str(folder / f"{n}.yaml"), "fraction": f} for n, f in (("a", 0.7), ("b", 0.3))]
    (folder / "mix.yaml").write_text(yaml.safe_dump({"name": "mix", "mixture": mixture}))
    return load_data_recipe(folder / "mix.yaml")


def test_a_mixture_is_as_large_as_its_parts_allow(tmp_path):
    rows = load_rows(write_parts(tmp_path), "train", "sft")
    assert [sum(row["prompt"].startswith(part) for row in rows) for part in "ab"] == [70, 30]
    first = load_rows(write_parts(tmp_path), "train", "sft", limit=20)
    assert first == rows[:20]
    assert {row["prompt"][0] for row in first} == {"a", "b"}  # mixed, not one after the other


def test_a_mixture_without_fractions_has_every_row(tmp_path):
    write_parts(tmp_path)
    whole = {"name": "whole", "mixture": [{"recipe": str(tmp_path / f"{name}.yaml")} for name in "ab"]}
    rows = load_rows(validate(DataRecipe, whole, "whole.yaml"), "train", "sft")
    assert len({row["prompt"] for row in rows}) == 130
    assert {row["prompt"][0] for row in rows[:20]} == {"a", "b"}


def test_pairs_and_prompts_of_a_mixture_say_which_part_they_are_of(tmp_path):
    for name in "ab":
        pairs = [{"prompt": f"{name}{i}", "chosen": "x", "rejected": "y"} for i in range(3)]
        recipe_of(tmp_path / f"{name}.jsonl", pairs)
        part = {"source": {"files": str(tmp_path / f"{name}.jsonl")}, "format": "preference", "name": name} | ALL
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(part))
    whole = {"name": "whole", "mixture": [{"recipe": str(tmp_path / f"{name}.yaml")} for name in "ab"]}
    recipe = validate(DataRecipe, whole, "whole.yaml")
    for kind, column in (("preference", "source"), ("prompts", "mixture_part")):
        rows = load_rows(recipe, "train", kind)
        assert len(rows) == 6 and all(row[column] == row["prompt"][0] for row in rows)
    assert set(load_rows(recipe, "train", "sft")[0]) == {"prompt", "completion"}


def test_a_mixture_is_the_same_in_every_process(tmp_path):
    write_parts(tmp_path)
    code = (
        f"from rlhf.data import *; print(load_rows(load_data_recipe({str(tmp_path / 'mix.yaml')!r}), 'train', 'sft'))"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outs) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly one of source and mixture"),
        ({"mixture": [{"recipe": "a", "fraction": 0.5}]}, "the fractions sum to 0.5"),
        ({"mixture": [{"recipe": "a", "fraction": 1.0}, {"recipe": "b"}]}, "give all of them one, or none"),
        ({"mixture": [{"recipe": "a", "fraction": 1.0}], "format": "text"}, "format has no meaning beside mixture"),
    ],
)
def test_wrong_mixtures_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        validate(DataRecipe, {"name": "x"} | fields, "x.yaml")


def test_pairs_of_one_prompt_give_it_and_each_preferred_answer_once(tmp_path):
    pairs = [("p", "a", "x"), ("p", "a", "y"), ("p", "b", "x"), ("q", "a", "x")]
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs]
    recipe = recipe_of(tmp_path / "x.jsonl", rows, format="preference", **ALL)
    answers = {(row["prompt"], row["completion"]) for row in load_rows(recipe, "train", "sft")}
    assert answers == {("p", " a"), ("p", " b"), ("q", " a")} or answers == {("p", "a"), ("p", "b"), ("q", "a")}
    assert len(load_rows(recipe, "train", "sft")) == 3
    assert sorted(row["prompt"] for row in load_rows(recipe, "train", "prompts")) == ["p", "q"]
    assert len(load_rows(recipe, "train", "preference")) == 4
    written = [{"prompt": "p", "completion": "a"}] * 2  # as it stands there, twice
    asked = recipe_of(tmp_path / "y.jsonl", written, format="prompt_completion", **ALL)
    assert len(load_rows(asked, "train", "sft")) == 2


def test_duplicates_are_told_by_what_is_trained_on(tmp_path):
    """A column that no stage reads, called as one of another format, keeps no duplicate."""
    rows = [{"prompt": "what is it", "completion": "a film", "rejected": text} for text in ("one thing", "another")]
    recipe = recipe_of(tmp_path / "x.jsonl", rows, format="prompt_completion", **ALL | {"clean": [{"step": "default"}]})
    assert len(load_rows(recipe, "train", "sft")) == 1


def test_variables_in_paths(tmp_path, monkeypatch):
    recipe_of(tmp_path / "x.jsonl", [{"text": "中文"}])
    recipe = validate(DataRecipe, {"name": "v", "source": {"files": "${MY_DATA}/x.jsonl"}} | ALL, "v.yaml")
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    assert load_rows(recipe, "train", "text") == [{"text": "中文"}]
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(UserError, match="needs the environment variable MY_DATA, which is not set"):
        load_rows(recipe, "train", "text")


def test_prepare_writes_rows_counts_and_bad_rows(tmp_path):
    recipe = recipe_of(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": ""}, {"text": {}}], max_bad_rows=0.5)
    manifest = prepare(recipe, tmp_path / "out" / "mine")
    assert manifest["steps"] == {"read": 3, "bad": 1, "selected": 3, "in a split": 3, "converted": 1, "kept": 1}
    assert manifest["dropped"] == {"empty text": 1}
    assert (tmp_path / "out" / "mine" / "rows" / "train.jsonl").read_text("utf-8") == '{"text": "abc"}\n'
    record = json.loads((tmp_path / "out" / "mine" / "quarantine.jsonl").read_text("utf-8"))
    assert record["where"] == "row 3"
    card = (tmp_path / "out" / "mine" / "README.md").read_text("utf-8")
    assert "| bad | 1 |" in card
    assert "| train | 1 | characters | 3 | 3.0 |" in card
    before = (tmp_path / "out" / "mine" / "manifest.json").stat().st_mtime_ns
    prepare(recipe, tmp_path / "out" / "mine")
    assert (tmp_path / "out" / "mine" / "manifest.json").stat().st_mtime_ns == before


MEMORY = """
import sys
from pathlib import Path
from rlhf.data import load_data_recipe
from rlhf.data.prepare import prepare
prepare(load_data_recipe(sys.argv[1]), Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux' /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """100 MB are read with less than 60 MB more than 1 MB takes."""
    peaks = []
    for size in (1, 100):
        line = json.dumps({"text": "word " * 2000}) + "\n"
        with open(tmp_path / f"{size}.jsonl", "w") as file:
            file.writelines(line for _ in range(size * 100))
        (tmp_path / f"{size}.yaml").write_text(
            yaml.safe_dump({"name": f"s{size}", "source": {"files": str(tmp_path / f"{size}.jsonl")}} | ALL)
        )
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / f"{size}.yaml"), str(tmp_path / f"out{size}")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 60 * 1024


SHARED = {
    "hh_harmless_dev": ("preference", 1184),
    "rmb_harmless_dev": ("preference", None),
    "rmb_helpful_dev": ("preference", 6701),
    "ukp_convarg1_dev": ("preference", 9936),
    "dpo_en_demo": ("preference", 300),
    "dpo_zh_demo": ("preference", 300),
    "alpaca_en_demo": ("sft", 999),
    "alpaca_zh_demo": ("sft", 1000),
    "c4_demo": ("text", 300),
    "arena_hard": ("prompts", 500),
    "mt_bench": ("prompts", 80),
    "belle_zh": ("prompts", 1000),
}


@pytest.mark.skipif(not os.environ.get("RLHF_DATA"), reason="RLHF_DATA names no folder with the local sets")
@pytest.mark.parametrize("name", SHARED)
def test_local_sets_load_as_they_are(name):
    kind, expected = SHARED[name]
    recipe = load_data_recipe(name).model_copy(update={"clean": []})
    count = sum(len(load_rows(recipe, split, kind)) for split in recipe.split.names)
    assert count == expected if expected else count > 4000


def test_two_parts_of_one_name_would_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in (("one", "a"), ("two", "b")):
        text = f"{{name: same, source: {{files: {source}.jsonl}}, format: text}}"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    mixture = "{name: both, mixture: [{recipe: one.yaml, fraction: 0.5}, {recipe: two.yaml, fraction: 0.5}]}"
    (tmp_path / "both.yaml").write_text(mixture, encoding="utf-8")
    with pytest.raises(UserError, match="'both': two of its parts are called 'same'; rename one"):
        parts_of(load_data_recipe("both.yaml"))
    assert [part.name for part in parts_of(load_data_recipe("one.yaml"))] == ["same"]
