"""SIGTERM and SIGINT: kept while a step runs, at once elsewhere; the second one ends the process."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pipelines import cli
from rlhf import interrupt
from rlhf.errors import UserError
from rlhf.interrupt import Interrupted, finish_step_first, handled, requested

ROOT = Path(__file__).parents[2]
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def send(number: int) -> None:
    """To this process; Python runs the handler before the next line."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_training_it_stops_at_once(number):
    with pytest.raises(Interrupted) as stop, handled():
        send(number)
        pytest.fail("went on")
    assert stop.value.number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_within_training_it_waits_for_the_question(number):
    asked = []
    with pytest.raises(Interrupted), handled(), finish_step_first():
        asked.append(requested())
        send(number)
        asked.append(requested())
    assert asked == [0, number]


def test_it_is_no_error_that_handlers_of_errors_could_swallow():
    assert not issubclass(Interrupted, Exception)


def test_handlers_and_notes_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), handled():
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with handled(), finish_step_first():
        assert requested() == 0  # the last run's is forgotten


def exit_code(what) -> int:
    pid = os.fork()
    if not pid:
        try:
            what()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_the_second_one_ends_the_process(number, code):
    def twice():
        with handled(), finish_step_first():
            send(signal.SIGINT)
            send(number)

    assert exit_code(twice) == code


def test_torchrun_s_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with pytest.raises(Interrupted), handled(), finish_step_first():
        send(signal.SIGINT)
        send(signal.SIGINT)  # from the terminal and from the launcher
        assert requested() == signal.SIGINT

    def later():
        with handled(), finish_step_first():
            send(signal.SIGINT)
            now[0] += interrupt.ECHO + 0.1
            send(signal.SIGINT)

    assert exit_code(later) == 130


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_the_entry_point_says_how_to_continue(monkeypatch, capsys, number, code):
    def run(*args):
        send(number)
        time.sleep(1)

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main("ppo", "rlhf.ppo.stage", []) == code
    said = capsys.readouterr().err.splitlines()
    name = signal.Signals(number).name
    assert said == [f"stopped by {name}: ppo: no training step was running: run the same command again to continue"]


@pytest.mark.parametrize("said", [None, UserError("no such file")])
def test_the_entry_point_ends_the_process_group(monkeypatch, said):
    """Also after bad input, which all ranks see; a group left standing aborts some processes as Python exits."""

    def run(*args):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if said:
            raise said

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main("ppo", "rlhf.ppo.stage", []) == (cli.BAD_INPUT if said else 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize(("processes", "said"), [("1", "flushed closed ended "), ("2", "flushed closed ")])
def test_one_of_several_processes_leaves_before_the_interpreter_s_own_end(processes, said):
    script = """
import atexit
import sys
from pipelines.cli import leave

class Last:
    def __del__(self):
        sys.stdout.write("ended ")

kept = Last()
atexit.register(lambda: sys.stdout.write("closed "))
sys.stdout.write("flushed ")
leave(3)
"""
    environment = os.environ | {"WORLD_SIZE": processes, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


@pytest.mark.parametrize("module", ["convert", "data", "label", "label_select", "status"])
def test_arguments_that_nobody_knows_are_said_in_one_line(module, capsys):
    main = importlib.import_module(f"pipelines.{module}").main
    assert main(["--frobnicate"]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith(f"error: python -m pipelines.{module}: ") and said.count("\n") == 1
