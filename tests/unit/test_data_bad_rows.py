"""Bad rows: set aside with the reason, counted, written to a file; many of them stop the run."""

import csv
import gzip
import json
import logging

import pytest

from rlhf.data import DataRecipe, load_rows
from rlhf.data.pipeline import Counts, detected, native_rows
from rlhf.data.prepare import prepare
from rlhf.data.quarantine import Quarantine
from rlhf.errors import UserError
from rlhf.yamlio import validate

GOOD = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]


def lines(*extra, newline=b"\n"):
    """Two good rows, the extra lines, one more good row."""
    good = [json.dumps(row).encode() for row in GOOD]
    return newline.join([*good[:2], *extra, good[2]]) + newline


def recipe_for(path, **fields):
    base = {"name": "bad", "source": {"files": str(path)}, "format": "prompt_completion"}
    base |= {"split": {"fractions": {"train": 1.0}}, "max_bad_rows": 1.0, "clean": []}
    return validate(DataRecipe, base | fields, "bad.yaml")


def read(recipe, folder):
    """All rows of a recipe, the counts, and the records of the quarantine file."""
    file = folder / "quarantine.jsonl"
    with Quarantine(file) as quarantine:
        counts = Counts(quarantine)
        rows = [row for _, row in native_rows(detected(recipe), counts)]
    records = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line] if file.exists() else []
    return rows, counts, records


