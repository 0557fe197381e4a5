"""run_stage: skip, rebuild, force, resume, refuse, warn, describe; and who writes."""

import errno
import json
import logging
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.status import status
from rlhf import stage as stage_module
from rlhf.artifacts import Artifact
from rlhf.errors import UserError
from rlhf.ppo.guards import BAD_BATCHES
from rlhf.stage import Stage, StageContext, differences, is_main_process, run_stage
from tests.builders import (
    CHAT_TEMPLATE,
    build_model,
    build_recipe,
    build_reward_artifact,
    build_sft_artifact,
    build_tokenizer,
    snapshot,
    write_data_recipe,
)


class Died(BaseException):
    """The process is killed inside `build`."""


class Toy:
    """A stage of text files that counts what happens to it."""

    def __init__(self, name: str = "sft", inputs: tuple[str, ...] = (), **fields) -> None:
        self.built: list[bool] = []  # `resumed` of each build
        self.checked = 0
        self.dies = False
        self.wrong: Exception | None = None
        self.stage = Stage(
            name,
            fields.pop("version", 1),
            inputs=lambda recipe: list(inputs),
            data=lambda recipe: [recipe.section(name).data],
            check=self.check,
            build=self.build,
        )

    def check(self, ctx: StageContext) -> None:
        self.checked += 1

    def build(self, ctx: StageContext) -> dict:
        self.built.append(ctx.resumed)
        (ctx.dir / "model").mkdir(exist_ok=True)
        (ctx.dir / "model" / "weights.bin").write_text(f"seed {ctx.seed}")
        if self.wrong:
            raise self.wrong
        (ctx.checkpoints / "step_1").mkdir(parents=True, exist_ok=True)
        (ctx.checkpoints / "step_1" / "state").write_text("state")
        if self.dies:
            raise Died
        return {"metrics": {"loss": 0.25}}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "artifacts"


@pytest.fixture
def recipe(tmp_path):
    return build_recipe(tmp_path)


def changed(recipe, **fields):
    """The recipe with other settings of sft."""
    return recipe.model_copy(update={"sft": recipe.sft.model_copy(update=fields)})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------- build, skip, rebuild
def test_manifest_says_what_made_it(root, recipe):
    artifact = run_stage(Toy().stage, recipe, root)
    manifest = artifact.manifest
    assert artifact.path == root / "toy" / "sft"
    assert names(root / "toy") == ["sft"] and names(artifact.path) == ["manifest.json", "model"]
    assert (manifest["stage"], manifest["run"], manifest["status"], manifest["seed"]) == ("sft", "toy", "complete", 0)
    assert manifest["recipe"]["sft"]["max_length"] == 48 and len(manifest["recipe_hash"]) == 64
    assert manifest["metrics"] == {"loss": 0.25} and manifest["inputs"] == {}
    assert {"torch", "transformers", "python"} <= set(manifest["packages"])
    assert {"git_commit", "hardware", "wall_seconds", "peak_memory_gib", "fingerprint", "files"} <= set(manifest)
    artifact.verify()


def test_run_name_decides_the_folder(root, recipe):
    assert run_stage(Toy().stage, recipe, root, run="other").path == root / "other" / "sft"


def test_unchanged_stage_is_skipped_with_one_line(root, recipe, caplog):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    before = snapshot(root)
    with caplog.at_level(logging.INFO, "rlhf.stage"):
        caplog.clear()
        again = run_stage(toy.stage, recipe, root)
    assert toy.built == [False] and toy.checked == 1
    assert [r.getMessage() for r in caplog.records] == [f"{again.path}: unchanged, skipped (FORCE=1 redoes it)"]
    assert snapshot(root) == before


def test_a_data_recipe_of_a_later_stage_that_is_not_there_is_said_before_this_one_trains(root, tmp_path, caplog):
    recipe = build_recipe(tmp_path, ppo={"data": "no_such_prompts"}, sft={"data": "no_such_texts"})
    run_stage(Toy("reward").stage, recipe, root)  # not that of an earlier one: what it made may come from elsewhere
    (said,) = [r.getMessage() for r in caplog.records if ".data: " in r.getMessage()]
    assert "'no_such_prompts' does not exist" in said and said.endswith("the stage ppo will stop there")


