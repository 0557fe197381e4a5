"""One process at a time builds an artifact: `<stage>.lock` beside it names the pid and host that do.

The operating system's lock on the file is what counts on one host: it goes with the process, however that ends. Another
host's process cannot be seen from here, so its file is respected until somebody removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

logger = logging.getLogger(__name__)

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some network file systems


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. Where nothing can be written there is nothing to protect.

    Raises:
        UserError: another process holds it, or a process of another host may.
    """
    try:
        handle = _acquire(path)
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning("%s: the file system has no locks: two runs at once would not be noticed", path.parent)
        elif error.errno not in UNWRITABLE:
            raise
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, or another process could lose its file
        os.close(handle)


def running(path: Path) -> int | None:
    """Process of this host that the lock file `path` names, if it is alive. Takes no lock: it would be in the way."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        pid = int(holder["pid"]) if holder["host"] == socket.gethostname() else 0
        if pid > 0:
            os.kill(pid, 0)
    except PermissionError:  # it is alive, and another user's
        return pid
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid or None


def _acquire(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        mine = False
        try:
            _claim(path, handle)
            # Its holder may have removed the file between our two calls; then another one has the name, or none.
            mine = path.exists() and os.fstat(handle).st_ino == path.stat().st_ino
        finally:
            if not mine:
                os.close(handle)
        if mine:
            return handle


def _claim(path: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(handle)
        raise UserError(
            f"{path.with_suffix('')}: process {holder.get('pid')} on {holder.get('host')} is building it since "
            f"{holder.get('since')}: wait for it or stop it, or work under another name (RUN=...)"
        ) from None
    holder, here = _holder(handle), socket.gethostname()
    if holder and holder.get("host") != here:
        raise UserError(
            f"{path.with_suffix('')}: process {holder.get('pid')} on host {holder.get('host')} was building it since "
            f"{holder.get('since')}, which cannot be checked from {here}: if it is gone, delete {path}"
        )
    if holder:
        logger.info("%s: process %s, which was building it, is gone: taking over", path.with_suffix(""), holder["pid"])
    mine = {"pid": os.getpid(), "host": here, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(mine).encode(), 0)


def _holder(handle: int) -> dict[str, Any]:
    """What the lock file says; nothing if its writer died before it wrote."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and "pid" in holder else {}
