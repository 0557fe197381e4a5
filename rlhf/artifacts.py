"""The artifact directory: publish atomically, load, verify, lineage.

A stage builds in `<run>/<stage>.partial/` and is renamed to `<run>/<stage>/` when it is whole, so a reader sees a whole
artifact or none. `manifest.json` is written last and holds the sha256 of every file. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
COMPLETE = "complete"
# Files that need no training to be made again, and how.
REMADE = dict.fromkeys(("report.json", "report.html"), "`make report STAGE=reward` makes it again")
KEPT_POLICIES = "policies"  # in a ppo artifact: policies of earlier steps, for evaluation
# What a later stage consumes. Logs, samples and cards hold times and text for people: redoing a stage with the same
# outcome must not make the stages after it stale.
PAYLOAD = ("model/", "critic/", "adapter/", "critic_adapter/", "rows/")
# Suffixes of folders that are being written, replaced or linked.
UNPUBLISHED = (".partial", ".old", ".linking")
# What only a running stage needs: neither hashed nor published.
FINGERPRINT = "fingerprint.json"
CHECKPOINTS = "checkpoints"


STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")  # of a run, in order
LONGEST_NAME = 200  # bytes; 255 are allowed, and `.partial` and the like are added


def check_name(name: str, what: str) -> str:
    """`name` where it is one plain folder name, so that nothing is written outside the artifact directory.

    Raises:
        UserError: it has a separator, is something like `..`, or is longer than file systems allow with what is added.
    """
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"{what} {name[:20]}...: {len(name.encode())} bytes long, allowed are {LONGEST_NAME}: shorten it"
        )
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{what} {name!r}: not a plain name: use letters, digits, `_`, `-`, `+` and `.`")
    return name


DATA = "data"  # folder of prepared data sets, beside the runs


def check_run(name: str, what: str = "--run") -> str:
    """`name` where it can be that of a run.

    Raises:
        UserError: it is no plain name, or that of the data sets' folder: its locks and artifacts would be theirs.
    """
    if check_name(name, what) == DATA:
        raise UserError(f"{what} {name!r}: the artifact directory keeps data sets in that folder: take another name")
    return name


def inside(folder: Path, name: str) -> bool:
    """Whether `folder / name` is below `folder`, by its name alone: a package's files may be links."""
    return Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder))


def partial_dir(final: Path) -> Path:
    """Where the artifact at `final` is built."""
    return final.with_name(final.name + ".partial")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` is the old or the new file, never half of one."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, sort_keys=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file, none if it is not there. Only \\n ends a line: strings may hold U+2028 and the like.

    Raises:
        UserError: a line that is no object; names it.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number}: damaged ({error}): redo the stage with FORCE=1") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: damaged (no object): redo the stage with FORCE=1")
            rows.append(row)
    return rows


def hash_files(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory` that is published, by POSIX path; the manifest cannot hold its own."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(directory).as_posix() for path in files]
    return {
        name: sha256_file(path)
        for name, path in zip(names, files, strict=True)
        if name not in (MANIFEST, FINGERPRINT) and not name.startswith(CHECKPOINTS + "/")
    }


def payload_hash(files: dict[str, str], statistics: Any = None) -> str:
    """Identity of what later stages consume: the model files without cards and logs, and the reward statistics."""
    payload = {name: digest for name, digest in files.items() if name.startswith(PAYLOAD) and not name.endswith(".md")}
    return sha256_json(payload or files) if statistics is None else sha256_json([payload, statistics])


