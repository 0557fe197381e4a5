"""Seals: what is damaged is named and passed over; what wrote a checkpoint is compared with what reads it."""

import json
import logging
import random
from importlib import metadata

import numpy
import pytest
import torch

from rlhf.checkpoints import (
    SEAL,
    check_environment,
    damage,
    environment,
    newest_whole,
    random_state,
    replace_dir,
    restore_random_state,
    seal,
)
from rlhf.errors import UserError


@pytest.fixture
def steps(tmp_path):
    """Three sealed checkpoints, oldest first."""
    made = []
    for step in (1, 2, 3):
        path = tmp_path / "ppo.partial" / "checkpoints" / f"step_{step}"
        (path / "sub").mkdir(parents=True)
        (path / "state.pt").write_bytes(bytes(range(100)) * step)
        (path / "sub" / "more.json").write_text(f'{{"step": {step}}}')
        seal(path, environment())
        made.append(path)
    return made


def flip_a_bit(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[50] ^= 1
    (path / "state.pt").write_bytes(data)


HARM = {
    "bit": (flip_a_bit, "state.pt has changed"),
    "truncated": (lambda path: (path / "state.pt").write_bytes(bytes(range(99))), "state.pt has changed"),
    "missing": (lambda path: (path / "sub" / "more.json").unlink(), "sub/more.json is missing"),
    "seal": (lambda path: (path / SEAL).write_text("{"), SEAL),
    "empty seal": (lambda path: (path / SEAL).write_text("{}"), SEAL),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(steps, harm, caplog):
    how, words = HARM[harm]
    how(steps[2])
    assert words in damage(steps[2]) and damage(steps[1]) is None
    assert newest_whole(steps) == steps[1]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(steps[2]) in said and words in said
    assert not steps[2].exists() and steps[0].exists()  # the step will be written again


def test_an_unsealed_checkpoint_is_none(steps, caplog):
    (steps[2] / SEAL).unlink()
    assert newest_whole(steps) == steps[1] and not caplog.records and not steps[2].exists()


def test_when_all_are_damaged_there_is_none(steps):
    for path in steps:
        flip_a_bit(path)
    assert newest_whole(steps) is None and newest_whole([]) is None


def test_the_same_environment_says_nothing(steps, caplog):
    assert check_environment(steps[0], environment(), ("processes",)) == [] and not caplog.records


def test_another_version_is_said_and_kept(steps, caplog):
    now = environment() | {"torch": "99.0"}
    changed = check_environment(steps[0], now, ("processes",))
    line = f'torch "{metadata.version("torch")}" -> "99.0"'
    assert changed == [f"step_1: {line}"]
    assert f"continuing although {line}: no longer bit-equal" in caplog.text
    seal(steps[1], now, changed)
    assert check_environment(steps[1], now, ()) == changed  # later checkpoints still know


def test_what_must_not_change_is_refused(steps):
    with pytest.raises(UserError, match=r"processes 1 -> 2: run it with processes 1 again, or FORCE=1"):
        check_environment(steps[0], environment() | {"processes": 2}, ("processes",))


def test_environment_names_what_moves_the_last_bits():
    found = environment(sharded=False)
    assert {"processes", "device", "threads", "torch", "transformers", "trl", "accelerate", "sharded"} <= set(found)
    assert json.loads(json.dumps(found)) == found


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.save(random_state(), tmp_path / "r.pt")
    expected = (random.random(), numpy.random.rand(), torch.rand(3).tolist())
    restore_random_state(torch.load(tmp_path / "r.pt", weights_only=True))
    assert (random.random(), numpy.random.rand(), torch.rand(3).tolist()) == expected


def test_replace_dir_takes_the_place_of_what_was_there(tmp_path):
    for name in ("new.tmp", "step"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_dir(tmp_path / "new.tmp", tmp_path / "step")
    assert (tmp_path / "step" / "file").read_text() == "new.tmp" and not (tmp_path / "new.tmp").exists()