def test_status_finds_changed_bytes_where_it_is_asked_to(root, recipe):
    artifact = run_stage(Toy().stage, recipe, root)
    name = next(name for name in artifact.manifest["files"] if name.startswith("model/"))
    with open(artifact.path / name, "ab") as file:
        file.write(b" ")
    assert "complete in" in status(root)[0]
    assert f"damaged: artifact {artifact.path}: {name} is damaged (sha256" in status(root, verify=True)[0]


def test_status_of_an_interrupted_stage_beside_a_finished_one(root, recipe):
    artifact = run_stage(Toy().stage, recipe, root)
    artifact.path.with_name("sft.partial").mkdir()
    assert status(root)[1].endswith("the finished one beside it stays in use: FORCE=1 makes it again")


def test_a_name_longer_than_a_file_system_takes_is_refused(root, recipe):
    with pytest.raises(UserError, match=r"--run xxxx.*300 bytes long, allowed are 200: shorten it"):
        run_stage(Toy().stage, recipe, root, run="x" * 300)


def test_a_stage_that_lost_a_file_of_its_model_is_made_again(root, recipe, caplog):
    toy = Toy()
    artifact = run_stage(toy.stage, recipe, root)
    lost = next(name for name in artifact.manifest["files"] if name.startswith("model/"))
    (artifact.path / lost).unlink()
    assert artifact.missing() == [lost]
    assert status(root) == [f"toy/sft        damaged: {lost} is missing; run the stage again"]
    with caplog.at_level(logging.INFO, "rlhf.stage"):
        again = run_stage(toy.stage, recipe, root)
    assert f"rebuilding, because {lost} is missing" in caplog.text and len(toy.built) == 2
    again.verify()
    run_stage(toy.stage, recipe, root)
    assert len(toy.built) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: changed(r, max_length=40), "section.max_length 48 -> 40"),
        (lambda r: changed(r, seed=7), "seed 0 -> 7"),
        (lambda r: r.model_copy(update={"seed": 3}), "seed 0 -> 3"),
        (lambda r: r.model_copy(update={"model": r.model.model_copy(update={"revision": "v2"})}), "model.revision"),
        (lambda r: changed(r, trainer={"max_steps": 2}), "section.trainer.max_steps 1 -> 2"),
    ],
    ids=["section", "own seed", "seed", "model", "trainer"],
)
def test_changed_stage_is_rebuilt_with_the_reason(root, recipe, caplog, change, reason):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    with caplog.at_level(logging.INFO, "rlhf.stage"):
        run_stage(toy.stage, change(recipe), root)
    assert toy.built == [False, False]
    assert any("rebuilding, because" in r.getMessage() and reason in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.model_copy(update={"description": "other words"}),
        lambda r: r.model_copy(update={"ppo": None, "evaluate": None}),
        lambda r: r.model_copy(update={"logging": r.logging.model_copy(update={"samples": 3})}),
        lambda r: r.model_copy(update={"hardware": r.hardware.model_copy(update={"device": "auto"})}),
    ],
    ids=["description", "other stages", "logging", "device"],
)
def test_what_does_not_decide_the_result_rebuilds_nothing(root, recipe, change):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    run_stage(toy.stage, change(recipe), root)
    assert toy.built == [False]


def test_other_data_rebuilds(root, recipe, tmp_path):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    write_data_recipe(tmp_path, "sft", rows=28)
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False, False]


def test_other_version_of_the_stage_rebuilds(root, recipe):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    run_stage(replace(toy.stage, version=2), recipe, root)
    assert toy.built == [False, False]