# (case, line, reason in the quarantine file)
LINES = [
    ("cut object", b'{"prompt": "a", "compl', "not valid JSON"),
    ("no value", b'{"prompt": "a", "completion": }', "not valid JSON"),
    ("trailing comma", b'{"prompt": "a", "completion": "b",}', "not valid JSON"),
    ("single quotes", b"{'prompt': 'a', 'completion': 'b'}", "not valid JSON"),
    ("python's None", b'{"prompt": None, "completion": "b"}', "not valid JSON"),
    ("comment", b"// a comment", "not valid JSON"),
    ("html", b"<html><body>404 Not Found</body></html>", "not valid JSON"),
    ("two objects", b'{"prompt": "a"} {"prompt": "b"}', "Extra data"),
    ("raw control character", b'{"prompt": "a\x01", "completion": "b"}', "Invalid control character"),
    ("raw carriage return", b'{"prompt": "a\rb", "completion": "b"}', "Invalid control character"),
    ("unknown escape", b'{"prompt": "\\x41", "completion": "b"}', "Invalid \\escape"),
    ("binary", bytes(range(256)).replace(b"\n", b""), "not UTF-8 text"),
    ("zero bytes", b"\x00" * 64, "not valid JSON"),
    ("latin-1", '{"prompt": "café", "completion": "b"}'.encode("latin-1"), "not UTF-8 text (byte 15)"),
    ("gb18030", '{"prompt": "你好", "completion": "b"}'.encode("gb18030"), "not UTF-8 text"),
    ("utf-16", '{"prompt": "a", "completion": "b"}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
    ("encoded surrogate", b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "not UTF-8 text"),
    ("high surrogate alone", b'{"prompt": "\\ud83d", "completion": "b"}', "half a surrogate pair"),
    ("low surrogate alone", b'{"prompt": "a", "completion": "\\uDE00 b"}', "half a surrogate pair"),
    ("surrogate in a key", b'{"prompt": "a", "completion": "b", "\\ud800": 1}', "half a surrogate pair"),
    ("NaN", b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is no number"),
    ("infinity", b'{"prompt": "a", "completion": "b", "score": -Infinity}', "-Infinity is no number"),
    ("huge integer", b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ("deep nesting", b'{"prompt": "a", "completion": "b", "n": ' + b"[" * 100_000, "not usable JSON"),
    ("duplicate key", b'{"prompt": "a", "completion": "b", "prompt": "c"}', "duplicate key 'prompt'"),
    ("duplicate key inside", b'{"prompt": "a", "completion": "b", "m": {"x": 1, "x": 2}}', "duplicate key 'x'"),
    ("number", b"3", "'3' is not an object"),
    ("string", b'"prompt"', "'prompt' is not an object"),
    ("null", b"null", "'None' is not an object"),
    ("true", b"true", "'True' is not an object"),
    ("list of strings", b'["a"]', "'a' is not an object"),
    ("10 MB line", b'{"prompt": "a", "completion": "' + b"b" * 10_000_000 + b'"}', "longer than 8 MiB"),
    ("no prompt", b'{"completion": "b"}', "no column 'prompt'"),
    ("no completion", b'{"prompt": "a"}', "no column 'completion'"),
    ("prompt is an object", b'{"prompt": {"text": "a"}, "completion": "b"}', "column 'prompt' holds"),
    ("prompt is true", b'{"prompt": true, "completion": "b"}', "column 'prompt' holds True, not text"),
    ("completion is a list", b'{"prompt": "a", "completion": ["b"]}', "column 'completion' holds"),
    ("message without role", b'{"prompt": [{"content": "a"}], "completion": "b"}', "a message needs role and content"),
    ("unknown role", b'{"prompt": [{"role": "judge", "content": "a"}], "completion": "b"}', "has the role 'judge'"),
    ("message is text", b'{"prompt": ["a"], "completion": "b"}', "holds the message 'a'"),
    ("image", b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}', "only text"),
]


@pytest.mark.parametrize(("line", "reason"), [case[1:] for case in LINES], ids=[case[0] for case in LINES])
def test_a_bad_line_is_set_aside_and_the_others_stay(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(line))
    rows, counts, records = read(recipe_for(path), tmp_path)
    assert [row["prompt"] for row in rows] == ["question 0", "question 1", "question 2"]
    assert (counts.quarantine.rows, counts.quarantine.count, len(records)) == (4, 1, 1)
    assert reason in records[0]["reason"]
    assert records[0]["where"] in (f"{path} line 3", "row 3")
    assert 0 < len(records[0]["row"]) <= 2000 * 4  # a byte that is no text becomes four characters


FORMAT_ROWS = [
    ("alpaca", {"instruction": "a", "output": "b", "history": 5}, "column 'history' holds 5"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "must be [question, answer]"),
    ("alpaca", {"instruction": "a", "output": "b", "system": 7}, "column 'system' holds"),
    ("messages", {"messages": "hello"}, "not a list of messages"),
    ("messages", {"messages": [{"role": "user", "content": {"a": 1}}]}, "only text is supported"),
    ("sharegpt", {"conversations": [{"role": "user", "content": "a"}]}, "needs from and value"),
    ("preference", {"prompt": "a", "chosen": {"x": 1}, "rejected": "c"}, "column 'chosen' holds"),
    ("preference", {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, "'rejected'"),
    ("hh", {"chosen": ["a"], "rejected": "b"}, "column 'chosen' holds"),
    ("rated_text", {"text": "a", "label": "maybe"}, "must be 0 (negative) or 1 (positive)"),
    ("kto", {"prompt": "a", "completion": "b", "label": 2}, "must be true (good) or false (bad)"),
    ("scored", {"prompt": "a", "responses": "b", "scores": [1]}, "column 'responses' holds"),
    ("scored", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "one number for each of 2 responses"),
    ("scored", {"prompt": "a", "responses": ["b", "c"], "scores": [1, "nan"]}, "not a finite number"),
    ("turns", {"turns": "a"}, "column 'turns' holds 'a', not a list"),
    ("turns", {"turns": [3]}, "only text is supported"),
    ("text", {"text": {"a": 1}}, "column 'text' holds"),
]


@pytest.mark.parametrize(("form", "row", "reason"), FORMAT_ROWS)
def test_wrong_types_are_set_aside_in_every_format(tmp_path, form, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    rows, counts, records = read(recipe_for(path, format=form), tmp_path)
    assert (rows, counts.quarantine.count, len(records)) == ([], 1, 1)
    assert reason in records[0]["reason"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b"\xef\xbb\xbf" + lines()),
        ("x.jsonl", lines() + b"\xef\xbb\xbf" + b"\n"),
        ("x.jsonl", lines(newline=b"\r\n")),
        ("x.jsonl", lines(b"", b"   ", b"\t")),
        ("x.jsonl", lines().replace(b"\n", b"\r\n", 1)),
        ("x.jsonl", lines().rstrip(b"\n")),
        ("x.json", b"\xef\xbb\xbf " + json.dumps(GOOD, indent=2).encode()),
        ("x.json", b"\n\n" + lines()),
        ("x.jsonl.gz", gzip.compress(lines()[:50], mtime=0) + gzip.compress(lines()[50:], mtime=0)),
    ],
    ids=[
        "BOM",
        "BOM line",
        "CRLF",
        "blank lines",
        "mixed newlines",
        "no last newline",
        "BOM array",
        "lead",
        "gz parts",
    ],
)
def test_odd_but_whole_files_lose_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, counts, _ = read(recipe_for(tmp_path / name), tmp_path)
    assert [row["completion"] for row in rows] == ["answer 0", "answer 1", "answer 2"]
    assert counts.quarantine.count <= (1 if content.endswith(b"\xbf\n") else 0)


def test_an_emoji_as_an_escaped_pair_is_no_lone_surrogate(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00", "completion": "\\u4f60"}')
    rows, counts, _ = read(recipe_for(tmp_path / "x.jsonl"), tmp_path)
    assert (rows[0]["prompt"], rows[0]["completion"], counts.quarantine.count) == ("😀", "你", 0)


def test_bad_items_of_an_array_are_set_aside(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(
        b'[{"prompt": "a", "completion": "b"}, 3, {"prompt": "\\ud800", "completion": "b"}, '
        b'{"prompt": "a", "prompt": "b"}, {"prompt": "c", "completion": "d", "s": NaN}, '
        b'{"prompt": "e", "completion": "f"}]'
    )
    rows, counts, records = read(recipe_for(path), tmp_path)
    assert [row["prompt"] for row in rows] == ["a", "e"]
    assert [record["where"] for record in records] == [f"{path} row {n}" for n in (2, 3, 4, 5)]
    assert counts.quarantine.rows == 6


@pytest.mark.parametrize(
    "content",
    [b'[{"prompt": "a"}, {"prompt": ', b'[{"a": 1},]', b'[{"a": 1} {"a": 2}]', b'[{"a": 1}] []', b"[", b"[1 2]"],
)
def test_a_broken_array_stops_because_its_rest_cannot_be_found(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json line 1: not valid JSON"):
        read(recipe_for(tmp_path / "x.json"), tmp_path)


def test_a_cut_gzip_file_stops_because_nobody_knows_what_is_lost(tmp_path):
    rows = [{"prompt": f"{i} {hash(str(i))}", "completion": "b"} for i in range(5000)]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: the file ends early or is damaged"):
        read(recipe_for(tmp_path / "x.jsonl.gz"), tmp_path)


def test_csv_rows_of_another_width_or_encoding_are_set_aside(tmp_path):
    content = b"prompt,completion\na,b\nonly\nc,d,e\ncaf\xe9,x\nf,g\n"
    (tmp_path / "x.csv").write_bytes(content)
    rows, _, records = read(recipe_for(tmp_path / "x.csv"), tmp_path)
    assert [row["prompt"] for row in rows] == ["a", "f"]
    assert [record["where"].split()[-1] for record in records] == ["3", "4", "5"]
    assert "not UTF-8 text" in records[2]["reason"]
    assert csv.field_size_limit() > 10**9


def test_over_the_set_share_the_run_stops(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(b"{"))
    assert len(load_rows(recipe_for(path, max_bad_rows=0.25), "train", "sft")) == 3
    with pytest.raises(UserError) as error:
        load_rows(recipe_for(path, max_bad_rows=0.24), "train", "sft")
    assert "1 of 4 rows are bad, more than max_bad_rows 0.24 allows" in str(error.value)
    assert f"{path} line 3: not valid JSON" in str(error.value)
    assert "\n" not in str(error.value)


def test_below_the_share_a_warning_says_so(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(b"{"))
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        load_rows(recipe_for(path), "train", "sft")
    assert "1 bad rows of 4 left out" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b"[\n]\n"])
def test_an_empty_file_stops(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="has no rows"):
        load_rows(recipe_for(tmp_path / "x.json"), "train", "sft")


def test_a_file_of_which_nothing_can_be_read_is_not_called_a_strange_format(tmp_path):
    path = tmp_path / "utf16.jsonl"
    path.write_bytes('{"prompt": "你好", "completion": "好"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match=r"utf16.jsonl line 1: not UTF-8 text"):
        load_rows(recipe_for(path, format=None, max_bad_rows=0.01), "train", "sft")


def test_a_run_that_stops_leaves_its_bad_rows_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n3\n', encoding="utf-8")
    recipe, final = recipe_for(path, max_bad_rows=0.5), tmp_path / "data" / "mine"
    with pytest.raises(UserError, match=r"2 of 3 rows are bad.*the bad rows are in .*mine\.quarantine\.jsonl$"):
        prepare(recipe, final)
    bad = final.with_name("mine.quarantine.jsonl")
    assert [json.loads(line)["where"].split()[-1] for line in bad.read_text("utf-8").splitlines()] == ["2", "3"]
    assert {found.name for found in final.parent.iterdir()} <= {bad.name, "mine.lock"}
    path.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    prepare(recipe_for(path, max_bad_rows=0.5), final)
    assert final.is_dir() and not bad.exists()
