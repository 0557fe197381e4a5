"""Bad input ends in one line (what, where, the value seen, what to do), exit code 2, and nothing half-written."""

import errno
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cli import less_waste, main
from rlhf.artifacts import Artifact
from rlhf.models import tokenizer_identity
from rlhf.stage import StageContext, fingerprint, load_inputs
from tests.builders import (
    CHAT_TEMPLATE,
    build_model,
    build_recipe,
    build_reward_artifact,
    build_sft_artifact,
    build_tokenizer,
    snapshot,
    write_data_recipe,
    write_recipe,
)

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "pretrain": "rlhf.pretrain",
    "sft": "rlhf.sft",
    "reward": "rlhf.reward.train",
    "ppo": "rlhf.ppo.stage",
    "evaluate": "rlhf.evaluation.stage",
}
WEIGHTS = "model/model.safetensors"
FORCE = "FORCE=1"


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: of the test.
        says: what the line must contain: key or place, value seen, remedy.
        overrides: on the command line; further options too.
        stage: the stage that is run.
        recipe: sections of the recipe that differ from the toy recipe's; a str is the whole file's text.
        prepare: spoils what lies in the working directory.
        recipe_name: what `--recipe` gets.
    """

    name: str
    says: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    stage: str = "ppo"
    recipe: dict[str, Any] | str | None = None
    prepare: Callable[[pytest.MonkeyPatch], None] | None = None
    recipe_name: str = "toy.yaml"


# ----------------------------------------------------------------------------------------------- what spoils the inputs
def remove(*paths: str) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(_: pytest.MonkeyPatch) -> None:
        for path in paths:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return spoil


def cut(path: str, keep: float) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(_: pytest.MonkeyPatch) -> None:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(len(content) * keep)])

    return spoil


def flip_last_byte(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(_: pytest.MonkeyPatch) -> None:
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(bytes(content))

    return spoil


def other_schema(_: pytest.MonkeyPatch) -> None:
    path = Path("artifacts/toy/sft/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))


def pad_is_eos(_: pytest.MonkeyPatch) -> None:
    shutil.rmtree("artifacts/toy/sft")
    tokens = tokenizer_identity(build_tokenizer()) | {"pad_id": 2, "eos_id": 2}
    build_sft_artifact(Path("artifacts"), recipe=build_recipe(Path()), manifest={"tokenizer": tokens})


def reward_with(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(_: pytest.MonkeyPatch) -> None:
        shutil.rmtree("artifacts/toy/reward")
        build_reward_artifact(Path("artifacts"), tokenizer=build_tokenizer(**changes), recipe=build_recipe(Path()))

    return spoil


def data(kind: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda _: write_data_recipe(Path(), kind, **changes) and None


def no_package(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    find = importlib.util.find_spec

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))

    return spoil


def rules(_: pytest.MonkeyPatch) -> None:
    Path("toy_rules.py").write_text(
        "LIMIT = 3\n\ndef short(prompts, responses):\n    return [0.0]\n\n"
        "def nan(prompts, responses):\n    return [float('nan')] * len(prompts)\n"
    )


def interrupted(_: pytest.MonkeyPatch) -> None:
    """A `.partial` that was begun with another kl_coef."""
    ctx = StageContext(importlib.import_module(MODULES["ppo"]).STAGE, build_recipe(Path()), Path("artifacts"), "toy")
    load_inputs(ctx)
    started = fingerprint(ctx.stage, ctx)
    started["section"]["kl_coef"] = 0.9
    (ctx.checkpoints / "step_000001").mkdir(parents=True)
    (ctx.checkpoints / "step_000001" / "state").write_text("precious")
    (ctx.dir / "fingerprint.json").write_text(json.dumps(started))


def disk_full(writer: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The last file of the stage does not fit."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        import rlhf.stage

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

        monkeypatch.setattr(rlhf.stage, writer, fail)

    return spoil


def disk_full_in_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)


def memory_full(where: str, error: type[BaseException], text: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A step of training needs more than there is."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error(text)

        monkeypatch.setattr(where, fail)
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # of this shell: it may be told already
            monkeypatch.delenv(name, raising=False)

    return spoil


GPU_FULL = (
    "CUDA out of memory. Tried to allocate 144.00 MiB. GPU 0 has a total capacity of 23.68 GiB of which 11.50 MiB is "
    "free. Including non-PyTorch memory, this process has 23.66 GiB memory in use. If reserved memory is large try ..."
)
RECORDING = "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the manual.\nCompile with `TORCH_USE"


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake is to be found before any model is loaded."""
    from transformers import PreTrainedModel

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)