def test_other_input_rebuilds_and_another_card_does_not(root, recipe):
    toy = Toy("reward", inputs=("sft",))
    first = build_sft_artifact(root, recipe=recipe)
    assert run_stage(toy.stage, recipe, root).manifest["inputs"] == {"sft": first.hash}
    sft = root / "toy" / "sft"
    (sft / "model" / "README.md").unlink()
    manifest = json.loads((sft / "manifest.json").read_text())
    del manifest["files"]["model/README.md"]
    (sft / "manifest.json").write_text(json.dumps(manifest))
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False]
    (sft / "manifest.json").unlink()
    for path in sorted(sft.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    sft.rmdir()
    build_sft_artifact(root, model=build_model(build_tokenizer(), seed=9), recipe=recipe)
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False, False]


def test_the_old_one_stands_until_the_new_one_is_whole(root, recipe):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    old = snapshot(root / "toy" / "sft")
    toy.dies = True
    with pytest.raises(Died):
        run_stage(toy.stage, changed(recipe, seed=1), root)
    assert snapshot(root / "toy" / "sft") == old
    Artifact.load(root / "toy" / "sft").verify()
    toy.dies = False
    new = run_stage(toy.stage, changed(recipe, seed=1), root)
    assert (new.model_dir / "weights.bin").read_text() == "seed 1"
    assert names(root / "toy") == ["sft"]


def test_force_redoes_an_unchanged_stage(root, recipe):
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    run_stage(toy.stage, recipe, root, force=True)
    assert toy.built == [False, False] and names(root / "toy") == ["sft"]


# ------------------------------------------------------------------------------------------------------- interruptions
def interrupt(toy: Toy, recipe, root) -> None:
    toy.dies = True
    with pytest.raises(Died):
        run_stage(toy.stage, recipe, root)
    toy.dies = False


def test_an_interrupted_stage_resumes_where_it_was(root, recipe):
    toy = Toy()
    interrupt(toy, recipe, root)
    assert names(root / "toy") == ["sft.partial"]
    partial = root / "toy" / "sft.partial"
    (partial / "metrics.jsonl").write_text("of the first attempt")
    (partial / "manifest.json.tmp").write_text("half a man")  # killed while it was written
    (partial / BAD_BATCHES).mkdir()
    (partial / BAD_BATCHES / "step_1.json").write_text("{}")
    artifact = run_stage(toy.stage, recipe, root)
    assert toy.built == [False, True]
    assert (artifact.path / "metrics.jsonl").read_text() == "of the first attempt"
    assert sorted(artifact.manifest["files"]) == [f"{BAD_BATCHES}/step_1.json", "metrics.jsonl", "model/weights.bin"]
    assert names(root / "toy") == ["sft"]


def test_an_interrupted_stage_without_a_checkpoint_starts_clean(root, recipe):
    """The evaluate stage has none; rows that it appends must not be there twice."""
    toy = Toy()
    interrupt(toy, recipe, root)
    partial = root / "toy" / "sft.partial"
    shutil.rmtree(partial / "checkpoints")
    (partial / "samples.jsonl").write_text("a row")
    artifact = run_stage(toy.stage, recipe, root)
    assert sorted(artifact.manifest["files"]) == ["model/weights.bin"]


def test_while_a_stage_runs_a_second_one_is_refused(root, recipe, monkeypatch):
    toy = Toy()
    refused = []

    def build(ctx):
        with pytest.raises(UserError) as error:
            run_stage(Toy().stage, recipe, root)
        refused.append(str(error.value))
        return {}

    assert run_stage(replace(toy.stage, build=build), recipe, root)
    assert len(refused) == 1 and f"process {os.getpid()} on {socket.gethostname()} is building it" in refused[0]
    assert names(root / "toy") == ["sft"]


def test_an_input_that_vanishes_while_the_stage_runs_is_named(root, recipe):
    run_stage(Toy().stage, recipe, root)
    toy = Toy("reward", inputs=("sft",))

    def build(ctx):
        (ctx.checkpoints / "step_1").mkdir(parents=True)
        (ctx.checkpoints / "step_1" / "state").write_text("state")
        shutil.rmtree(ctx.inputs["sft"].path)
        (ctx.inputs["sft"].model_dir / "weights.bin").read_text()

    with pytest.raises(UserError, match=r"reward: its input .*toy/sft vanished .* run reward again to continue"):
        run_stage(replace(toy.stage, build=build), recipe, root)
    assert (root / "toy" / "reward.partial" / "checkpoints" / "step_1" / "state").read_text() == "state"


