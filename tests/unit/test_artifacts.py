"""A reader sees a whole artifact or none, whenever the writer dies; damage is found; identity is the model alone."""

import hashlib
import json
from pathlib import Path

import pytest

from rlhf import artifacts
from rlhf.artifacts import Artifact, finish, partial_dir, payload_hash, publish, read_jsonl, recover, write_json
from rlhf.errors import UserError


class Crash(BaseException):
    """The process dies here: nothing may catch it."""


def begin(final: Path, weights: str, card: str = "card") -> Path:
    """A `.partial` as a stage leaves it: model, logs and training state."""
    partial = partial_dir(final)
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "weights.bin").write_text(weights)
    (partial / "model" / "README.md").write_text(card)
    (partial / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (partial / "checkpoints" / "step_1").mkdir(parents=True)
    (partial / "checkpoints" / "step_1" / "state").write_text("state")
    (partial / "fingerprint.json").write_text("{}")
    return partial


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def made(final: Path, weights: str, card: str = "card") -> Artifact:
    partial = begin(final, weights, card)
    finish(partial, {"stage": final.name})
    return publish(partial, final)


# ------------------------------------------------------------------------------------------------------- what is there
def test_published_artifact_holds_its_files_and_no_training_state(tmp_path):
    artifact = made(tmp_path / "run" / "sft", "w")
    files = sorted(p.relative_to(artifact.path).as_posix() for p in artifact.path.rglob("*") if p.is_file())
    assert files == ["manifest.json", "metrics.jsonl", "model/README.md", "model/weights.bin"]
    assert names(tmp_path / "run") == ["sft"]
    # sha256 of "w", computed elsewhere
    digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"
    assert artifact.manifest["files"]["model/weights.bin"] == digest
    assert set(artifact.manifest["files"]) == {"metrics.jsonl", "model/README.md", "model/weights.bin"}
    assert artifact.manifest["schema_version"] == 1
    assert (artifact.stage, artifact.model_dir) == ("sft", tmp_path / "run" / "sft" / "model")
    artifact.verify()


def test_manifest_is_json_for_people(tmp_path):
    artifact = made(tmp_path / "sft", "w")
    text = (artifact.path / "manifest.json").read_text()
    assert text.endswith("}\n") and text.count("\n") > 5
    assert json.loads(text) == artifact.manifest


def test_metrics_and_samples_are_frames(tmp_path):
    partial = begin(tmp_path / "ppo", "w")
    (partial / "samples.jsonl").write_text('{"step": 1, "response": "a\u2028b"}\n{"step": 2, "response": "c\x85"}\n')
    finish(partial, {"stage": "ppo"})
    artifact = publish(partial, tmp_path / "ppo")
    assert artifact.metrics().to_dict("list") == {"step": [1], "loss": [0.5]}
    assert artifact.samples().to_dict("list") == {"step": [1, 2], "response": ["a\u2028b", "c\x85"]}


def test_missing_jsonl_is_empty(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").write_text("")
    assert read_jsonl(tmp_path / "empty.jsonl") == []


# ------------------------------------------------------------------------------------------------------------ identity
def test_identity_is_the_model_alone(tmp_path):
    first = made(tmp_path / "a" / "sft", "w", card="one")
    again = made(tmp_path / "b" / "sft", "w", card="another card")
    other = made(tmp_path / "c" / "sft", "v", card="one")
    assert first.manifest["files"] != again.manifest["files"]
    assert first.hash == again.hash != other.hash


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *[("model/x", True), ("critic/x", True), ("adapter/x", True), ("critic_adapter/x", True)],
        *[("metrics.jsonl", False), ("samples.jsonl", False), ("model/README.md", False), ("tensorboard/e", False)],
    ],
)
def test_what_counts_for_identity(name, counts):
    assert (payload_hash({"model/w": "1", name: "2"}) != payload_hash({"model/w": "1", name: "3"})) == counts


def test_a_stage_without_model_is_identified_by_all_files():
    assert payload_hash({"report.md": "1"}) != payload_hash({"report.md": "2"})


# -------------------------------------------------------------------------------------------------------------- damage
FILES = ["metrics.jsonl", "model/README.md", "model/weights.bin"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty", "missing", "folder"])
def test_verify_finds_damage_of_every_file(tmp_path, name, damage):
    artifact = made(tmp_path / "sft", "weights of a model")
    path = artifact.path / name
    content = path.read_bytes()
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"flip": flipped, "truncate": content[:-1], "extend": content + b"x", "empty": b""}[damage])
    with pytest.raises(UserError, match=f"{name} is (damaged|missing).*FORCE=1"):
        Artifact.load(artifact.path).verify()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest["files"].pop("model/weights.bin"), "was changed"),
        (lambda manifest: manifest["files"].update({"model/weights.bin": "0" * 64}), "was changed"),
        (lambda manifest: manifest["reward_statistics"].update(mean=100.0), "was changed"),
        (lambda manifest: manifest.update(status="running"), "its status is 'running'"),
    ],
)
def test_verify_finds_a_manifest_that_was_changed(tmp_path, change, says):
    partial = begin(tmp_path / "reward", "w")
    finish(partial, {"stage": "reward", "status": "complete", "reward_statistics": {"mean": 0.5, "std": 2.0}})
    artifact = publish(partial, tmp_path / "reward")
    artifact.verify()
    change(artifact.manifest)
    write_json(artifact.path / "manifest.json", artifact.manifest)
    with pytest.raises(UserError, match=f"{says}.*FORCE=1"):
        Artifact.load(artifact.path).verify()


