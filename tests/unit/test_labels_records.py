"""The files of labelling, the majority, and labels as a data source."""

import json
import math

import pytest
import torch
import yaml

from pipelines.label import main as label
from pipelines.label_select import main as label_select
from pipelines.status import status
from rlhf.artifacts import sha256_json
from rlhf.data import Renderer, load_data_recipe, load_rows
from rlhf.errors import UserError
from rlhf.labels import choose
from rlhf.labels.records import append, decided, pair_id, preferences, read_labels, read_rows, verdict
from rlhf.models import load_model, load_tokenizer
from tests.builders import build_reward_artifact, build_sft_artifact, write_rows


def vote(pair, annotator, label, time="2026-01-01T00:00:00.000+00:00"):
    row = {"pair": pair, "prompt": f"q {pair}", "response_a": f"A {pair}", "response_b": f"B {pair}"}
    row |= {"why": {"method": "mix"}, "from": {"row": 7}, "model": {"hash": "h"}}
    return row | {"label": label, "annotator": annotator, "time": time}


def test_a_pair_has_one_name_in_both_orders():
    assert pair_id("q", "x", "y") == pair_id("q", "y", "x") != pair_id("q", "x", "z")
    assert len(pair_id([{"role": "user", "content": "q"}], "x", "y")) == 16


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["a"], ("a", 1.0)),
        (["a", "b", "a"], ("a", 2 / 3)),
        (["a", "b"], ("tie", 0.0)),
        (["tie", "b", "tie"], ("tie", 2 / 3)),
        (["a", "tie"], ("tie", 0.5)),
    ],
)
def test_majority(votes, expected):
    assert verdict(votes) == pytest.approx(expected) if expected[0] == 0 else verdict(votes) == expected


def test_the_last_decision_counts_unless_undone():
    rows = [vote("p", "x", "a"), vote("p", "x", "b"), vote("p", "y", "a"), vote("p", "y", "undo")]
    assert {name: row["label"] for name, row in decided(rows)["p"].items()} == {"x": "b"}


def test_preferences_with_provenance():
    rows = [vote("p", "x", "a"), vote("p", "y", "a", "2026-01-02"), vote("p", "z", "b"), vote("q", "x", "b")]
    rows += [vote("r", "x", "tie"), vote("s", "x", "skip")]
    first, second = preferences(rows)
    assert (first["chosen"], first["rejected"], second["chosen"]) == ("A p", "B p", "B q")
    assert first["agreement"] == pytest.approx(2 / 3)
    assert (first["annotators"], first["labelled_at"]) == (["x", "y", "z"], "2026-01-02")
    assert (first["method"], first["from"], first["model"], first["pair"]) == ("mix", {"row": 7}, {"hash": "h"}, "p")
    assert [row["pair"] for row in preferences(rows, min_annotators=2)] == ["p"]
    both = [(row["chosen"], row["rejected"]) for row in preferences(rows, ties="both") if row["pair"] == "r"]
    assert both == [("A r", "B r"), ("B r", "A r")]


