"""load_rows and data_fingerprint, end to end: on small files, on the shipped film reviews, on the shared real data."""

import json
from pathlib import Path

import pytest

from rlhf.data import DataRecipe, data_fingerprint, load_data_recipe, load_rows
from rlhf.errors import UserError
from rlhf.yamlio import validate

SHARED = Path(__file__).parents[3] / "shared" / "data"


def recipe_of(tmp_path, rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    fields = {"name": "mine", "source": {"files": str(path)}, "format": "text", "clean": []} | fields
    return validate(DataRecipe, fields, "mine.yaml")


TEXTS = [{"text": f"text number {i}", "kind": "ab"[i % 2]} for i in range(200)]


def test_splits_are_disjoint_complete_and_ordered_by_seed(tmp_path):
    recipe = recipe_of(tmp_path, TEXTS)
    parts = [load_rows(recipe, split, "text") for split in ("train", "validation", "test")]
    texts = [row["text"] for part in parts for row in part]
    assert sorted(texts) == sorted(row["text"] for row in TEXTS)
    assert len(set(texts)) == 200
    assert load_rows(recipe, "train", "text") == parts[0]
    shuffled = load_rows(recipe, "train", "text", seed=7)
    assert shuffled != parts[0]
    assert sorted(map(str, shuffled)) == sorted(map(str, parts[0]))
    assert load_rows(recipe, "train", "text", limit=5) == parts[0][:5]


def test_rows_do_not_depend_on_the_order_of_the_source(tmp_path):
    first = load_rows(recipe_of(tmp_path, TEXTS), "train", "text")
    assert load_rows(recipe_of(tmp_path, TEXTS[::-1]), "train", "text") == first


def test_where_mapping_normalise_and_filters(tmp_path):
    rows = [
        {"body": "a<br />b  c", "lang": "en", "ok": True},
        {"body": "a", "lang": "en", "ok": True},
        {"body": "x y z", "lang": "de", "ok": True},
        {"body": "u v w", "lang": "fr", "ok": False},
    ]
    recipe = recipe_of(
        tmp_path,
        rows,
        mapping={"text": "body"},
        where={"lang": ["en", "fr"], "ok": True},
        normalize={"strip_html": True, "collapse_spaces": True},
        filters=[{"min_words": 2}],
        split={"fractions": {"train": 1.0}},
    )
    assert load_rows(recipe, "train", "text") == [{"text": "a\nb c"}]


def test_kept_columns_stay_with_a_pair_and_take_no_part_in_the_format(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "kind": "x", "gap": i, "noise": 1} for i in range(20)]
    keep = {"category": "kind", "margin": "gap", "chosen": "noise"}
    found = load_rows(recipe_of(tmp_path, rows, format="preference", keep=keep), "train", "preference")
    assert {tuple(sorted(row)) for row in found} == {("category", "chosen", "margin", "prompt", "rejected")}
    assert all(
        row["category"] == "x" and row["chosen"] == "a" and f"p{row['margin']}" == row["prompt"] for row in found
    )
    plain = load_rows(recipe_of(tmp_path, rows, format="preference"), "train", "preference")
    assert {tuple(sorted(row)) for row in plain} == {("chosen", "prompt", "rejected")}


def test_mapping_wins_over_a_column_of_the_same_name(tmp_path):
    rows = [{"question": "q", "prompt": "id-7", "answer": "a"}]
    recipe = recipe_of(
        tmp_path, rows, format="prompts", mapping={"prompt": "question"}, split={"fractions": {"train": 1.0}}
    )
    assert load_rows(recipe, "train", "prompts") == [{"prompt": "q", "answer": "a"}]