@pytest.mark.parametrize(
    ("words", "number"),
    [("I/O error: Permission denied (os error 13)", errno.EACCES), ("Read-only file system", errno.EROFS)],
)
def test_a_library_s_error_of_a_read_only_folder_becomes_what_it_is(root, recipe, words, number):
    toy = Toy()
    toy.wrong = RuntimeError(words)
    with pytest.raises(OSError) as error:
        run_stage(toy.stage, recipe, root)
    assert error.value.errno == number


def test_a_partial_of_another_recipe_is_refused_and_force_discards_it(root, recipe):
    toy = Toy()
    interrupt(toy, recipe, root)
    before = snapshot(root)
    with pytest.raises(UserError, match=r"sft\.partial.*section\.max_length 48 -> 40.*FORCE=1"):
        run_stage(toy.stage, changed(recipe, max_length=40), root)
    assert snapshot(root) == before and toy.built == [False]
    (root / "toy" / "sft.partial" / "notes").write_text("stale")
    artifact = run_stage(toy.stage, changed(recipe, max_length=40), root, force=True)
    assert toy.built == [False, False] and names(artifact.path) == ["manifest.json", "model"]


def test_a_partial_without_a_checkpoint_does_not_block_another_recipe(root, recipe):
    """The evaluate stage has none: what failed there must not forbid the corrected command."""
    toy = Toy()
    interrupt(toy, recipe, root)
    shutil.rmtree(root / "toy" / "sft.partial" / "checkpoints")
    artifact = run_stage(toy.stage, changed(recipe, max_length=40), root)
    assert toy.built == [False, False] and names(artifact.path) == ["manifest.json", "model"]


def test_a_partial_that_died_at_birth_is_begun_again(root, recipe):
    folder = root / "toy" / "sft.partial"
    folder.mkdir(parents=True)
    (folder / "fingerprint.json").write_text('{"sta')
    toy = Toy()
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False] and names(root / "toy") == ["sft"]


def test_bad_input_inside_build_leaves_nothing(root, recipe):
    toy = Toy()
    toy.wrong = UserError("no rows left")
    with pytest.raises(UserError, match="no rows left"):
        run_stage(toy.stage, recipe, root)
    assert names(root / "toy") == []


def test_bad_input_after_a_checkpoint_keeps_it(root, recipe):
    toy = Toy()
    interrupt(toy, recipe, root)
    toy.wrong = UserError("value 0 is nan")
    with pytest.raises(UserError):
        run_stage(toy.stage, recipe, root)
    assert (root / "toy" / "sft.partial" / "checkpoints" / "step_1" / "state").is_file()
    toy.wrong = None
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False, True, True]


def test_a_crash_between_whole_and_published_costs_nothing(root, recipe, monkeypatch):
    toy = Toy()
    with monkeypatch.context() as patched:
        patched.setattr(stage_module, "publish", lambda *_: (_ for _ in ()).throw(Died()))
        with pytest.raises(Died):
            run_stage(toy.stage, recipe, root)
    assert names(root / "toy") == ["sft.partial"]
    artifact = run_stage(toy.stage, recipe, root)
    assert toy.built == [False], "it was whole already"
    assert names(artifact.path) == ["manifest.json", "model"] and names(root / "toy") == ["sft"]


def test_a_crash_while_the_manifest_is_written_resumes(root, recipe, monkeypatch):
    toy = Toy()
    with monkeypatch.context() as patched:
        patched.setattr(stage_module, "finish", lambda *_: (_ for _ in ()).throw(Died()))
        with pytest.raises(Died):
            run_stage(toy.stage, recipe, root)
    run_stage(toy.stage, recipe, root)
    assert toy.built == [False, True]


