"""Cleaning inside a data recipe: what is planted is found, stages read what was written, any number of workers."""

import json
import logging
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rlhf.artifacts import Artifact
from rlhf.data import DataRecipe, cleaner, data_fingerprint, lineage, load_data_recipe, load_rows
from rlhf.data.prepare import prepare
from rlhf.data.steps import DEFAULT_STEPS, steps_for
from rlhf.errors import UserError
from rlhf.yamlio import validate
from tests.builders import build_model, build_tokenizer, write_rows
from tests.unit.planted import near_copy, paragraph, pii_texts

HALVES = {"by": "prompt", "fractions": {"train": 0.7, "validation": 0.1, "test": 0.2}}
UNICODE = {"step": "unicode", "repair": False}


def recipe_of(folder: Path, rows: list[dict], **fields) -> DataRecipe:
    write_rows(folder / "rows.jsonl", rows)
    base = {"name": "mine", "source": {"files": str(folder / "rows.jsonl")}, "split": HALVES}
    return validate(DataRecipe, base | fields, "mine.yaml")


def answers(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": f"{number}: {paragraph(rng, number % 2 == 0)}", "completion": paragraph(rng, number % 2 == 0)}
        for number in range(count)
    ]


def written(folder: Path) -> dict[str, list[dict]]:
    files = sorted((folder / "rows").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] for path in files}


# --- what is planted is found -----------------------------------------------------------------------------------------


def test_planted_duplicates_leaks_and_personal_data_are_found_through_a_recipe(tmp_path: Path) -> None:
    """Recall and precision of at least 0.98 each, on one set with all of them, in English and Chinese."""
    pytest.importorskip("rensa")
    pytest.importorskip("ftfy")
    rng = random.Random(4)
    clean, exam = answers(800, 1), [paragraph(rng, number % 2 == 0) for number in range(100)]
    originals, copies, leaks, private = clean[:200], [], [], []
    for row in originals:
        copies.append({"prompt": near_copy(row["prompt"], rng), "completion": near_copy(row["completion"], rng)})
    for number, text in enumerate(exam):
        leaks.append({"prompt": f"leak {number}", "completion": paragraph(rng, number % 2 == 0) + "\n" + text[20:160]})
    for number, planted in enumerate(pii_texts("EMAIL", 100, seed=3) + pii_texts("PHONE", 100, seed=3)):
        private.append({"prompt": f"private {number} {paragraph(rng, False)}", "completion": planted.text})
    for number, row in enumerate(rows := clean + copies + leaks + private):
        row["id"] = number
    (tmp_path / "exam.yaml").write_text(
        yaml.safe_dump({"name": "exam", "source": {"files": str(tmp_path / "exam.jsonl")}, "format": "prompts"})
    )
    write_rows(tmp_path / "exam.jsonl", [{"prompt": text} for text in exam])
    steps = [{"step": "default"}, {"step": "contamination", "sets": [str(tmp_path / "exam.yaml")]}]
    manifest = prepare(recipe_of(tmp_path, rows, clean=steps), tmp_path / "out")
    kept = {row["id"]: row for rows in written(tmp_path / "out").values() for row in rows}

    gone = set(range(len(rows))) - set(kept)
    pairs = [(number, 800 + number) for number in range(200)]
    found = sum(first in gone or second in gone for first, second in pairs)
    leaked = gone & set(range(1000, 1100))
    assert found / 200 >= 0.98
    assert len(leaked) / 100 >= 0.98
    right = sum(first in gone or second in gone for first, second in pairs) + len(leaked)
    assert right / len(gone) >= 0.98  # one row of each pair, and the leaks: nothing else
    dropped = {step["step"]: step["dropped"] for step in manifest["cleaning"] if step["dropped"]}
    assert set(dropped) <= {"repetition", "contamination", "exact_duplicates", "near_duplicates"}

    masked = [kept[number]["completion"] for number in range(1100, 1300) if number in kept]
    wanted = pii_texts("EMAIL", 100, seed=3) + pii_texts("PHONE", 100, seed=3)
    assert sum("<EMAIL_" in text or "<PHONE_" in text for text in masked) / sum(bool(p.spans) for p in wanted) >= 0.98
    assert not any("<" in kept[number]["completion"] for number in range(800) if number in kept)


