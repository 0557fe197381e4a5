"""metrics.jsonl: rows that a resumed run will write again go away, and everything written can be read."""

import json
import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from pipelines.cli import BesideBars
from rlhf.errors import UserError
from rlhf.logs import MetricsWriter, append_row, check_trackers, rewind_rows, token_texts, trainer_callback


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        append_row(path, {"step": step, "loss": step / 2})
    rewind_rows(path, "step", 2)
    assert rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    append_row(path, {"step": 3})
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2, "text": "é'.encode()[:-1], "{", '{"step": 2}\n{"st'])
def test_rewind_drops_a_half_written_line(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(half if isinstance(half, bytes) else half.encode())
    rewind_rows(path, "step", 1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_rewind_keeps_rows_whose_text_holds_line_separators(tmp_path):
    path = tmp_path / "samples.jsonl"
    texts = ["a\u2028b", "c\x85d", "e\x1cf", "g\nh", "你好"]
    for step, text in enumerate(texts, start=1):
        append_row(path, {"step": step, "response": text})
    rewind_rows(path, "step", 4)
    assert [row["response"] for row in rows(path)] == texts[:4]


def test_rewind_to_the_start_and_of_nothing(tmp_path):
    rewind_rows(tmp_path / "none.jsonl", "step", 0)
    assert not (tmp_path / "none.jsonl").exists()
    append_row(tmp_path / "m.jsonl", {"ppo_step": 1})
    rewind_rows(tmp_path / "m.jsonl", "ppo_step", 0)
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_rows_are_json_whatever_the_number(tmp_path):
    path = tmp_path / "m.jsonl"
    append_row(path, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.1, "e": 3})
    assert path.read_text() == '{"a": null, "b": null, "c": null, "d": 0.1, "e": 3}\n'


def on_log(callback, step: int, logs: dict, zero: bool = True) -> None:
    callback.on_log(None, SimpleNamespace(is_world_process_zero=zero, global_step=step), None, logs=logs)


def test_trainer_callback_writes_documented_keys_and_leaves_out_new_ones_with_one_warning(tmp_path, caplog):
    callback = trainer_callback(tmp_path)
    with caplog.at_level(logging.WARNING, "rlhf"):
        on_log(callback, 1, {"loss": 2.0, "router_z": 3.0})
        on_log(callback, 2, {"eval_loss": 1.0, "eval_runtime": 9.0, "router_z": 4.0})
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.0, "perf/eval_runtime": 9.0},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl: left out router_z: not in rlhf/metrics.py"
    ]


def test_trainer_callback_writes_on_rank_0_alone(tmp_path):
    callback = trainer_callback(tmp_path)
    on_log(callback, 1, {"loss": 2.0})
    on_log(callback, 2, {"loss": 1.0}, zero=False)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]


class FakeTracker:
    finished = False

    def finish(self) -> None:
        self.finished = True


class FakeAccelerator:
    def __init__(self, main: bool) -> None:
        self.is_main_process, self.logged, self.trackers = main, [], [FakeTracker(), FakeTracker()]

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))


ROW = {"objective/scores": 1.0, "objective/kl": 0.5, "rollout/response_length": 8.0, "rollout/eos_rate": 1.0}


def test_metrics_writer_writes_file_and_trackers(tmp_path):
    accelerator = FakeAccelerator(main=True)
    writer = MetricsWriter(tmp_path, accelerator, total_steps=2, samples=1)
    writer.write({"ppo_step": 1} | ROW)
    writer.write({"ppo_step": 2} | ROW)
    writer.rewind(1)
    writer.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"ppo_step": 1} | ROW]
    assert accelerator.logged == [(1, ROW), (2, ROW)]
    assert all(tracker.finished for tracker in accelerator.trackers)


def test_metrics_writer_on_another_rank_writes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, FakeAccelerator(main=False), total_steps=2, samples=1)
    writer.write({"ppo_step": 1} | ROW)
    writer.write_samples(1, None, None, str)
    writer.rewind(0)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_writer_refuses_an_undocumented_key(tmp_path):
    writer = MetricsWriter(tmp_path, FakeAccelerator(main=True), total_steps=1, samples=1)
    with pytest.raises(KeyError, match="objective/klx"):
        writer.write({"ppo_step": 1, "objective/klx": 1.0} | ROW)
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "key", "refused"), [("online", False, True), ("online", True, False), ("offline", False, False)]
)
def test_wandb_without_a_key(monkeypatch, mode, key, refused):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: key))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(UserError, match="wandb login") if refused else nullcontext():
        check_trackers(["wandb"])


def test_check_trackers(monkeypatch):
    check_trackers([])
    check_trackers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.report_to: trackio .* pip install trackio"):
        check_trackers(["trackio"])


def test_token_texts_join_to_the_text_and_keep_characters_whole():
    pieces = {1: b"a ", 2: "你".encode()[:1], 3: "你".encode()[1:], 4: b"\xff", 5: b"b", 9: b""}

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")

    assert token_texts(decode, [1, 2, 3, 5, 9]) == ["a ", "", "你", "b", ""]
    assert token_texts(decode, [4, 5]) == ["", "\ufffdb"]  # no byte of any character
    assert token_texts(decode, [1, 2]) == ["a ", "\ufffd"]  # cut in the middle of one
    assert token_texts(decode, []) == []


def test_token_texts_keep_the_spaces_that_tokenizers_drop_at_the_beginning():
    pieces = {1: " one", 2: " two", 3: "."}
    assert token_texts(lambda ids: "".join(pieces[i] for i in ids).lstrip(), [1, 2, 3]) == ["one", " two", "."]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_beside_a_progress_bar_has_a_line_of_its_own(capsys, stream):
    handler = BesideBars(getattr(sys, stream))
    with tqdm(total=3, desc="ppo", file=sys.stderr, mininterval=0) as bar:
        bar.update()
        handler.emit(logging.makeLogRecord({"msg": "critic: said"}))
        bar.update()
    out, err = capsys.readouterr()
    assert out == ("critic: said\n" if stream == "stdout" else "")
    drawn = [part.strip() for part in err.replace("\r", "\n").split("\n")]
    bars = [part for part in drawn if part.startswith("ppo:")]
    assert all("critic" not in part for part in bars) and (stream == "stdout" or "critic: said" in drawn)
    cleared = next(number for number, part in enumerate(drawn) if "1/3" in part) + 1
    assert drawn[cleared] == "" and any("2/3" in part for part in bars)  # taken away, and drawn again
