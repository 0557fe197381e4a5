"""Reading rows from files, packages, functions and the Hub layout, and hashing them."""

import gzip
import hashlib
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import FilesSource, FunctionSource, HubSource, PackageSource
from rlhf.data.sources import iter_rows, source_hash
from rlhf.errors import UserError

ROWS = [{"text": "你好\u2028世界", "n": 1}, {"text": 'a "b", c\nd', "n": 2}]


def read_rows(source):
    """All rows; the first bad one is an error."""
    quarantine = Quarantine()
    rows = list(iter_rows(source, quarantine))
    quarantine.check(0.0)
    return rows


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "somereviews"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "x.csv").write_text("text,label\ngood,1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return PackageSource(package="some-reviews", module="somereviews", file="data/x.csv")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", ["array.json", "lines.json", "x.jsonl", "x.parquet"])
def test_files_round_trip(tmp_path, kind, packed):
    if kind == "x.parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        content = sink.getvalue().to_pybytes()
    elif kind == "array.json":
        content = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\n\n"
    path = tmp_path / (kind + ".gz" if packed else kind)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_rows(FilesSource(files=str(path))) == ROWS


def test_csv_cells_are_strings(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes('\ufefftext,label\n"a, ""b""\nc",01\nNA,\n'.encode())
    assert read_rows(FilesSource(files=str(path))) == [
        {"text": 'a, "b"\nc', "label": "01"},
        {"text": "NA", "label": ""},
    ]


def test_globs_and_lists_are_read_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "c.csv").write_text("text\nc\n")
    source = FilesSource(files=[str(tmp_path / "*.jsonl"), str(tmp_path / "c.csv")])
    assert [row["text"] for row in read_rows(source)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("x.json", b'[{"a": 1},\n{"a": }]', "line 2: not valid JSON"),
        ("x.jsonl", b'{"a": 1}\n3\n', "line 2: '3' is not an object"),
        ("x.csv", b"a,b\n1\n", "line 2: not 2 cells"),
        ("x.csv", b'a,b\n1,"2"3\n', "after line 1: not valid CSV"),
        ("x.jsonl", b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
        ("x.jsonl.gz", b"not gzip", "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "file ends early or is damaged"),
        ("x.parquet", b"not parquet", "not a Parquet file"),
        ("x.xlsx", b"", "file type '.xlsx' is not known"),
        ("x.jsonl", b"\n", "has no rows"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(FilesSource(files=str(tmp_path / name)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        read_rows(FilesSource(files=str(tmp_path / "*.json")))


def test_package_file_is_found_without_import(package):
    assert read_rows(package) == [{"text": "good", "label": "1"}]
    assert "somereviews" not in sys.modules


def test_missing_package_says_how_to_install():
    source = PackageSource(package="no-such-thing", module="no_such_thing", file="x.csv")
    with pytest.raises(UserError, match=r"pip install -e .\[tiny\]"):
        read_rows(source)


def test_missing_file_in_package(package):
    with pytest.raises(UserError, match=r"'data/y.csv' is not in package"):
        read_rows(package.model_copy(update={"file": "data/y.csv"}))


def test_function_source_runs_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "rows_for_test.py").write_text(
        "def rows():\n    return [{'text': 'a'}]\n\ndef wrong():\n    return 'a'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert read_rows(FunctionSource(function="rows_for_test:rows")) == [{"text": "a"}]
    expected = hashlib.sha256((tmp_path / "rows_for_test.py").read_bytes()).hexdigest()
    assert source_hash(FunctionSource(function="rows_for_test:rows")) == expected
    with pytest.raises(UserError, match="returned str; return a list of dicts"):
        read_rows(FunctionSource(function="rows_for_test:wrong"))
    with pytest.raises(UserError, match="rows_for_test:absent"):
        read_rows(FunctionSource(function="rows_for_test:absent"))
    with pytest.raises(UserError, match="no_such_module_here"):
        read_rows(FunctionSource(function="no_such_module_here:rows"))


def test_hub_layout_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_rows(HubSource(hub=str(folder), revision="0" * 40)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserError, match="cannot be loaded") as error:
        read_rows(HubSource(hub=str(folder), revision="0" * 40, split="nope"))
    assert "\n" not in str(error.value)


def test_hub_passes_revision_subset_and_split(monkeypatch):
    import datasets

    calls = []

    def fake(path, name, split, revision):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    read_rows(HubSource(hub="org/set", revision="abc", subset="en", split="train_prefs"))
    assert calls == [("org/set", "en", "train_prefs", "abc")]


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"org/set@abc\[train\] cannot be loaded"):
        read_rows(HubSource(hub="org/set", revision="abc"))


def test_source_hash_follows_the_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    source = FilesSource(files=str(path))
    first = source_hash(source)
    assert source_hash(source) == first
    path.write_text('{"text": "bb"}')
    assert source_hash(source) != first


def test_source_hash_of_the_hub_follows_the_revision():
    one = HubSource(hub="org/set", revision="abc")
    assert source_hash(one) == hashlib.sha256(b"org/set/None/train@abc").hexdigest()
    assert source_hash(one.model_copy(update={"revision": "abd"})) != source_hash(one)
