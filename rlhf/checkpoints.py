"""What all checkpoints share: sealed with checksums once they are whole, checked before they are used.

A checkpoint is a folder whose `checkpoint.json`, written last, holds the sha256 of every other file and what wrote it:
process count, device, threads, package versions. Without that file there is no checkpoint. docs/reliability.md has the
rules.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf.artifacts import fsync, sha256_file, write_json
from rlhf.errors import UserError
from rlhf.stage import differences, package_versions

logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"


def environment(**more: Any) -> dict[str, Any]:
    """What decides the last bits of a result besides recipe and data."""
    state = PartialState()
    device = state.device.type
    threads = torch.get_num_threads() if device == "cpu" else None
    return {"processes": state.num_processes, "device": device, "threads": threads} | package_versions() | more


def seal(directory: Path, written_by: dict[str, Any], continued: Sequence[str] = ()) -> None:
    """Flush every file of `directory` and write its checksums: from here on it is a checkpoint. One rank does this.

    Args:
        directory: below `<stage>.partial/checkpoints`.
        written_by: see `environment`.
        continued: changes of the environment that the run went through before.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL)
    for path in (*files, *directory.parents[1].glob("*.jsonl")):  # the logs it continues are no older than it
        fsync(path)
    digests = {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}
    write_json(directory / SEAL, {"environment": written_by, "continued": list(continued), "files": digests})
    fsync(directory)


def read_seal(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's seal."""
    return json.loads((directory / SEAL).read_text(encoding="utf-8"))


def damage(directory: Path) -> str | None:
    """What is wrong with a sealed checkpoint; None if nothing is."""
    try:
        files = read_seal(directory)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL}: {error}"
    for name, digest in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != digest:
            return f"{name} has changed"
    return None


def newest_whole(candidates: list[Path], check: Callable[[Path], str | None] = damage) -> Path | None:
    """The last whole one of `candidates`, the same on every rank. Damaged ones are named; they and unsealed ones go.

    Args:
        candidates: folders, oldest first.
        check: says what is wrong with a sealed one.
    """
    state = PartialState()
    found: list[Path | None] = [None]
    if state.is_main_process:
        for path in reversed(candidates):
            if (path / SEAL).is_file():
                wrong = check(path)
                if wrong is None:
                    found = [path]
                    break
                logger.warning("checkpoint %s is damaged (%s): using the one before it, if there is one", path, wrong)
            shutil.rmtree(path)
    broadcast_object_list(found)
    return found[0]


def check_environment(directory: Path, now: dict[str, Any], fixed: Sequence[str]) -> list[str]:
    """Refuse or name what has changed since the checkpoint was written; returns all changes of the run so far.

    Args:
        directory: a whole checkpoint.
        now: see `environment`.
        fixed: keys of it that must not change.

    Raises:
        UserError: one of `fixed` has changed.
    """
    sealed = read_seal(directory)
    changed = differences(sealed["environment"], now)
    for line in changed:
        key, before = line.split(" ")[0], sealed["environment"].get(line.split(" ")[0])
        if key in fixed:
            raise UserError(
                f"{directory}: cannot continue with {line}: run it with {key} {before} again, or FORCE=1 to start over"
            )
    if changed:
        logger.warning("%s: continuing although %s: no longer bit-equal", directory, ", ".join(changed))
    return [*sealed["continued"], *(f"{directory.name}: {line}" for line in changed)]


def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators of this rank, as torch.load(weights_only=True) takes them."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, numpy.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`; a GPU's generator stays where the checkpoint has none."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def replace_dir(tmp: Path, final: Path) -> None:
    """Give the whole `tmp` its name. What stood there (the same step, written before a crash) goes."""
    shutil.rmtree(final, ignore_errors=True)
    os.replace(tmp, final)
    fsync(final.parent)