def in_world_of(size: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setenv("WORLD_SIZE", str(size))


def both(*steps: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        for step in steps:
            step(monkeypatch)

    return spoil


SFT_DIR, REWARD_DIR = "artifacts/toy/sft", "artifacts/toy/reward"
NO_MODEL = remove("artifacts")
TWO_POLICIES = "evaluate.policies=[{artifact: sft}, {artifact: sft, best_of: 2}]"
RAW = "pretrain={data: [prompts.yaml], trainer: {%s}}"


def trainer_cases() -> list[Case]:
    """Values that TRL takes as they are, and fails with once the model is there."""
    bad = {
        "per_device_train_batch_size=0": "greater than or equal to 1",
        "per_device_eval_batch_size=0": "greater than or equal to 1",
        "gradient_accumulation_steps=0": "greater than or equal to 1",
        "eval_accumulation_steps=0": "greater than or equal to 1",
        "learning_rate=-1": "greater than or equal to 0",
        "learning_rate=.nan": "finite number",
        "adam_beta2=1.0": "less than 1",
        "adam_epsilon=-1e-8": "greater than or equal to 0",
        "dataloader_num_workers=-1": "greater than or equal to 0",
        "save_total_limit=-1": "greater than or equal to 0",
        "logging_steps=0": "greater than 0",
        "max_steps=-5": "greater than or equal to -1",
        "lr_scheduler_type=foo": "select one of ['linear'",
        "lr_scheduler_kwargs={min: 1}": "unexpected keyword argument 'min'",
        "optim=adam": "select one of ['adamw_torch'",
        "optim=galore_adamw": "install `galore_torch`",
    }
    cases = []
    for number, (setting, remedy) in enumerate(bad.items()):
        stage = ("sft", "reward")[number % 2]
        says = (f"{stage}.trainer", remedy)
        cases.append(Case(f"{stage}.trainer.{setting}", says, (f"{stage}.trainer.{setting}",), stage, prepare=no_model))
    return cases


CASES = [
    # ------------------------------------------------------------------------------------------------- the recipe
    Case("unknown recipe", ("--recipe tinny", "did you mean 'tiny'"), recipe_name="tinny"),
    Case("missing recipe file", ("--recipe no/x.yaml", "no such file", "tiny"), recipe_name="no/x.yaml"),
    Case("unknown key", ("ppo.kl_coeff", "unknown key", "did you mean 'kl_coef'"), recipe={"ppo": {"kl_coeff": 0.1}}),
    Case("unknown section", ("pppo", "unknown key", "did you mean 'ppo'"), ("pppo.kl_coef=1",)),
    Case("wrong type", ("ppo.num_ppo_epochs", "'two'", "must be a valid integer"), ("ppo.num_ppo_epochs=two",)),
    Case("number in quotes", ("ppo.kl_coef", "'0.1'", "valid number"), recipe={"ppo": {"kl_coef": "0.1"}}),
    Case("out of range", ("ppo.gamma", "1.5", "less than or equal to 1"), ("ppo.gamma=1.5",)),
    Case("not a number", ("ppo.kl_coef", "nan", "finite number"), ("ppo.kl_coef=.nan",)),
    Case("unknown choice", ("ppo.kl_estimator", "'k4'", "'k1', 'k2' or 'k3'"), ("ppo.kl_estimator=k4",)),
    Case("missing key", ("sft.data", "required"), recipe={"sft": {"data": None}} | {}, overrides=("sft={}",)),
    Case("duplicate key", ("toy.yaml line 3", "'seed'", "keep one"), recipe="name: toy\nseed: 1\nseed: 2\n"),
    Case("broken YAML", ("toy.yaml line 3", "expected ',' or '}'"), recipe="name: toy\nppo: {kl_coef: 0.1\n"),
    Case("seed too large", ("ppo.seed", "99999999999", "4294967295"), ("ppo.seed=99999999999",), prepare=no_model),
    Case(
        "two judges of one name",
        ("evaluate", "judges are named ['judge', 'judge']", "its own `name`"),
        ("evaluate.judges=[{vader: true}, {vader: true}]",),
        "evaluate",
        prepare=no_model,
    ),
    Case(
        "judge of a reward source's name",
        ("a judge is named reward, as a source of ppo.rewards is", "another name"),
        ("evaluate.judges=[{name: reward, vader: true}]",),
        prepare=no_model,
    ),
    Case("run in the place of the data sets", ("--run 'data'", "take another name"), ("--run", "data"), "sft"),
    Case("list for a recipe", ("toy.yaml", "['sft']", "write `key: value` lines"), recipe="- sft\n"),
    Case(
        "override cut by the shell",
        ("ppo.rewards", "'[{function:'", "quote it for the shell"),
        ("ppo.rewards=[{function:",),
    ),
    Case("override without value", ("'ppo.kl_coef'", "section.key=value"), ("ppo.kl_coef",)),
    Case("override through a number", ("ppo.kl_coef", "0.3", "check the path"), ("ppo.kl_coef=0.3", "ppo.kl_coef.x=1")),
    Case(
        "override past a list's end",
        ("ppo.rewards.3.weight", "'3'", "use 0..0"),
        ("ppo.rewards=[{artifact: reward}]", "ppo.rewards.3.weight=1"),
    ),
    Case("unknown option", ("--frobnicate", "--help"), ("--frobnicate",)),
    Case("option without value", ("--run", "expected one argument"), ("--run",)),
    Case(
        "mini-batch above rollout",
        ("ppo", "mini_batch_size 8", "rollout_batch_size 4", "lower"),
        ("ppo.mini_batch_size=8",),
    ),
    Case(
        "mini-batch does not divide",
        ("mini_batch_size 3", "rollout_batch_size 4", "divide"),
        ("ppo.mini_batch_size=3",),
    ),
    Case(
        "no whole step", ("total_episodes 3", "rollout_batch_size 4", "raise total_episodes"), ("ppo.total_episodes=3",)
    ),
    Case("nothing to adapt", ("kl_target", "it is 0", "set kl_coef"), ("ppo.kl_target=6", "ppo.kl_coef=0")),
    Case(
        "horizon under one step",
        ("kl_horizon 1 is too short", "rollout_batch_size"),
        ("ppo.kl_target=6", "ppo.kl_horizon=1", "ppo.rollout_batch_size=8", "ppo.total_episodes=8"),
    ),
    Case(
        "heads do not divide",
        ("n_embd 30", "n_head 4", "pick n_head"),
        ("pretrain={data: [x], architecture: {n_embd: 30}}",),
    ),
    Case("no section", ("recipe toy", "`reward`", "add one"), recipe={"reward": None}, stage="reward"),
    Case("two bases", ("model.base", "pretrain.architecture"), ("pretrain={data: [x], architecture: {}}",)),
    Case("evaluate without ppo", ("`evaluate`", "add a `ppo` section"), recipe={"ppo": None}, stage="evaluate"),
    Case(
        "two reward sources in one",
        ("exactly one", "`artifact`"),
        ("ppo.rewards=[{artifact: reward, function: 'a:b'}]",),
    ),
    # -------------------------------------------------------------------------------- what is passed to the libraries
    Case(
        "unknown key of TRL",
        ("sft.trainer.learning_rat", "did you mean 'learning_rate'"),
        ("sft.trainer.learning_rat=1",),
        "sft",
    ),
    Case(
        "reserved key of TRL",
        ("sft.trainer.output_dir", "'x'", "artifact directory"),
        ("sft.trainer.output_dir=x",),
        "sft",
    ),
    Case(
        "wrong type for TRL",
        ("reward.trainer.max_steps", "'many'", "integer"),
        ("reward.trainer.max_steps=many",),
        "reward",
    ),
    Case("quoted number for TRL", ("sft.trainer.max_steps", "'10'", "integer"), ("sft.trainer.max_steps='10'",), "sft"),
    Case(
        "value that TRL refuses",
        ("sft.trainer", "SFTConfig refuses", "sometimes"),
        ("sft.trainer.save_strategy=sometimes",),
        "sft",
    ),
    *trainer_cases(),
    Case(
        "evaluation of sft without rows",
        ("sft.trainer.eval_strategy", "'steps'", "name sft.eval_split"),
        ("sft.trainer.eval_strategy=steps", "sft.eval_split=null"),
        "sft",
        prepare=no_model,
    ),
    Case(
        "evaluation of pretrain",
        ("pretrain.trainer.eval_strategy", "'epoch'", "leave it out"),
        (RAW % "eval_strategy: epoch",),
        "pretrain",
        prepare=no_model,
    ),
    Case(
        "batch of pretrain",
        ("pretrain.trainer.per_device_train_batch_size", "0", "greater than or equal to 1"),
        (RAW % "per_device_train_batch_size: 0",),
        "pretrain",
        prepare=no_model,
    ),
    Case(
        "unknown key of the stage that follows pretrain",
        ("sft.trainer.learning_rat", "did you mean 'learning_rate'"),
        (RAW % "max_steps: 1", "pretrain.block_size=32", "sft.trainer.learning_rat=1"),
        "pretrain",
        prepare=no_model,
    ),
    Case(
        "data of the stage that follows pretrain",
        ("data recipe 'nosuch'", "does not exist", "known: "),
        (RAW % "max_steps: 1", "pretrain.block_size=32", "sft.data=nosuch"),
        "pretrain",
        prepare=no_model,
    ),
    Case(
        "tracker not installed",
        ("logging.report_to", "wandb", "pip install wandb"),
        ("logging.report_to=[wandb]",),
        prepare=no_package("wandb"),
    ),
    # ---------------------------------------------------------------------------------------------------- artifacts
    Case("sft not run", ("stage ppo", SFT_DIR, "make sft"), prepare=remove(SFT_DIR)),
    Case("reward not run", ("stage ppo", REWARD_DIR, "make reward"), prepare=remove(REWARD_DIR)),
    Case("reward before sft", ("stage reward", SFT_DIR, "make sft"), stage="reward", prepare=NO_MODEL),
    Case("artifact without manifest", (SFT_DIR, "no manifest.json", FORCE), prepare=remove(f"{SFT_DIR}/manifest.json")),
    Case(
        "truncated manifest", (SFT_DIR, "manifest.json is damaged", FORCE), prepare=cut(f"{SFT_DIR}/manifest.json", 0.5)
    ),
    Case("manifest of another schema", (SFT_DIR, "schema_version 99", "reads 1", FORCE), prepare=other_schema),
    Case(
        "flipped bit", (REWARD_DIR, f"{WEIGHTS} is damaged", FORCE), prepare=flip_last_byte(f"{REWARD_DIR}/{WEIGHTS}")
    ),
    Case("truncated weights", (SFT_DIR, f"{WEIGHTS} is damaged", FORCE), prepare=cut(f"{SFT_DIR}/{WEIGHTS}", 0.9)),
    Case(
        "missing file",
        (SFT_DIR, "model/tokenizer.json is missing", FORCE),
        prepare=remove(f"{SFT_DIR}/model/tokenizer.json"),
    ),
    Case("pad is EOS", ("artifact sft", "pad and eos are both token 2", "model.pad_token"), prepare=pad_is_eos),
    Case("other tokenizer", ("artifact reward", "its tokenizer", "redo reward"), prepare=reward_with(vocab_size=270)),
    Case(
        "other chat template",
        ("artifact reward", "its chat template", "redo reward"),
        prepare=reward_with(chat_template=CHAT_TEMPLATE),
    ),
    Case(
        "sft named as reward",
        ("ppo.rewards", "sft is no reward model", "name a `reward` stage"),
        ("ppo.rewards=[{artifact: sft}]",),
    ),
    Case("path without artifact", ("no/such", "not there", "check the path"), ("ppo.rewards=[{artifact: no/such}]",)),
    Case("interrupted with other settings", ("ppo.partial", "kl_coef 0.9 -> 0.05", FORCE), prepare=interrupted),
    # ------------------------------------------------------------------------------------------------------ lengths
    Case(
        "prompt and response too long",
        ("ppo.max_prompt_length + response_length = 72", "limit is 64", "lower"),
        ("ppo.response_length=48",),
    ),
    Case("sft rows too long", ("sft.max_length = 65", "limit is 64", "lower"), ("sft.max_length=65",), "sft"),
    Case("pairs too long", ("reward.max_length = 65", "limit is 64", "lower"), ("reward.max_length=65",), "reward"),
    Case(
        "no prompt fits",
        ("prompts", "none of 12", "ppo.max_prompt_length 1", "raise it"),
        ("ppo.max_prompt_length=1",),
        prepare=no_model,
    ),
    Case(
        "no row fits", ("sft", "none of 12", "max_length 3", "raise it"), ("sft.max_length=3",), "sft", prepare=no_model
    ),
    Case(
        "EOS budget too long",
        ("ppo.max_prompt_length + sft.eos_max_new_tokens = 124", "limit is 64", "lower"),
        ("sft.eos_max_new_tokens=100",),
        "sft",
        prepare=no_model,
    ),
    Case(
        "EOS budget without ppo too long",
        ("sft.eos_max_new_tokens = 65", "limit is 64", "lower"),
        ("sft.eos_max_new_tokens=64", "ppo=null", "evaluate=null"),
        "sft",
        prepare=no_model,
    ),
    *(
        Case(
            f"no room for a prompt in {stage}",
            ("none of", "the 1 tokens that a response of 63 leaves", "lower sft.eos_max_new_tokens"),
            ("sft.eos_max_new_tokens=63", "ppo=null", "evaluate=null"),
            stage,
            prepare=no_model,
        )
        for stage in ("sft", "reward")
    ),
    *(
        Case(
            f"samples of {stage} too long",
            ("ppo.max_prompt_length + response_length = 84", "limit is 64", "lower"),
            ("ppo.response_length=60", TWO_POLICIES),
            stage,
            prepare=no_model,
        )
        for stage in ("sft", "reward", "evaluate")
    ),
    # --------------------------------------------------------------------------------------------------------- data
    Case("unknown data recipe", ("'movie_review'", "did you mean 'movie_reviews'"), ("ppo.data=movie_review",)),
    Case(
        "unknown set of the reward report",
        ("data recipe 'movie_review'", "did you mean 'movie_reviews'"),
        ("reward.report.ood=[{data: movie_review}]",),
        stage="reward",
    ),
    Case(
        "paraphrase without the prompt",
        ("reward.report.paraphrases", "{prompt} 0 times", "once"),
        ("reward.report.paraphrases=[Really]",),
        stage="reward",
    ),
    Case(
        "margins that the data have not",
        ("reward.margin_scale", "margin is None", "keep: {margin: column}"),
        ("reward.margin_scale=1.0",),
        stage="reward",
    ),
    Case(
        "kept column that the data have not",
        ("keep.category", "no column 'kind'", "it has chosen, prompt, rejected"),
        stage="reward",
        prepare=data("preference", keep={"category": "kind"}),
    ),
    Case(
        "another reward model in the place of a stage",
        ("--as sft", "does not begin with `reward`"),
        ("--as", "sft"),
        stage="reward",
    ),
    *(
        Case(
            f"unknown {key}",
            (key, "split 'trian'", "did you mean 'train'"),
            (f"{key}=trian", "ppo.eval_every=1", TWO_POLICIES),
            key.partition(".")[0],
            prepare=no_model,
        )
        for key in ("sft.split", "sft.eval_split", "reward.split", "reward.eval_split", "ppo.split", "ppo.eval_split")
    ),
    Case(
        "unknown split of the evaluation",
        ("evaluate.split", "split 'tset'", "did you mean 'test'"),
        ("evaluate.split=tset", TWO_POLICIES),
        "evaluate",
        prepare=no_model,
    ),
    Case(
        "unknown split of pretrain",
        ("pretrain.split", "split 'trian'", "did you mean 'train'"),
        ("pretrain={data: [prompts.yaml], split: trian}",),
        "pretrain",
        prepare=no_model,
    ),
    Case(
        "empty split",
        ("'sft'", "split 'train'", "12 min_words", "loosen the filters"),
        stage="sft",
        prepare=data("sft", filters=[{"min_words": 50}]),
    ),
    Case(
        "split larger than the data",
        ("split.rows.train", "99 rows wanted", "lower the counts"),
        ("sft.eval_split=null",),
        stage="sft",
        prepare=data("sft", split={"rows": {"train": 99}}),
    ),
    Case(
        "missing column",
        ("mapping.completion", "no column 'completions'", "did you mean 'completion'"),
        stage="sft",
        prepare=data("sft", mapping={"completion": "completions"}),
    ),
    Case(
        "missing package",
        ("no-such-pkg", "pip install no-such-pkg"),
        prepare=data("prompts", source={"package": "no-such-pkg", "module": "nosuchpkg", "file": "x.csv"}),
    ),
    Case(
        "missing data file",
        ("source.files", "'gone.jsonl'", "check the path"),
        prepare=data("prompts", source={"files": "gone.jsonl"}),
    ),
    Case(
        "broken data file",
        ("sft.jsonl line", "not valid JSON", "one object per line"),
        stage="sft",
        prepare=cut("sft.jsonl", 0.99),
    ),
    Case(
        "key of a data recipe",
        ("sft.yaml", "filter", "did you mean 'filters'"),
        stage="sft",
        prepare=data("sft", filter=[]),
    ),
    # ------------------------------------------------------------------------------------------- functions of the user
    Case(
        "no such module",
        ("'toy_ruls:short'", "no module 'toy_ruls'", "install it"),
        ("ppo.rewards=[{function: 'toy_ruls:short'}]",),
        prepare=rules,
    ),
    Case(
        "no such function",
        ("'toy_rules:shrt'", "no attribute 'shrt'", "check its spelling"),
        ("ppo.rewards=[{function: 'toy_rules:shrt'}]",),
        prepare=rules,
    ),
    Case(
        "not callable",
        ("'toy_rules:LIMIT'", "int, not callable", "name a function"),
        ("ppo.rewards=[{function: 'toy_rules:LIMIT'}]",),
        prepare=rules,
    ),
    Case("no colon", ("'toy_rules.short'", "package.module:callable"), ("ppo.rewards=[{function: toy_rules.short}]",)),
    Case(
        "too few scores",
        ("toy_rules:short", "1 values for 6 prompts", "one per prompt"),
        ("ppo.rewards=[{function: 'toy_rules:short'}]",),
        prepare=rules,
    ),
    Case(
        "scores that are no numbers",
        ("toy_rules:nan", "nan", "finite floats"),
        ("ppo.rewards=[{function: 'toy_rules:nan'}]",),
        prepare=rules,
    ),
    # ------------------------------------------------------------------------------------------------ models, hardware
    Case("base not found", ("model", "./nowhere", "check the path or Hub id"), ("model.base=./nowhere",), "sft"),
    Case(
        "base package not installed",
        ("model.package no_such_pkg", "pip install"),
        ("model.package=no_such_pkg",),
        "sft",
    ),
    Case("GGUF file not found", ("gone.gguf", "check"), ("model.gguf_file=gone.gguf",), "sft"),
    Case(
        "chat without template",
        ("model.chat", "no chat template", "set model.chat_template"),
        ("model.chat=true",),
        "sft",
    ),
    Case(
        "template not found",
        ("model.chat_template", "gone.jinja", "give the path"),
        ("model.chat_template=gone.jinja",),
        "sft",
    ),
    Case("EOS not in the vocabulary", ("model.eos_token", "'<end>'", "name one"), ("model.eos_token='<end>'",), "sft"),
    Case("pad named as EOS", ("model.pad_token", "<|eos|>", "name another"), ("model.pad_token='<|eos|>'",), "sft"),
    Case(
        "rollout does not divide by processes",
        ("ppo.rollout_batch_size 4", "3 processes", "change one"),
        prepare=in_world_of(3),
    ),
    # ----------------------------------------------------------------------------------------------------- the memory
    *(
        Case(
            f"memory full in {stage}",
            (
                f"{stage}: out of memory",
                "11.50 MiB is free)",
                f"halve {stage}.trainer.per_device",
                "--dry-run",
                "expandable",
            ),
            stage=stage,
            prepare=memory_full("transformers.Trainer.training_step", torch.OutOfMemoryError, GPU_FULL),
        )
        for stage in ("sft", "reward")
    ),
    Case(
        "memory full while a graph is recorded",
        ("ppo: out of memory", "lower ppo.max_tokens_per_micro_batch"),
        prepare=memory_full("rlhf.ppo.trainer.PPOTrainer.step", RuntimeError, RECORDING),
    ),
    Case(
        "memory full on a CPU",
        ("ppo: out of memory (MemoryError)", "ppo.generation_slots"),
        prepare=memory_full("rlhf.ppo.trainer.PPOTrainer.step", MemoryError, ""),
    ),
    # ------------------------------------------------------------------------------------------------------- the disk
    Case("disk full at the start", ("disk is full", "free space"), prepare=disk_full("write_json")),
    Case(
        "disk full at the end",
        ("disk is full", "free space"),
        ("sft.trainer.save_strategy='no'",),
        stage="sft",
        prepare=disk_full("finish"),
    ),
    Case(
        "disk full in safetensors",
        ("disk is full", "free space"),
        ("sft.trainer.save_strategy='no'",),
        stage="sft",
        prepare=disk_full_in_safetensors,
    ),
    Case(
        "artifacts is a file", ("toy.yaml", "Not a directory", "check path"), ("--artifacts", "toy.yaml"), stage="sft"
    ),
]
GPU_CASES = [
    Case("no GPU", ("hardware.device", "wants a GPU", "hardware.device=cpu"), ("hardware.device=cuda",), stage)
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate")
]


# --------------------------------------------------------------------------------------------------------- the working
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a recipe, data, a base model, and finished sft and reward stages."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    try:
        recipe, tokenizer = build_recipe(Path()), build_tokenizer()
        build_model(tokenizer).save_pretrained("base")
        tokenizer.save_pretrained("base")
        build_sft_artifact(Path("artifacts"), recipe=recipe)
        build_reward_artifact(Path("artifacts"), recipe=recipe)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("toy_rules", None)


def folders(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_dir()}


def check_line(stderr: str, says: tuple[str, ...]) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    for fragment in says:
        assert fragment in lines[0], lines[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_bad_input(case, here, monkeypatch, capsys):
    run(case, here, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("reason", "told", "more"),
    [
        (
            "CUDA out of memory. Tried to allocate 2 GiB",
            {},
            "; or have expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF",
        ),
        ("CUDA out of memory.", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}, ""),
        ("CUDA out of memory.", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, ""),
        ("DefaultCPUAllocator: can't allocate memory", {}, ""),
    ],
)
def test_a_full_gpu_is_told_of_the_setting_that_wastes_less_unless_it_has_it(monkeypatch, reason, told, more):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, told.get(name, ""))
    said = less_waste(reason)
    assert said.startswith(more) and bool(said) == bool(more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.stage)
def test_gpu_recipe_without_gpu(case, here, monkeypatch, capsys):
    build_sft_artifact(Path("artifacts"), stage="ppo")
    if case.stage == "pretrain":
        write_recipe(Path(), pretrain={"data": ["prompts.yaml"]})
        source = {"files": "prompts.jsonl"}
        write_data_recipe(Path(), "prompts", name="raw", source=source, format="text", mapping={"text": "prompt"})
    run(Case(case.name, case.says, case.overrides, case.stage), here, monkeypatch, capsys)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_read_only_directory(here, monkeypatch, capsys):
    Path("artifacts").chmod(0o555)
    Path("artifacts/toy").chmod(0o555)
    run(Case("read-only", ("cannot write", "check path and permissions"), stage="sft"), here, monkeypatch, capsys)


def run(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    if isinstance(case.recipe, str):
        Path("toy.yaml").write_text(case.recipe)
    elif case.recipe is not None:
        write_recipe(Path(), **case.recipe)
    if case.prepare:
        case.prepare(monkeypatch)
    files, dirs = snapshot(here), folders(here)
    capsys.readouterr()
    code = main(case.stage, MODULES[case.stage], ["--recipe", case.recipe_name, *case.overrides])
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert code == 2
    check_line(captured.err, case.says)
    ours = {name for name in folders(here) - dirs if "__pycache__" not in name}
    after = {name: content for name, content in snapshot(here).items() if "__pycache__" not in name}
    assert ours <= {"artifacts", "artifacts/toy"}
    assert after.keys() == files.keys()
    assert after == files, "an input changed"


def test_disk_full_at_the_end_costs_no_training(here, monkeypatch, capsys):
    """With a checkpoint there is something to resume: `.partial` stays, and the next run continues there."""
    old = Artifact.load("artifacts/toy/sft").manifest
    argv = ["--recipe", "toy.yaml", "sft.seed=5", "sft.trainer.per_device_train_batch_size=12"]
    disk_full("finish")(monkeypatch)
    assert main("sft", MODULES["sft"], argv) == 2
    check_line(capsys.readouterr().err, ("disk is full", "free space"))
    assert Artifact.load("artifacts/toy/sft").manifest == old
    assert Path("artifacts/toy/sft.partial/checkpoints/checkpoint-1/checkpoint.json").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr("transformers.Trainer.training_step", None)  # nothing is trained again
    assert main("sft", MODULES["sft"], argv) == 0
    assert Artifact.load("artifacts/toy/sft").manifest["seed"] == 5
    assert not Path("artifacts/toy/sft.partial").exists()
    assert not Path("artifacts/toy/sft/checkpoints").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_without_ppo_samples_fit_a_short_model(stage, here):
    """128 new tokens by default are more than this model has positions for: half of them are taken."""
    assert main(stage, MODULES[stage], ["--recipe", "toy.yaml", "ppo=null", "evaluate=null"]) == 0
    artifact = Artifact.load(f"artifacts/toy/{stage}")
    if stage == "sft":
        assert 0 < artifact.manifest["metrics"]["response_length"] <= 32


def test_there_are_enough_cases():
    assert len(CASES) >= 25
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(len(case.says) >= 2 for case in CASES)


def test_good_input_is_not_refused(here, capsys):
    """Without this, an entry point that refuses everything would pass."""
    assert main("ppo", MODULES["ppo"], ["--recipe", "toy.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["pipelines.sft", "--recipe", "tinny"], ("--recipe tinny", "did you mean 'tiny'")),
        (["pipelines.ppo", "--recipe", "toy.yaml", "ppo.data=gone.yaml"], ("gone.yaml", "check the path")),
        (["pipelines.ppo", "--recipe", "toy.yaml", "--oops"], ("--oops", "--help")),
    ],
    ids=["recipe", "data", "option"],
)
def test_entry_point_as_people_run_it(argv, says, here):
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    check_line(done.stderr, says)
