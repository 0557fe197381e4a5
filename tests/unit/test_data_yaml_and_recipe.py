"""YAML reading, typed validation with one-line errors, and the data recipe model."""

import math
from pathlib import Path
from typing import get_args

import pytest

from rlhf.data.filters import FILTERS, NORMALIZERS
from rlhf.data.formats import FORMATS
from rlhf.data.recipe import DATA_RECIPES_DIR, DataRecipe, FormatName, NormalizeSpec, load_data_recipe
from rlhf.errors import UserError
from rlhf.yamlio import parse_scalar, read_yaml, validate

SHIPPED = sorted(DATA_RECIPES_DIR.glob("*.yaml"))
MINIMAL = {"name": "mine", "source": {"files": "a.jsonl"}, "format": "text"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("3E6", 3e6),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1'", "1"),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("{artifact: reward, weight: 1e-1}", {"artifact": "reward", "weight": 0.1}),
        ("中文", "中文"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_infinity_and_nan():
    assert parse_scalar("-.inf") == -math.inf
    assert math.isnan(parse_scalar(".nan"))


def test_bad_scalar_is_a_user_error():
    with pytest.raises(UserError) as error:
        parse_scalar("[1, 2")
    assert "'[1, 2'" in one_line(error)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3", "duplicate key 'a' (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", "line 3", "duplicate key 'b' (first on line 2)"),
        ("a: [1, 2\nb: 3\n", "line 2", "expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "line 2", "cannot start any token"),
        ("- 1\n- 2\n", "", "top level is [1, 2]"),
    ],
)
def test_yaml_errors_name_file_and_line(tmp_path, text, line, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    message = one_line(error)
    assert str(path) in message
    assert line in message
    assert said in message


def test_merge_keys_may_be_overridden_and_empty_files_are_empty(tmp_path):
    merged = read_yaml(write(tmp_path, "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n"))
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}
    assert read_yaml(write(tmp_path, "# nothing\n")) == {}


def test_unreadable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"fromat": "text"}, ["fromat: unknown key", "did you mean 'format'"]),
        ({"split": {"fraction": {"train": 1.0}}}, ["split.fraction: unknown key", "did you mean 'fractions'"]),
        ({"source": {"files": "a", "zzz": 1}}, ["source.zzz: unknown key; known keys: files"]),
        (
            {"source": {"files": "a", "hub": "b"}},
            ["source:", "exactly one of the keys package, hub, files, labels, function"],
        ),
        ({"source": {}}, ["source:", "exactly one of the keys"]),
        ({"source": {"hub": "org/name"}}, ["source.revision: required, but missing"]),
        ({"source": {"function": "no_colon"}}, ["source.function: 'no_colon' is not allowed; "]),
        ({"source": {"files": 3}}, ["source.files: 3 is not allowed; must be a valid string or a valid list"]),
        ({"format": "rated_txt"}, ["format: 'rated_txt' is not allowed; must be 'text'", "did you mean 'rated_text'"]),
        ({"prompt_words": 0}, ["prompt_words: 0 is not allowed; must be greater than or equal to 1"]),
        ({"prompt_words": "4"}, ["prompt_words: '4' is not allowed; must be a valid integer"]),
        ({"split": {"seed": 1.5}}, ["split.seed: 1.5 is not allowed; must be a valid integer"]),
        ({"split": {"fractions": {"train": 0.9, "test": 0.2}}}, ["split: fractions sum to 1.1"]),
        (
            {"split": {"fractions": {"train": 0.0}}},
            ["split.fractions.train: 0.0 is not allowed; must be greater than 0"],
        ),
        ({"split": {"fractions": {"a": 1.0}, "rows": {"a": 1}}}, ["split: holds both fractions and rows"]),
        ({"split": {"rows": {}}}, ["names no split"]),
        ({"filters": [{"min_word": 8}]}, ["unknown filter 'min_word'; did you mean 'min_words'"]),
        ({"filters": [{"min_words": 8, "max_words": 9}]}, ["each filter has one key, but this has 2"]),
        ({"filters": [{"min_words": "8"}]}, ["min_words is '8'; must be a whole number"]),
        ({"filters": [{"min_words": -1}]}, ["min_words is -1; must be a whole number >= 0"]),
        ({"filters": [{"excludes": "("}]}, ["excludes is not a regular expression"]),
        ({"mapping": {"txt": "body"}}, ["mapping.txt: format text has no column 'txt'; did you mean 'text'"]),
        ({"system": "Be kind."}, ["system has no meaning for format text"]),
        ({"format": "prompts", "prompt_template": "Q:"}, ["prompt_template: 'Q:' holds {prompt} 0 times"]),
        ({"format": "prompts", "prompt_template": "{prompt}", "system": "s"}, ["exclude each other"]),
        ({"name": "a/b"}, ["name: 'a/b'"]),
        ({"name": "."}, ["name: '.'"]),  # would be the folder of all sets
        ({"name": ".."}, ["name: '..'"]),
        ({"name": "-x"}, ["name: '-x'"]),
    ],
)
def test_bad_recipes_end_in_one_line(change, parts):
    with pytest.raises(UserError) as error:
        validate(DataRecipe, MINIMAL | change, "my.yaml")
    message = one_line(error)
    assert message.startswith("my.yaml: ")
    for part in parts:
        assert part in message


def test_several_problems_are_counted():
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        validate(DataRecipe, MINIMAL | {"prompt_words": 0, "pairs_per_row": 0}, "my.yaml")


def test_defaults_and_frozen():
    recipe = validate(DataRecipe, MINIMAL, "my.yaml")
    assert recipe.split.shares == {"train": 0.9, "validation": 0.05, "test": 0.05}
    assert recipe.prompt_words == 4
    with pytest.raises(ValueError, match="frozen"):
        recipe.prompt_words = 5


def test_every_field_is_described_and_registries_agree():
    assert set(get_args(FormatName)) == set(FORMATS)
    assert list(NormalizeSpec.model_fields) == list(NORMALIZERS)
    assert all(info.description for info in DataRecipe.model_fields.values())
    assert set(FILTERS) == {"min_words", "max_words", "min_chars", "max_chars", "contains", "excludes"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_data_recipe(path.stem)
    assert recipe.name == path.stem
    if recipe.mixture:  # its parts are here, too, and say it
        assert {item.recipe for item in recipe.mixture} <= {other.stem for other in SHIPPED}
        return
    assert recipe.licence
    assert recipe.homepage.startswith("https://")
    if "hub" in recipe.model_dump()["source"]:
        pinned = len(recipe.source.revision) == 40  # a commit, not a branch
        assert pinned or "The revision is not pinned" in path.read_text("utf-8")


def test_shipped_recipes_are_all_there():
    assert {path.stem for path in SHIPPED} >= {
        "movie_reviews",
        "movie_reviews_imdb_text",
        "movie_reviews_imdb_judge",
        "hh_rlhf",
        "ultrafeedback_binarized",
        "tldr",
        "tldr_preference",
        "alpaca",
    }


def test_recipes_by_path_by_extra_folder_and_unknown(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("{name: mine, source: {files: a.jsonl}, format: text}")
    monkeypatch.chdir(tmp_path)
    assert load_data_recipe("mine.yaml").name == "mine"
    assert load_data_recipe(tmp_path / "mine.yaml").name == "mine"
    assert load_data_recipe("mine", extra_dirs=(tmp_path,)).name == "mine"
    with pytest.raises(UserError) as error:
        load_data_recipe("movie_review", extra_dirs=(tmp_path,))
    message = one_line(error)
    assert "did you mean 'movie_reviews'" in message
    assert "mine" in message