# ------------------------------------------------------------------------------------------------------------- inputs
def test_damaged_input_is_found_before_anything_runs(root, recipe):
    sft = build_sft_artifact(root, recipe=recipe)
    path = sft.model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    toy = Toy("reward", inputs=("sft",))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        run_stage(toy.stage, recipe, root)
    assert (toy.checked, toy.built) == (0, []) and names(root / "toy") == ["sft"]


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [({"vocab_size": 270}, "its tokenizer"), ({"chat_template": CHAT_TEMPLATE}, "its chat template")],
    ids=["tokenizer", "template"],
)
def test_inputs_must_speak_the_same_tokens(root, recipe, tokenizer, says):
    build_sft_artifact(root, recipe=recipe)
    build_reward_artifact(root, tokenizer=build_tokenizer(**tokenizer), recipe=recipe)
    toy = Toy("ppo", inputs=("sft", "reward"))
    with pytest.raises(UserError, match=f"artifact reward: {says}"):
        run_stage(toy.stage, recipe, root)
    assert toy.built == []


def test_an_input_may_be_a_path(root, recipe, tmp_path):
    elsewhere = build_sft_artifact(tmp_path / "elsewhere")
    toy = Toy("reward", inputs=(str(elsewhere.path),))
    assert run_stage(toy.stage, recipe, root).manifest["inputs"] == {str(elsewhere.path): elsewhere.hash}


def test_stale_input_warns_and_still_runs(root, recipe, caplog):
    build_sft_artifact(root, recipe=recipe)
    toy = Toy("reward", inputs=("sft",))
    run_stage(toy.stage, changed(recipe, max_length=40), root)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "input sft (max_length 48 -> 40) was built with other settings than this recipe's",
    ]
    assert toy.built == [False]


def test_a_reward_model_of_an_earlier_sft_warns(root, recipe, caplog):
    build_sft_artifact(root, recipe=recipe)
    build_reward_artifact(root, recipe=recipe)
    shutil.rmtree(root / "toy" / "sft")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other = build_model(build_tokenizer())
    with torch.no_grad():
        other.transformer.wte.weight += 1
    build_sft_artifact(root, recipe=recipe, model=other)
    toy = Toy("ppo", inputs=("sft", "reward"))
    run_stage(toy.stage, recipe, root)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings[-1] == "input reward: it was made from another sft than the one that is there now: redo it"


def test_fresh_input_and_input_of_another_recipe_do_not_warn(root, recipe, caplog):
    build_sft_artifact(root, recipe=recipe)
    build_reward_artifact(root, recipe=recipe)
    toy = Toy("ppo", inputs=("sft", "reward"))
    run_stage(toy.stage, recipe.model_copy(update={"reward": None}), root)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert toy.built == [False]


# ------------------------------------------------------------------------------------------------------------- dry run
def test_dry_run_says_everything_and_writes_nothing(root, recipe, tmp_path, caplog):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    build_sft_artifact(root, recipe=recipe)
    before = snapshot(tmp_path)
    toy = Toy("reward", inputs=("sft",))
    with caplog.at_level(logging.INFO, "rlhf"):
        caplog.clear()
        assert run_stage(toy.stage, recipe, root, dry_run=True) is None
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert "resolved recipe:" in said and "normalize_samples: 4" in said and "vf_coef: 0.1" in said
    assert "fingerprint: " in said
    assert f"{root / 'toy' / 'reward'} would be built" in said
    assert "memory: reward: 0.0 M parameters" in said and "GiB per device" in said
    assert snapshot(tmp_path) == before and toy.built == [] and names(root / "toy") == ["sft"]