def test_no_prompt_of_a_test_row_is_trained_on(tmp_path: Path) -> None:
    """`split.by: row` puts rows of one prompt on several sides; the default steps take the training side out."""
    pytest.importorskip("rensa")
    rng = random.Random(2)
    prompts = [paragraph(rng, False) for _ in range(40)]
    rows = [{"prompt": prompts[n % 40], "completion": paragraph(rng, False)} for n in range(400)]
    recipe = recipe_of(tmp_path, rows, split={"fractions": {"train": 0.9, "test": 0.1}}, format="prompt_completion")
    bare = {
        split: {r["prompt"] for r in load_rows(recipe.model_copy(update={"clean": []}), split, "sft")}
        for split in ("train", "test")
    }
    assert len(bare["train"] & bare["test"]) > 10
    found = {
        split: {row["prompt"] for row in load_rows(recipe, split, "sft", root=tmp_path)} for split in ("train", "test")
    }
    assert found["test"] == bare["test"]
    assert found["train"]
    assert not found["train"] & found["test"]


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_rows_are_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ftfy")
    monkeypatch.setattr(cleaner, "CHUNK", 20)
    monkeypatch.setattr(cleaner, "FEW_CHUNKS", 2)
    rows = answers(300) + answers(30) + [{"prompt": "p", "completion": "word " * 80}]
    steps = [UNICODE, {"step": "length"}, {"step": "repetition", "min_units": 999}, {"step": "pii"}]
    steps.append({"step": "exact_duplicates"})
    recipe = recipe_of(tmp_path, rows, clean=steps)
    one, two = (prepare(recipe, tmp_path / f"w{n}", workers=n) for n in (1, 2))
    assert one["payload_hash"] == two["payload_hash"]
    assert one["cleaning"] == two["cleaning"]
    assert {step["step"]: step["dropped"] for step in one["cleaning"] if step["dropped"]} == {
        "repetition": {"repeated_unit": 1},
        "exact_duplicates": {"exact_duplicate": 30},
    }
    assert sum(one["splits"].values()) == 300


def test_chunks_are_bounded_by_rows_and_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaner, "CHUNK", 3)
    monkeypatch.setattr(cleaner, "CHUNK_CHARS", 10)
    rows = [("train", {"text": "x" * size, "id": 7}) for size in (1, 1, 1, 1, 9, 1, 12, 2, 2)]
    sizes = [[len(row["text"]) for _, row in chunk] for chunk in cleaner._chunks(iter(rows))]
    assert sizes == [[1, 1, 1], [1, 9], [1, 12], [2, 2]]
    assert list(cleaner._chunks(iter([]))) == []


def test_the_manifest_says_what_was_dropped_and_hides_personal_data(tmp_path: Path) -> None:
    rows = [{"prompt": "ok", "completion": "a"}, {"prompt": "mail ann@example.org", "completion": "b " * 30}]
    steps = [{"step": "repetition"}, {"step": "pii"}]
    recipe = recipe_of(tmp_path, rows, clean=steps, licence="CC0", synthetic=True, split={"fractions": {"train": 1.0}})
    manifest = prepare(recipe, tmp_path / "out", tokenizer=("letters", len))
    assert [(step["step"], step["rows"], step["kept"]) for step in manifest["cleaning"]] == [
        *(("repetition", 2, 1), ("pii", 1, 1))
    ]
    shown = manifest["cleaning"][0]["examples"]["repeated_unit"][0]
    assert shown.startswith("one word 30 times in a row, max_run 20: {'prompt': 'mail <EMAIL_1>'")
    assert manifest["steps"] | {} == {
        "read": 2,
        "bad": 0,
        "selected": 2,
        "in a split": 2,
        "converted": 2,
        "kept": 1,
    }
    size = {"total": 3, "mean": 3.0, "p5": 3, "p50": 3, "p95": 3, "p99": 3, "max": 3}
    assert manifest["sizes"]["train"]["characters"] == manifest["sizes"]["train"]["tokens"] == size
    assert manifest["sizes"]["train"]["words"]["total"] == 2
    artifact = Artifact.load(tmp_path / "out")
    artifact.verify()
    assert artifact.manifest["source_hash"] == lineage(recipe)["source_sha256"]
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Written by a model. Licence: CC0." in card
    assert "| `repetition` | 2 | 1 | repeated_unit 1 |" in card
    assert "Tokens by `letters`." in card
    assert "ann@" not in card
    assert "<svg" in (tmp_path / "out" / "card.svg").read_text("utf-8")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "card.svg", "manifest.json", "rows"]