def test_dialogues_with_one_prompt_stay_on_one_side(tmp_path):
    rows = [
        {
            "chosen": f"\n\nHuman: ask {i // 4}\n\nAssistant: good {i}",
            "rejected": f"\n\nHuman: ask {i // 4}\n\nAssistant: bad {i}",
        }
        for i in range(400)
    ]
    recipe = recipe_of(tmp_path, rows, format="hh", split={"by": "prompt", "fractions": {"train": 0.5, "test": 0.5}})
    asked = [
        {row["prompt"][0]["content"] for row in load_rows(recipe, split, "preference")} for split in ("train", "test")
    ]
    assert len(asked[0]) + len(asked[1]) == 100
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("fields", "call", "parts"),
    [
        (
            {"mapping": {"text": "txt"}},
            ("train", "text"),
            ["mapping.text: the source has no column 'txt'", "kind, text"],
        ),
        ({"format": "alpaca"}, ("train", "sft"), ["no column 'instruction'"]),
        (
            {"where": {"knd": "a"}},
            ("train", "text"),
            ["where.knd: the source has no column 'knd'; did you mean 'kind'?"],
        ),
        ({"where": {"kind": "c"}}, ("train", "text"), ["where.kind: no row has 'c'; the column holds a, b"]),
        ({"split": {"by": "txt"}}, ("train", "text"), ["split.by: no column 'txt'; did you mean 'text'?"]),
        (
            {"filters": [{"min_words": 9}]},
            ("train", "text"),
            ["no text rows left of 1", "min_words", "loosen the filters"],
        ),
        ({}, ("trian", "text"), ["split 'trian': no such split; did you mean 'train'?"]),
        ({}, ("train", "texts"), ["kind 'texts' does not exist"]),
        ({}, ("train", "sft"), ["kind 'sft' cannot be made of text rows; possible: text"]),
        ({}, ("train", "text", 0), ["limit is 0; must be at least 1"]),
        ({"split": {"rows": {"train": 900}}}, ("train", "text"), ["split.rows.train: 900 rows wanted"]),
        ({"split": {"fractions": {"train": 1e-9}}}, ("train", "text"), ["no text rows left of 0 in the split"]),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, fields, call, parts):
    recipe = recipe_of(tmp_path, TEXTS, **fields)
    with pytest.raises(UserError) as error:
        load_rows(recipe, *call)
    message = str(error.value)
    assert message.startswith("data recipe 'mine', split ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_fingerprint_follows_recipe_and_bytes_but_not_the_licence(tmp_path):
    recipe = recipe_of(tmp_path, TEXTS)
    first = data_fingerprint(recipe)
    assert len(first) == 64
    assert data_fingerprint(recipe_of(tmp_path, TEXTS, licence="MIT", homepage="https://x")) == first
    assert data_fingerprint(recipe_of(tmp_path, TEXTS, filters=[{"min_words": 1}])) != first
    assert data_fingerprint(recipe_of(tmp_path, TEXTS[1:])) != first


# --- the shipped film reviews -----------------------------------------------------------------------------------------


def test_movie_reviews_sentences_never_cross_splits():
    recipe = load_data_recipe("movie_reviews")
    texts = {split: [row["text"] for row in load_rows(recipe, split, "text")] for split in recipe.split.names}
    assert {split: len(rows) for split, rows in texts.items()} == {"train": 4464, "validation": 225, "test": 395}
    assert all(8 <= len(text.split()) <= 24 for rows in texts.values() for text in rows)
    for split, rows in texts.items():
        sft = load_rows(recipe, split, "sft")
        assert {row["prompt"] + row["completion"] for row in sft} == set(rows)
        assert all(len(row["prompt"].split()) == 4 for row in sft)
        endings = {text.split(maxsplit=4)[4] for text in rows}
        pairs = load_rows(recipe, split, "preference")
        assert {row[side].strip() for row in pairs for side in ("chosen", "rejected")} <= endings
    assert len(set().union(*texts.values())) == 4464 + 225 + 395


def test_movie_reviews_pairs_do_not_give_the_answer_away():
    recipe = load_data_recipe("movie_reviews")
    rated = {row["text"]: row["label"] for row in load_rows(recipe, "train", "rated")}
    pairs = load_rows(recipe, "train", "preference")
    positives = sum(rated.values())
    assert len(pairs) == 4 * positives
    on_prompt = sum(rated.get(row["prompt"] + row["chosen"]) == 1 for row in pairs) / len(pairs)
    assert 0.47 < on_prompt < 0.53
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in pairs) / len(pairs)
    assert 0.4 < longer < 0.6