@pytest.mark.parametrize(("device", "each"), [("cuda", 2), ("cpu", 4)])
def test_dry_run_counts_the_cache_of_sampling(root, tmp_path, caplog, device, each):
    ppo = {"rollout_batch_size": 65536, "mini_batch_size": 65536, "total_episodes": 65536, "max_prompt_length": 960}
    ppo |= {"response_length": 64, "generation_slots": 32768}
    recipe = build_recipe(tmp_path, ppo=ppo, hardware={"device": device})
    config = build_model(build_tokenizer()).config
    build_sft_artifact(root, recipe=recipe)
    build_reward_artifact(root, recipe=recipe)
    with caplog.at_level(logging.INFO, "rlhf"):
        run_stage(Toy("ppo", inputs=("sft", "reward")).stage, recipe, root, dry_run=True)
    said = "\n".join(r.getMessage() for r in caplog.records)
    gib = 32768 * 1024 * 2 * config.n_layer * config.n_embd * each / 2**30
    assert f"cache of sampling {gib:.2f} GiB" in said and gib > 0.005


@pytest.mark.parametrize("plan", ["built", "skipped: unchanged", "rebuilt", "resumed"])
def test_dry_run_tells_the_plan(root, recipe, tmp_path, caplog, plan):
    build_model(build_tokenizer()).save_pretrained(tmp_path / "base")
    toy = Toy()
    if plan == "resumed":
        interrupt(toy, recipe, root)
    elif plan != "built":
        run_stage(toy.stage, changed(recipe, seed=1) if plan == "rebuilt" else recipe, root)
    before = snapshot(tmp_path)
    with caplog.at_level(logging.INFO, "rlhf"):
        run_stage(toy.stage, recipe, root, dry_run=True)
    assert f"{root / 'toy' / 'sft'} would be {plan}" in [r.getMessage() for r in caplog.records]
    assert snapshot(tmp_path) == before


def test_dry_run_works_before_the_inputs_exist(root, recipe, tmp_path, caplog):
    build_model(build_tokenizer()).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, "rlhf"):
        run_stage(Toy("reward", inputs=("sft",)).stage, recipe, root, dry_run=True)
    assert f"input {root / 'toy' / 'sft'}: not built yet" in [r.getMessage() for r in caplog.records]
    assert not root.exists()


def test_dry_run_without_the_base_model_is_one_error(root, recipe):
    with pytest.raises(UserError, match=r"base: cannot be loaded .*model\.base"):
        run_stage(Toy().stage, recipe, root, dry_run=True)


# ----------------------------------------------------------------------------------------------------------- processes
class OtherRank:
    is_main_process = False

    def wait_for_everyone(self) -> None:
        pass


def test_other_ranks_write_nothing(root, recipe, monkeypatch):
    published = run_stage(Toy().stage, recipe, root)
    before = snapshot(root)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage_module, "_process_state", lambda recipe: OtherRank())
    seen = []
    silent = replace(Toy().stage, build=lambda ctx: seen.append(ctx.seed) or {})
    assert not is_main_process()
    again = run_stage(silent, changed(recipe, seed=4), root)
    assert seen == [4] and again.manifest == published.manifest and snapshot(root) == before


def test_other_ranks_do_not_recover(root, recipe, monkeypatch):
    run_stage(Toy().stage, recipe, root)
    (root / "toy" / "sft.old").mkdir()
    monkeypatch.setenv("RANK", "1")
    run_stage(Toy().stage, recipe, root)
    assert names(root / "toy") == ["sft", "sft.old"]
    monkeypatch.setenv("RANK", "0")
    run_stage(Toy().stage, recipe, root)
    assert names(root / "toy") == ["sft"]


def test_rank_comes_from_the_environment(monkeypatch):
    assert "RANK" not in os.environ and is_main_process()
    monkeypatch.setenv("RANK", "2")
    assert not is_main_process()


# --------------------------------------------------------------------------------------------------------- differences
@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a 1 -> 2"]),
        ({"a": {"b": [1], "c": None}}, {"a": {"b": [2], "c": None}}, ["a.b [1] -> [2]"]),
        ({"a": 1}, {"b": 1}, ["a 1 -> null", "b null -> 1"]),
        ({"a": "x" * 60}, {"a": "y"}, ['a "' + "x" * 36 + '... -> "y"']),
        ({"a": 1}, {"a": {"b": 1}}, ['a 1 -> {"b": 1}']),
    ],
)
def test_differences_name_each_changed_leaf(old, new, lines):
    assert differences(old, new) == lines
