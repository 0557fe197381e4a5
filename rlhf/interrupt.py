"""SIGTERM and SIGINT: a training loop finishes its step and saves first; elsewhere the stage stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 2.0  # seconds within which torchrun repeats the signal that its whole process group has already got


class Interrupted(BaseException):
    """A stage was asked to stop. Not an Exception: nothing that handles errors may swallow it."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.number = number


class _Request:
    """What the handlers have seen: signal handlers can only leave a note."""

    number = 0
    since = 0.0
    deferred = False


@contextmanager
def handled() -> Iterator[None]:
    """Handle both signals within this; for the main thread."""
    _Request.number = 0
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Request.number = 0


def _handle(number: int, frame: FrameType | None) -> None:
    if _Request.number:
        if "LOCAL_RANK" in os.environ and time.monotonic() - _Request.since < ECHO:
            return
        os._exit(128 + number)  # asked twice: whatever is being written is unsealed and ignored
    _Request.number, _Request.since = number, time.monotonic()
    if not _Request.deferred:
        raise Interrupted(number, "no training step was running")


@contextmanager
def finish_step_first() -> Iterator[None]:
    """Within this, a signal is kept for `requested`. One that comes after the last question counts at the end."""
    _Request.deferred = True
    try:
        yield
    finally:
        _Request.deferred = False
    if _Request.number:
        raise Interrupted(_Request.number, "training is done and saved")


def requested() -> int:
    """Number of the signal that any rank was sent, 0 if none was. Every rank calls this at the same step."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather

    state = PartialState()
    if state.num_processes == 1:
        return _Request.number
    return int(gather(torch.tensor([_Request.number], device=state.device)).max())