def test_a_torn_line_is_left_out_and_then_replaced(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    append(path, vote("p", "x", "a"))
    with path.open("ab") as file:
        file.write('{"pair": "中'.encode()[:-1])  # killed while it was writing
    assert [row["pair"] for row in read_labels(path)] == ["p"]
    append(path, vote("q", "x", "b"))
    assert [row["pair"] for row in read_labels(path)] == ["p", "q"]
    assert read_labels(tmp_path / "none.jsonl") == []


def test_a_whole_last_line_without_its_end_stays(tmp_path):
    """Editors and scripts leave it out, before and while the page is open."""
    path = tmp_path / "labels.jsonl"
    append(path, vote("1", "ann", "a"))
    append(path, vote("2", "王小明", "b"))
    path.write_bytes(path.read_bytes()[:-1])
    assert [row["pair"] for row in read_labels(path)] == ["1", "2"]
    append(path, vote("3", "bob", "tie"))
    path.write_bytes(b"\n" + path.read_bytes()[:-1] + b"\n\n")  # empty lines are no rows
    assert [row["annotator"] for row in read_labels(path)] == ["ann", "王小明", "bob"]


@pytest.mark.parametrize("line", ["[1]", "5", '"abc"', "null", "[" * 100_000], ids=str.__len__)
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    append(path, vote("1", "ann", "a"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 2: no row with 'pair'"):
        read_labels(path)


def test_a_pair_that_does_not_say_why_it_was_picked_is_no_error():
    rows = [vote("1", "ann", "a") | {"why": None}]
    assert [row["method"] for row in preferences(rows)] == [None]


def test_bad_files_say_where(tmp_path):
    path = write_rows(tmp_path / "labels.jsonl", [vote("p", "x", "a"), vote("p", "x", "maybe")])
    with pytest.raises(UserError, match=r"labels\.jsonl line 2: label 'maybe' is none of a, b, tie"):
        read_labels(path)
    (tmp_path / "broken.jsonl").write_text('{"pair": 3}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl line 1: no row with 'pair'"):
        read_rows(tmp_path / "broken.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def recipe(tmp_path, name, **changes):
    path = tmp_path / f"{name}.yaml"
    split = {"by": "prompt", "fractions": {"train": 1.0}}
    path.write_text(yaml.safe_dump({"name": name, "split": split, "clean": []} | changes))
    return path


def test_labels_are_a_data_source(tmp_path):
    rows = [vote("p", "x", "a"), vote("q", "x", "tie"), vote("r", "x", "b"), vote("r", "y", "b")]
    file = write_rows(tmp_path / "labels.jsonl", rows)
    keep = {"confidence": "agreement"}
    found = load_rows(
        load_data_recipe(recipe(tmp_path, "one", source={"labels": str(file)}, keep=keep)), "train", "preference"
    )
    assert sorted((row["chosen"], row["rejected"], row["confidence"]) for row in found) == [
        *(("A p", "B p", 1.0), ("B r", "A r", 1.0))
    ]
    both = {"labels": str(file), "ties": "both", "min_annotators": 1}
    assert len(load_rows(load_data_recipe(recipe(tmp_path, "two", source=both)), "train", "preference")) == 4
    with pytest.raises(UserError, match="ties: both gives pairs in both orders, which cleaning drops; write `clean: "):
        load_data_recipe(recipe(tmp_path, "three", source=both, clean=[{"step": "default"}]))


PAIRS = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def test_selection_is_written_for_annotators(tmp_path):
    file = write_rows(tmp_path / "p.jsonl", PAIRS)
    data = recipe(tmp_path, "mine", source={"files": str(file)})
    command = ["--data", str(data), "--artifacts", str(tmp_path / "a"), "--method", "random"]
    assert label_select([*command, "--count", "8"]) == 0
    path = tmp_path / "a" / "labels" / "mine" / "selected.jsonl"
    first = read_rows(path)
    assert len(first) == 8
    for row in first:
        number = row["from"]["row"]
        sides = [PAIRS[number - 1][side] for side in ("chosen", "rejected")]
        assert [row["response_a"], row["response_b"]] == (sides if row["why"]["order"] == "source" else sides[::-1])
        assert (row["why"]["method"], row["why"]["round"], row["from"]["source"]) == ("random", 1, str(file))
        assert row["pair"] == pair_id(row["prompt"], *sides)
    assert {row["why"]["order"] for row in first} == {"source", "swapped"}
    assert label_select([*command, "--count", "30"]) == 0  # the second round holds the others
    second = read_rows(path)
    assert second[:8] == first
    assert len({row["pair"] for row in second}) == 20 and {row["why"]["round"] for row in second[8:]} == {2}


def test_two_selections_at_once_lose_nothing(tmp_path, monkeypatch):
    """A second one ends while the first selects."""
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", PAIRS))})
    selected, labels = tmp_path / "labels" / "mine" / "selected.jsonl", tmp_path / "labels.jsonl"
    select = choose.select

    def slow(*args):
        monkeypatch.setattr(choose, "select", select)
        choose.choose(
            choose.Choice(load_data_recipe(data), count=4, method="random", seed=1), tmp_path, selected, labels
        )
        return select(*args)

    monkeypatch.setattr(choose, "select", slow)
    new = choose.choose(choose.Choice(load_data_recipe(data), count=6, method="random"), tmp_path, selected, labels)
    found = [row["pair"] for row in read_rows(selected)]
    assert len(found) == len(set(found)) == 4 + len(new) > 6


@pytest.mark.parametrize("method", ["mix", "diversity", "information", "random"])
def test_prompts_with_the_same_answers_are_selected_once_each(tmp_path, method):
    pairs = [{"prompt": f"is it {i}?", "response_a": "yes", "response_b": "no"} for i in range(40)]
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", pairs))}, clean=[])
    selected = tmp_path / "selected.jsonl"
    choice = choose.Choice(load_data_recipe(data), count=10, method=method)
    choose.choose(choice, tmp_path, selected, tmp_path / "labels.jsonl")
    assert len({row["pair"] for row in read_rows(selected)}) == len(read_rows(selected)) == 10


def test_labels_so_far_lead_the_selection(tmp_path):
    # Answers with "kind" win. What is left: pairs where both have it, and pairs where one has it.
    known = [{"prompt": f"k {i}", "response_a": f"kind word {i}", "response_b": f"rude word {i}"} for i in range(12)]
    known = [row | {"pair": str(i), "label": "a", "annotator": "x", "time": "t"} for i, row in enumerate(known)]
    sure = [{"prompt": f"s {i}", "response_a": f"rude word {i}", "response_b": f"kind word {i}"} for i in range(20, 26)]
    open_ = [{"prompt": f"o {i}", "response_a": f"kind word {i}", "response_b": f"kind word {i + 9}"} for i in (30, 40)]
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", sure + open_))})
    labels = write_rows(tmp_path / "l.jsonl", known)
    command = ["--data", str(data), "--artifacts", str(tmp_path / "a"), "--labels", str(labels), "--count", "2"]
    assert label_select([*command, "--method", "uncertainty"]) == 0
    found = read_rows(tmp_path / "a" / "labels" / "mine" / "selected.jsonl")
    assert sorted(row["prompt"] for row in found) == ["o 30", "o 40"]
    assert found[0]["model"] == {"features": "words", "hash": None, "labels": 12}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "uncertainy"], "no such method; did you mean 'uncertainty'"),
        (["--method", "uncertainty"], "knows nothing yet: name a reward model"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--method", "disagreement", "--reward", "reward"], "one model cannot disagree with itself"),
        (["--features", "no/such/folder"], "no/such/folder"),
        (["--split", "dev"], "no such split"),
    ],
)
def test_mistakes_of_select(tmp_path, capsys, options, says):
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", PAIRS))})
    assert label_select(["--data", str(data), "--artifacts", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "labels").exists()


def test_models_of_a_run_are_asked(tmp_path):
    sft = build_sft_artifact(tmp_path / "a", "tiny")
    reward = build_reward_artifact(tmp_path / "a", "tiny", sft=sft)
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", PAIRS))})
    command = ["--data", str(data), "--artifacts", str(tmp_path / "a"), "--method", "uncertainty", "--count", "20"]
    assert label_select([*command, "--features", "sft", "--reward", "reward", "--max-length", "48"]) == 0
    found = read_rows(tmp_path / "a" / "labels" / "mine" / "selected.jsonl")
    assert found[0]["model"]["features"] == str(tmp_path / "a" / "tiny" / "sft")
    assert found[0]["model"]["hash"] == sha256_json({"features": sft.hash, "reward": reward.hash})
    # The score is the entropy of sigmoid(score(a) - score(b)) of the reward model itself, highest first.
    tokenizer = load_tokenizer(reward.model_dir)
    model, renderer = load_model(reward.model_dir, "score").eval(), Renderer(tokenizer, False)

    def score(row, side):
        ids = renderer.prompt_ids(row["prompt"]) + renderer.response_ids(row["prompt"], row[side])
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.item()

    p = [1 / (1 + math.exp(score(row, "response_b") - score(row, "response_a"))) for row in found]
    expected = [-(q * math.log(q) + (1 - q) * math.log(1 - q)) for q in p]
    assert [row["why"]["score"] for row in found] == pytest.approx(expected, abs=2e-6)
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize("options", [["--method", "uncertainty", "--reward", "reward"], ["--features", "sft"]])
def test_pairs_longer_than_the_model_are_cut(tmp_path, caplog, options):
    sft = build_sft_artifact(tmp_path / "a", "tiny")
    build_reward_artifact(tmp_path / "a", "tiny", sft=sft)
    pairs = [{"prompt": f"q{i}", "response_a": "x" * i, "response_b": "y" * 400} for i in range(1, 5)]
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", pairs))}, clean=[])
    with caplog.at_level("WARNING", logger="rlhf"):
        assert label_select(["--data", str(data), "--artifacts", str(tmp_path / "a"), *options]) == 0
    found = read_rows(tmp_path / "a" / "labels" / "mine" / "selected.jsonl")
    assert len(found) >= 3 and all(math.isfinite(row["why"]["score"]) for row in found)
    assert "--reward" not in options or "tokens of 4 longer pairs (of 4)" in caplog.text


def test_unlabelled_pairs_are_no_training_data(tmp_path):
    rows = [{"prompt": "q", "response_a": "x", "response_b": "y"}]
    data = recipe(tmp_path, "mine", source={"files": str(write_rows(tmp_path / "p.jsonl", rows))})
    with pytest.raises(UserError, match=r"'preference' cannot be made of pairs rows.*make label-select"):
        load_rows(load_data_recipe(data), "train", "preference")
    assert load_rows(load_data_recipe(data), "train", "pairs") == rows


def test_label_command(tmp_path, capsys):
    assert label([]) == 2
    assert "which pairs? give --data NAME" in capsys.readouterr().err
    assert label(["--pairs", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    rows = [vote("p", "x", "a"), vote("p", "y", "a"), vote("q", "x", "b"), vote("q", "y", "b")]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    assert label(["--pairs", str(tmp_path / "s.jsonl"), "--labels", str(labels), "--agreement"]) == 0
    assert json.loads(labels.read_text().splitlines()[0])["label"] == "a"


def test_status_does_not_take_labels_for_a_run(tmp_path):
    (tmp_path / "labels" / "mine").mkdir(parents=True)
    (tmp_path / "tiny" / "sft.partial").mkdir(parents=True)
    assert status(tmp_path) == ["tiny/sft.partial interrupted: run the stage again to continue"]