def test_halves_for_a_held_back_reward_model_share_no_sentence():
    halves, whole = load_data_recipe("movie_reviews_pairs_halves"), load_data_recipe("movie_reviews_pairs")

    def texts(recipe, split):
        return {row["text"] for row in load_rows(recipe, split, "text")}

    one, other = texts(halves, "half_a"), texts(halves, "half_b")
    assert not one & other and one | other == texts(whole, "train")
    assert 0.95 < len(one) / len(other) < 1.05
    assert texts(halves, "test") == texts(whole, "test")


def test_imdb_text_and_judge_are_disjoint_and_the_text_has_no_label():
    text_recipe, judge_recipe = (
        load_data_recipe("movie_reviews_imdb_text"),
        load_data_recipe("movie_reviews_imdb_judge"),
    )
    assert text_recipe.split == judge_recipe.split
    other = load_data_recipe("movie_reviews_imdb_pairs")  # the reward report's, from the judge's side of the same split
    assert other.source == judge_recipe.source and other.where == judge_recipe.where
    assert (other.split.by, other.split.seed) == (judge_recipe.split.by, judge_recipe.split.seed)
    assert other.split.rows == {"train": 15000, "test": 10000}
    assert text_recipe.format == "text"
    assert not text_recipe.mapping
    texts, judged = load_rows(text_recipe, "train", "text"), load_rows(judge_recipe, "judge", "rated")
    assert (len(texts), len(judged)) == (15000, 10000)
    assert {tuple(row) for row in texts} == {("text",)}
    assert not {row["text"] for row in texts} & {row["text"] for row in judged}
    assert 4800 < sum(row["label"] for row in judged) < 5200
    with pytest.raises(UserError, match="kind 'rated' cannot be made of text rows"):
        load_rows(text_recipe, "train", "rated")


# --- the shared real data ---------------------------------------------------------------------------------------------

REAL = [  # file, recipe fields, kind, rows that are left of all
    ("preference/dpo_en_demo.json", {"format": "sharegpt_preference"}, "preference", 300),
    ("preference/dpo_zh_demo.json", {"format": "sharegpt_preference"}, "preference", 300),
    ("preference/hh_harmless_dev.jsonl.gz", {"format": "hh"}, "preference", 1184),
    (
        "preference/rmb_harmless_dev.jsonl.gz",
        {"format": "preference", "prompt_style": "human_assistant"},
        "preference",
        4825,
    ),
    (
        "preference/rmb_helpful_dev.jsonl.gz",
        {"format": "preference", "prompt_style": "human_assistant"},
        "preference",
        6701,
    ),
    ("preference/ukp_convarg1_dev.jsonl.gz", {"format": "preference"}, "preference", 9936),
    ("sft/alpaca_en_demo.json", {"format": "alpaca"}, "sft", 999),
    ("sft/alpaca_zh_demo.json", {"format": "alpaca"}, "sft", 1000),
    ("sft/c4_demo.jsonl", {"format": "text"}, "text", 300),
    ("prompts/arena_hard.jsonl", {"format": "turns"}, "prompts", 500),
    ("prompts/mt_bench.jsonl", {"format": "turns"}, "prompts", 80),
    ("prompts/belle_zh.json", {"format": "prompts", "mapping": {"prompt": "question"}}, "prompts", 1000),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")
@pytest.mark.parametrize(("file", "fields", "kind", "count"), REAL, ids=[case[0] for case in REAL])
def test_real_files_load_as_they_are(file, fields, kind, count):
    data = {
        "name": "real",
        "source": {"files": str(SHARED / file)},
        "split": {"fractions": {"all": 1.0}},
        "clean": [],
    } | fields
    rows = load_rows(validate(DataRecipe, data, "real.yaml"), "all", kind)
    assert len(rows) == count
    for row in rows:
        texts = [row[column] for column in ("text", "completion", "chosen", "rejected") if column in row]
        prompt = row.get("prompt")
        texts += [message["content"] for message in prompt] if isinstance(prompt, list) else [prompt] if prompt else []
        assert texts
        assert all(isinstance(text, str) for text in texts)
    if "zh" in file:
        assert any("\u4e00" <= character <= "\u9fff" for character in str(rows[0]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")
def test_every_shared_file_is_covered():
    files = {str(path.relative_to(SHARED)) for path in SHARED.glob("*/*") if path.is_file()}
    assert files == {case[0] for case in REAL}