def test_verify_finds_a_file_that_loading_would_read(tmp_path):
    artifact = made(tmp_path / "sft", "w")
    (artifact.path / "notes.txt").write_text("mine")  # no model reads it
    artifact.verify()
    (artifact.path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model/adapter_config\.json is not of this stage"):
        artifact.verify()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "damaged"),
        ('{"schema_version": 1, "files"', "damaged"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "stage": "sft", "files": {}}', "no `payload_hash`"),
        (b"\xff\xfe", "damaged"),
        (None, r"no manifest\.json"),
    ],
)
def test_load_refuses_what_is_no_manifest(tmp_path, content, says):
    path = made(tmp_path / "sft", "w").path / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{says}.*FORCE=1"):
        Artifact.load(path.parent)


def test_load_of_nothing_says_which_stage_to_run(tmp_path):
    with pytest.raises(UserError, match="make sft"):
        Artifact.load(tmp_path / "sft")


# ----------------------------------------------------------------------------------------------------------- atomicity
def crash_at(monkeypatch, number: int, before: bool) -> list[tuple[str, str]]:
    """Die at the `number`-th change of the folder by `os.replace`, `shutil.rmtree` or `Path.unlink`."""
    calls: list[tuple[str, str]] = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append((name, str(args[0])))
            if len(calls) == number and before:
                raise Crash
            result = real(*args, **kwargs)
            if len(calls) == number:
                raise Crash
            return result

        monkeypatch.setattr(owner, name, call)

    wrap(artifacts.os, "replace")
    wrap(artifacts.shutil, "rmtree")
    wrap(Path, "unlink")
    return calls


def contents(directory: Path) -> str | None:
    """Weights of the artifact at `directory` if there is a whole one."""
    if not directory.exists():
        return None
    artifact = Artifact.load(directory)
    artifact.verify()
    return (artifact.model_dir / "weights.bin").read_text()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("old", "number"),
    [(True, number) for number in range(1, 8)] + [(False, number) for number in range(1, 7)],
    ids=lambda value: ("replacing" if value else "new") if isinstance(value, bool) else str(value),
)
def test_a_crash_leaves_old_or_new_and_recovery_finishes(tmp_path, monkeypatch, number, before, old):
    final = tmp_path / "run" / "sft"
    if old:
        made(final, "old")
    partial = begin(final, "new")
    with monkeypatch.context() as patched:
        calls = crash_at(patched, number, before)
        with pytest.raises(Crash):
            finish(partial, {"stage": "sft"})
            publish(partial, final)
    assert len(calls) == number
    assert contents(final) in (("old", "new", None) if old else ("new", None))
    written = (partial / "manifest.json").is_file() or contents(final) == "new"
    recover(final)
    if written:
        assert contents(final) == "new"
        assert names(final.parent) == ["sft"]
    else:  # the new one was never whole: what was there stays, and the training can be resumed
        assert contents(final) == ("old" if old else None)
        assert (partial / "checkpoints" / "step_1" / "state").read_text() == "state"
        assert (partial / "fingerprint.json").is_file()


def test_the_crash_tests_reach_every_step(tmp_path, monkeypatch):
    final = tmp_path / "run" / "sft"
    made(final, "old")
    partial = begin(final, "new")
    with monkeypatch.context() as patched:
        calls = crash_at(patched, 99, True)
        finish(partial, {"stage": "sft"})
        publish(partial, final)
    assert [name for name, _ in calls] == ["replace", "rmtree", "unlink", "rmtree", "replace", "replace", "rmtree"]


def test_recovery_puts_the_old_one_back(tmp_path):
    final = tmp_path / "sft"
    made(final, "old")
    final.rename(tmp_path / "sft.old")
    recover(final)
    assert contents(final) == "old" and names(tmp_path) == ["sft"]


def test_recovery_drops_an_old_one_whose_successor_stands(tmp_path):
    final = tmp_path / "sft"
    made(tmp_path / "sft.old", "old")
    made(final, "new")
    recover(final)
    assert contents(final) == "new" and names(tmp_path) == ["sft"]


def test_recovery_of_nothing_does_nothing(tmp_path):
    made(tmp_path / "sft", "w")
    recover(tmp_path / "sft")
    recover(tmp_path / "ppo")
    assert names(tmp_path) == ["sft"] and contents(tmp_path / "sft") == "w"


def test_write_json_leaves_the_old_file_when_it_dies(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": "你好"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "你好"\n}\n'

    def die(_: int) -> None:
        raise Crash

    monkeypatch.setattr(artifacts.os, "fsync", die)
    with pytest.raises(Crash):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "你好"}


def test_canonical_hash_ignores_the_order_of_keys():
    expected = hashlib.sha256('{"a": 1, "b": "é"}'.encode()).hexdigest()
    assert artifacts.sha256_json({"b": "é", "a": 1}) == artifacts.sha256_json({"a": 1, "b": "é"}) == expected


@pytest.mark.parametrize("line", [b'{"step": 1, "prom', b"[1]", b"\xff"])
def test_a_damaged_line_of_metrics_or_samples_is_named(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line)
    with pytest.raises(UserError, match=r"samples\.jsonl line 2: damaged"):
        read_jsonl(path)


def test_a_damaged_report_can_be_left_out_and_says_how_it_is_made_again(tmp_path):
    final = tmp_path / "run" / "reward"
    partial = partial_dir(final)
    partial.mkdir(parents=True)
    (partial / "report.json").write_text("{}")
    finish(partial, {"stage": "reward"})
    artifact = publish(partial, final)
    (final / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report\.json is damaged .*: `make report STAGE=reward` makes it again"):
        artifact.verify()
    artifact.verify(without=("report.json",))