def test_a_set_is_written_once_and_again_where_anything_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = answers(20)
    recipe = recipe_of(tmp_path, rows, clean=[UNICODE])
    first = load_rows(recipe, "train", "sft", root=tmp_path)
    manifest = tmp_path / "data" / "mine" / "manifest.json"
    stamp = manifest.stat().st_mtime_ns
    assert load_rows(recipe, "train", "sft", root=tmp_path) == first == load_rows(recipe, "train", "sft")
    assert manifest.stat().st_mtime_ns == stamp
    target = tmp_path / "data" / "mine" / "rows" / "train.jsonl"
    target.write_text(target.read_text("utf-8").replace("a", "b"), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_rows(recipe, "train", "sft", root=tmp_path) == first
    assert "rows/train.jsonl is missing or damaged" in caplog.text
    target.unlink()
    assert load_rows(recipe, "train", "sft", root=tmp_path) == first
    more = recipe_of(tmp_path, rows + answers(5, seed=9), clean=[UNICODE])
    assert len(load_rows(more, "train", "sft", root=tmp_path)) > len(first)
    assert json.loads(manifest.read_text("utf-8"))["fingerprint"] == data_fingerprint(more)


def test_default_steps_are_on_and_an_empty_list_turns_them_off(tmp_path: Path) -> None:
    names = [step.model_dump()["step"] for step in DEFAULT_STEPS]
    assert names == [
        *("unicode", "length", "boilerplate", "repetition", "pii", "preferences", "exact_duplicates"),
        *("near_duplicates", "near_duplicates"),
    ]
    rows = [{"prompt": "p", "completion": "c"}]
    plain = recipe_of(tmp_path, rows, format="prompt_completion")
    assert [step.model_dump()["step"] for step in steps_for(plain)] == [n for n in names if n != "preferences"]
    pairs = recipe_of(tmp_path, rows, format="preference")
    assert [step.model_dump()["step"] for step in steps_for(pairs)] == names
    assert steps_for(recipe_of(tmp_path, rows, format="preference", clean=[])) == []
    more = recipe_of(tmp_path, rows, format="preference", clean=[{"step": "language"}, {"step": "default"}])
    assert [step.model_dump()["step"] for step in steps_for(more)] == ["language", *names]


@pytest.mark.parametrize(
    "name", ["movie_reviews", "movie_reviews_pairs", "movie_reviews_imdb_text", "mt_bench", "arena_hard"]
)
def test_sets_that_stay_as_published(name: str) -> None:
    assert load_data_recipe(name).clean == []


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"step": "contamination"}], "contamination: sets is empty"),
        ([{"step": "safety", "labels": ["toxic"]}], "safety: no model; give the folder"),
        ([{"step": "perplexity"}], "perplexity: no model"),
        ([{"step": "semantic"}], "semantic: no model"),
        ([{"step": "pii", "kind": ["EMAIL"]}], "clean.0.kind: unknown key; did you mean 'kinds'?"),
        ([{"step": "dedup"}], "clean.0"),
        ("default", "clean"),
    ],
)
def test_wrong_steps_are_refused_in_one_line(tmp_path: Path, steps, said: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_of(tmp_path, [], clean=steps)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_steps_read_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("verboten\n", encoding="utf-8")
    recipe = recipe_of(tmp_path, answers(3), clean=[{"step": "sensitive", "file": str(words)}])
    first = data_fingerprint(recipe)
    words.write_text("verboten\nforbidden\n", encoding="utf-8")
    assert data_fingerprint(recipe) != first
    assert data_fingerprint(recipe_of(tmp_path, answers(3), synthetic=True)) == data_fingerprint(
        recipe_of(tmp_path, answers(3))
    )
    (tmp_path / "self.yaml").write_text(yaml.safe_dump({"name": "mine", "source": {"files": "x"}}))
    against_itself = recipe_of(
        tmp_path, answers(3), clean=[{"step": "contamination", "sets": [str(tmp_path / "self.yaml")]}]
    )
    with pytest.raises(UserError, match="'mine' is checked against itself"):
        data_fingerprint(against_itself)
    missing = recipe_of(tmp_path, answers(3), clean=[{"step": "sensitive", "file": "none.txt"}])
    with pytest.raises(UserError, match=r"sensitive\.file: 'none.txt' does not exist"):
        data_fingerprint(missing)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("lm"), build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_come_in_the_order_of_a_curriculum(tmp_path: Path, language_model: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": "film " * (n % 5) + f"answer {n}"} for n in range(60)]
    step = {"step": "perplexity", "model": str(language_model), "max_length": 64, "context": "prompt", "phases": 3}
    recipe = recipe_of(tmp_path, rows, clean=[step | {"order": "easy_first"}], split={"fractions": {"train": 1.0}})
    ordered = load_rows(recipe, "train", "sft", root=tmp_path)
    native = written(tmp_path / "data" / "mine")["train"]
    phase = {row["completion"]: row["phase"] for row in native}
    phases = [phase[row["completion"]] for row in ordered]
    assert phases == [0] * 20 + [1] * 20 + [2] * 20
    hardest = {p: max(row["perplexity"] for row in native if row["phase"] == p) for p in range(3)}
    assert hardest[0] < hardest[1] < hardest[2]
    assert set(ordered[0]) == {"prompt", "completion"}
    # A limit takes a fair sample, not the easy rows.
    assert {phase[row["completion"]] for row in load_rows(recipe, "train", "sft", limit=20, root=tmp_path)} == {0, 1, 2}
    hard = recipe_of(tmp_path, rows, clean=[step | {"order": "hard_first"}], split={"fractions": {"train": 1.0}})
    assert [phase[row["completion"]] for row in load_rows(hard, "train", "sft")] == phases[::-1]


def test_trainers_keep_the_order_of_a_curriculum(tmp_path: Path) -> None:
    from rlhf.trainers import in_curriculum_order

    for order, strategy in (("easy_first", "sequential"), ("keep", None)):
        step = {"step": "perplexity", "model": "lm", "order": order}
        path = tmp_path / f"{order}.yaml"
        path.write_text(yaml.safe_dump({"name": "x", "source": {"files": "x"}, "clean": [step]}))
        assert in_curriculum_order(str(path), {}).get("train_sampling_strategy") == strategy
        assert (
            in_curriculum_order(str(path), {"train_sampling_strategy": "random"})["train_sampling_strategy"] == "random"
        )


def test_a_model_that_reads_less_than_max_length_is_an_error(tmp_path: Path, language_model: Path) -> None:
    recipe = recipe_of(tmp_path, answers(3), clean=[{"step": "perplexity", "model": str(language_model)}])
    with pytest.raises(UserError, match=r"perplexity\.max_length 1024: .* reads 64 tokens; lower it"):
        load_rows(recipe, "train", "sft")
    gone = recipe_of(tmp_path, answers(3), clean=[{"step": "perplexity", "model": str(tmp_path / "none")}])
    with pytest.raises(UserError, match=r"perplexity\.model: cannot load"):
        load_rows(gone, "train", "sft")


def test_a_local_classifier_drops_what_it_finds_unsafe(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
        num_labels=3,
        id2label={0: "fine", 1: "toxic", 2: "violent"},
        label2id={"fine": 0, "toxic": 1, "violent": 2},
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data *= 200
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"{'the film' if n % 2 else 'zzz'} {n}" for n in range(40)]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():  # one text at a time, without padding: an independent way to the same probabilities
        logits = [loaded(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    unsafe = [float(row.softmax(-1)[1:].sum()) for row in logits]
    ranked = sorted(unsafe)
    cut = max(range(5, 36), key=lambda at: ranked[at] - ranked[at - 1])  # where rounding decides nothing
    threshold = (ranked[cut] + ranked[cut - 1]) / 2
    rows = [{"text": text} for text in texts]
    step = {"step": "safety", "model": str(tmp_path / "model"), "labels": ["toxic", "violent"], "threshold": threshold}
    recipe = recipe_of(tmp_path, rows, clean=[step], split={"fractions": {"train": 1.0}})
    kept = {row["text"] for row in load_rows(recipe, "train", "text", root=tmp_path)}
    assert kept == {text for text, p in zip(texts, unsafe, strict=True) if p < threshold}
    assert len(kept) == cut
    (found,) = json.loads((tmp_path / "data" / "mine" / "manifest.json").read_text("utf-8"))["cleaning"]
    assert found["dropped"] == {"unsafe": 40 - cut}
    assert found["report"]["texts"] == 40
    wrong = recipe_of(tmp_path, rows, clean=[step | {"labels": ["unsafe"]}], split={"by": "row"})
    with pytest.raises(UserError, match="the classifier has no label 'unsafe'; it has fine, toxic, violent"):
        load_rows(wrong, "train", "text")


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_the_share_of_synthetic_rows_is_said_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, synthetic in (("people", False), ("model", True)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": "x"} for n in range(100)])
        part = {"name": name, "source": {"files": str(tmp_path / f"{name}.jsonl")}, "synthetic": synthetic, "clean": []}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(part | {"split": {"fractions": {"train": 1.0}}}))
    parts = [
        {"recipe": str(tmp_path / f"{name}.yaml"), "fraction": f} for name, f in (("people", 0.75), ("model", 0.25))
    ]
    fine = validate(DataRecipe, {"name": "mix", "mixture": parts, "max_synthetic": 0.25}, "mix.yaml")
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert len(load_rows(fine, "train", "sft")) == 133
    assert "25 % of the rows synthetic, 0 % not known" in caplog.text
    assert set(lineage(fine)["parts"]) == {str(tmp_path / "people.yaml"), str(tmp_path / "model.yaml")}
    strict = validate(DataRecipe, {"name": "mix", "mixture": parts, "max_synthetic": 0.2}, "mix.yaml")
    with pytest.raises(UserError, match=r"0.248 of the rows are synthetic, more than max_synthetic 0.2"):
        load_rows(strict, "train", "sft")
    with pytest.raises(UserError, match="max_synthetic has a meaning for a mixture alone"):
        recipe_of(tmp_path, [], max_synthetic=0.5)


# --- the local sets ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
# Of each file the recipe that is called as the file; the others cut it in other ways (`rmb_harmless_halves`).
LOCAL = {
    path.stem: load_data_recipe(path.stem)
    for path in sorted((ROOT / "data_recipes").glob("*.yaml"))
    if re.search(rf"\$\{{RLHF_DATA\}}/\w+/{path.stem}\.json", path.read_text("utf-8"))
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_set_has_a_card_without_any_of_its_text(name: str) -> None:
    card = (ROOT / "docs" / "data_cards" / f"{name}.md").read_text("utf-8")
    assert f"# {name}\n" in card
    assert f"({name}.svg)" in card
    assert "<svg" in (ROOT / "docs" / "data_cards" / f"{name}.svg").read_text("utf-8")
    counted = {line.split(" | ")[0].strip("| `") for line in card.split("\n") if line.startswith("| ")}
    wanted = {step.model_dump()["step"] for step in steps_for(LOCAL[name])}
    assert counted >= wanted | set(LOCAL[name].split.names) | {"read", "kept"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")
def test_cards_are_of_these_bytes_and_every_file_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_DATA", str(SHARED))
    files = {str(path.relative_to(SHARED)) for path in SHARED.glob("*/*") if path.is_file()}
    assert files == {recipe.source.files.removeprefix("${RLHF_DATA}/") for recipe in LOCAL.values()}
    for name, recipe in LOCAL.items():
        digest = lineage(recipe)["source_sha256"][:16]
        assert f"`{digest}`" in (ROOT / "docs" / "data_cards" / f"{name}.md").read_text("utf-8"), name