@dataclass(frozen=True)
class Artifact:
    """A published stage."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read the artifact at `path`; see `verify` for its bytes.

        Raises:
            UserError: nothing there, not finished, or the manifest is damaged or of another schema.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise UserError(f"artifact {directory}: not there: run `make {directory.name}` first, or check the path")
        redo = f"run {directory.name} again with FORCE=1"
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"artifact {directory}: no {MANIFEST}: not a finished stage; {redo}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"artifact {directory}: {MANIFEST} is damaged ({error}): {redo}") from None
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"artifact {directory}: schema_version {version!r}, this code reads {SCHEMA_VERSION}: {redo}"
            )
        missing = [key for key in ("stage", "files", "payload_hash") if key not in manifest]
        if missing:
            raise UserError(f"artifact {directory}: {MANIFEST} has no `{missing[0]}`: {redo}")
        if not isinstance(manifest["files"], dict):
            raise UserError(f"artifact {directory}: {MANIFEST} is damaged (`files`): {redo}")
        status = manifest.get("status", COMPLETE)
        if status != COMPLETE:
            raise UserError(f"artifact {directory}: its status is {status!r}: not finished; {redo}")
        return cls(directory, manifest)

    @property
    def model_dir(self) -> Path:
        """Folder that `from_pretrained` loads."""
        return self.path / "model"

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return str(self.manifest["stage"])

    @property
    def hash(self) -> str:
        """Identity of what later stages consume."""
        return str(self.manifest["payload_hash"])

    def metrics(self) -> pandas.DataFrame:
        """Rows of metrics.jsonl, one per logged step; keys as in docs/metrics.md."""
        import pandas

        return pandas.DataFrame(read_jsonl(self.path / "metrics.jsonl"))

    def samples(self) -> pandas.DataFrame:
        """Rows of samples.jsonl: step, prompt, response, score, kl, length, has_eos and ids."""
        import pandas

        return pandas.DataFrame(read_jsonl(self.path / "samples.jsonl"))

    def missing(self) -> list[str]:
        """Files that later stages consume and that are gone; what they hold is not looked at."""
        names = (name for name in self.manifest["files"] if name.startswith(PAYLOAD))
        return [name for name in names if not (self.path / name).is_file()]

    def verify(self, without: Collection[str] = ()) -> None:
        """Compare every file, but those named in `without`, with the manifest, and the manifest with its own hash.

        Raises:
            UserError: a file is missing, truncated, changed or none of the stage's, or lies outside the artifact;
                names the first one.
        """
        expected = payload_hash(self.manifest["files"], self.manifest.get("reward_statistics"))
        if expected != self.hash:
            raise UserError(
                f"artifact {self.path}: {MANIFEST} was changed (its files and statistics give {expected[:12]}, "
                f"payload_hash is {self.hash[:12]}): redo the stage with FORCE=1"
            )
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if name.startswith(PAYLOAD) and not path.is_dir() and name not in self.manifest["files"]:
                raise UserError(
                    f"artifact {self.path}: {name} is not of this stage, and loading may read it: move it away"
                )
        for name, digest in self.manifest["files"].items():
            if name in without:
                continue
            path = self.path / name
            remedy = REMADE.get(name, f"run {self.path.name} again with FORCE=1")
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise UserError(
                    f"artifact {self.path}: {MANIFEST} lists {name!r}, which lies outside the artifact: do not use it"
                )
            if not path.is_file():
                raise UserError(f"artifact {self.path}: {name} is missing: {remedy}")
            actual = sha256_file(path)
            if actual != digest:
                raise UserError(
                    f"artifact {self.path}: {name} is damaged (sha256 {actual[:12]}, manifest {digest[:12]}): {remedy}"
                )


def finish(partial: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Hash the files of `partial` and write its manifest: from here on it is whole.

    Until then the checkpoints stay: a full disk at this point must not cost the training.
    """
    files = hash_files(partial)
    for name in files:
        fsync(partial / name)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "payload_hash": payload_hash(files, manifest.get("reward_statistics")),
        "files": files,
    }
    write_json(partial / MANIFEST, manifest)
    return manifest


def publish(partial: Path, final: Path) -> Artifact:
    """Put the whole `partial` in the place of `final`; an old artifact there goes only once the new one stands."""
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    (partial / FINGERPRINT).unlink(missing_ok=True)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return Artifact.load(final)


def recover(final: Path) -> None:
    """Finish what a crash during `publish` left: a whole `.partial`, or an `.old` whose place is empty."""
    partial, old = partial_dir(final), final.with_name(final.name + ".old")
    if (partial / MANIFEST).is_file():
        publish(partial, final)
    elif old.is_dir() and not final.exists():
        os.replace(old, final)
    elif old.is_dir():
        shutil.rmtree(old)


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, for a manifest."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
