"""The lock of an artifact: held by a living process, left by a dead one, left by another host."""

import errno
import json
import logging
import os
import re
import signal
import socket

import pytest

from pipelines.status import describe
from rlhf import locks
from rlhf.errors import UserError
from rlhf.locks import locked, running


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ppo.lock"


def held_by_a_fork(path) -> int:
    """Pid of a process that holds the lock until it is killed."""
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with locked(path):
                os.write(done, b"x")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_file_names_the_holder_and_goes_with_it(path):
    with locked(path):
        holder = json.loads(path.read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", holder["since"])
    assert not path.exists()
    with locked(path):
        pass


def test_a_living_holder_is_told_from_a_dead_one(path):
    assert running(path) is None
    pid = held_by_a_fork(path)
    assert running(path) == pid
    partial = path.with_suffix(".partial")
    partial.mkdir()
    assert describe(partial) == f"running, process {pid}"
    end(pid)
    assert running(path) is None
    assert describe(partial).startswith("interrupted")
    path.write_text("{", encoding="utf-8")
    assert running(path) is None


def test_a_second_process_is_refused_with_pid_and_host(path):
    pid = held_by_a_fork(path)
    try:
        with (
            pytest.raises(UserError, match=rf"ppo: process {pid} on {socket.gethostname()} is building it"),
            locked(path),
        ):
            pytest.fail("both hold it")
        assert path.exists()  # the refused one leaves the other's file
    finally:
        end(pid)


def test_a_dead_process_s_lock_is_taken_over_with_one_line(path, caplog):
    pid = held_by_a_fork(path)
    end(pid)
    assert path.exists()
    with caplog.at_level(logging.INFO, "rlhf.locks"), locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path.with_suffix('')}: process {pid}, which was building it, is gone: taking over"
    ]


def test_another_host_s_lock_is_respected_until_it_is_removed(path):
    path.parent.mkdir()
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "2026-01-02 03:04:05"}))
    with pytest.raises(UserError, match=rf"host elsewhere .* if it is gone, delete {path}"), locked(path):
        pytest.fail("cannot be known")
    path.unlink()
    with locked(path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_half_written_file_of_a_dead_process_is_no_obstacle(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_that_its_holder_removed_in_between_is_not_taken_for_the_lock(path, monkeypatch):
    """Open before the holder's unlink, flock after it: the lock would be on a file that no longer has a name."""
    claim, calls = locks._claim, []

    def slow(path, handle):
        if not calls:
            path.unlink()
        calls.append(handle)
        claim(path, handle)

    monkeypatch.setattr(locks, "_claim", slow)
    with locked(path):
        assert len(calls) == 2 and path.stat().st_ino == os.fstat(calls[-1]).st_ino


def test_without_locks_in_the_file_system_it_says_so(path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locked(path):
        pass
    assert "has no locks" in caplog.text


def test_where_nothing_can_be_written_nothing_is_locked(path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locks.os, "open", refuse)
    with locked(path):
        inside = True
    assert inside and not path.exists()
