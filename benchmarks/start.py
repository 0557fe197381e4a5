"""What both sides start from: a run with random weights, made on the spot from a seed, or a finished one."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shlex
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.artifacts import Artifact, finish, partial_dir, publish
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.models import init_score_head, load_model, load_tokenizer, lora_config, tokenizer_identity
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.stage import load_prompts
from rlhf.recipe import PeftSection, Recipe, apply_override
from rlhf.stage import StageContext, git_commit, load_inputs, package_versions
from rlhf.yamlio import validate

PAD, BOS, EOS = 0, 1, 2
# Of both sides' processes. Freed memory stays with them (pipelines/cli.py:keep_freed_memory says what that is worth).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def provenance() -> dict[str, Any]:
    """What a file of figures says about itself: command (folders of this machine left out), date, commit, versions."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.machine(), "gpus": gpus}
    return {
        "command": re.sub(r"(?<![\w.-])/(?:[\w.-]+/)*", "", command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "packages": package_versions(),
        **machine,
    }


def with_measured(page: str, tables: str, name: str | None = None) -> str:
    """A page of the docs with fresh text between the two marks of a block.

    Args:
        page: text of the page.
        tables: Markdown that stands between the marks afterwards.
        name: of the block, `<!-- measured NAME: begin -->`; None where the page has one block without a name.

    Raises:
        UserError: the page does not have this block exactly once.
    """
    label = f"measured {name}" if name else "measured"
    begin, end = f"<!-- {label}: begin -->", f"<!-- {label}: end -->"
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    if page.count(begin) != 1 or page.count(end) != 1 or end not in rest:
        raise UserError(f"page: no block {label!r}, or more than one: put {begin!r} and {end!r} on lines of their own")
    return f"{head}{begin}\n{tables}\n{end}{tail}"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its prompts; policy, reference, critic and reward model are equally large.

    Attributes:
        family: gpt2 or llama.
        vocab: size of the vocabulary.
        sizes: of the config, by its own names.
        prompt_tokens: shortest and longest prompt.
        ends: whether EOS is a token that the policy can sample; if not, every response has full length.
        eos: its number if it is.
    """

    family: str
    vocab: int
    sizes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: tuple[int, int] = (128, 128)
    ends: bool = False
    eos: int = EOS

    @property
    def eos_id(self) -> int:
        """One past the logits where responses must not end: a token that no model can sample."""
        return self.eos if self.ends else self.vocab

    def config(self) -> PretrainedConfig:
        """transformers' config of the model."""
        special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": self.eos_id if self.ends else None}
        if self.family == "gpt2":
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2Config(vocab_size=self.vocab, **self.sizes, **off, **special)
        return LlamaConfig(vocab_size=self.vocab, tie_word_embeddings=True, **self.sizes, **special)


def tokenizer_of(shape: Shape) -> PreTrainedTokenizerFast:
    """One word per token: `w17` is token 17."""
    words = {"<|pad|>": PAD, "<|bos|>": BOS} | {f"w{i}": i for i in range(2, shape.vocab)}
    words.pop(f"w{shape.eos_id}", None)
    words["<|eos|>"] = shape.eos_id
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>", padding_side="left"
    )


def random_model(shape: Shape, kind: str, seed: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Random weights, drawn on `device`; on CPU afterwards."""
    torch.manual_seed(seed)
    config = shape.config()
    auto = AutoModelForCausalLM
    if kind == "score":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    model = model.cpu()
    if kind == "score":
        init_score_head(model, seed)
    if device == "cuda":
        torch.cuda.empty_cache()  # the processes that are measured need it
    return model


def reward_adapter(sft: Artifact, peft: PeftSection, seed: int, directory: Path) -> PreTrainedModel:
    """A reward model that is an adapter of the SFT model: writes the adapter, returns the merged model."""
    base = load_model(sft.model_dir, "score", dtype="auto")
    init_score_head(base, seed)
    model = get_peft_model(base, lora_config(peft, "SEQ_CLS"))
    model.save_pretrained(directory)
    return model.merge_and_unload()


def write_artifact(
    root: Path, stage: str, model: PreTrainedModel, shape: Shape, seed: int, inputs: dict[str, str]
) -> Artifact:
    """Publish `root/random/<stage>`."""
    partial = partial_dir(root / "random" / stage)
    model.save_pretrained(partial / "model")
    tokenizer_of(shape).save_pretrained(partial / "model")
    manifest: dict[str, Any] = {
        "stage": stage,
        "run": "random",
        "status": "complete",
        "fingerprint": {"stage": stage, "version": 1, "section": {}, "model": {}},
        "inputs": inputs,
        "seed": seed,
        "tokenizer": tokenizer_identity(tokenizer_of(shape)),
        "metrics": {},
    }
    if stage == "reward":
        manifest["reward_statistics"] = {"mean": 0.0, "std": 1.0, "samples": 0}
    finish(partial, manifest)
    return publish(partial, root / "random" / stage)


def write_artifacts(root: Path, recipe: Recipe, shape: Shape, dtype: torch.dtype, device: str) -> None:
    """SFT and reward artifacts below `root`; with LoRA the reward model is an adapter of the SFT model."""
    seed = recipe.seed
    sft = write_artifact(root, "sft", random_model(shape, "causal", seed, dtype, device), shape, seed, {})
    if recipe.uses_peft("ppo"):
        reward = reward_adapter(sft, recipe.peft, seed, partial_dir(root / "random" / "reward") / "adapter")
    else:
        reward = random_model(shape, "score", seed + 1, dtype, device)
    write_artifact(root, "reward", reward, shape, seed, {"sft": sft.hash})


def write_prompts(root: Path, shape: Shape, count: int, seed: int) -> Path:
    """A data recipe of random prompts; returns its path."""
    draw = random.Random(seed)
    words = [[draw.randrange(4, shape.vocab) for _ in range(draw.randint(*shape.prompt_tokens))] for _ in range(count)]
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) for row in words]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        "name": "prompts",
        "source": {"files": str(root / "prompts.jsonl")},
        "format": "prompts",
        "clean": [],
        "split": {"rows": {"train": count}},
    }
    path = root / "prompts.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def random_context(
    root: Path, shape: Shape, ppo: dict[str, Any], overrides: list[str], seed: int, dtype: torch.dtype, device: str
) -> StageContext:
    """A ppo stage on random weights below `root` (written on the first call), ready for `build_trainer`.

    Args:
        root: artifact directory.
        shape: of all models.
        ppo: the recipe's section.
        overrides: dotted ones, such as `ppo.critic=shared` or `peft.r=16`.
        seed: of weights, prompts and training.
        dtype: of the weights on disk; they are read in the dtype that each side trains in.
        device: where weights are drawn, cpu or cuda.
    """
    root.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "name": "random",
        "seed": seed,
        "model": {"base": "random"},
        "sft": {"data": str(root / "prompts.yaml")},
        "ppo": {"data": str(root / "prompts.yaml"), "max_prompt_length": shape.prompt_tokens[1]} | ppo,
        "hardware": {"device": device},
        "logging": {"report_to": []},
    }
    for override in overrides:
        apply_override(data, override)
    recipe = validate(Recipe, data, "benchmark")
    if not (root / "random" / "sft").is_dir():
        write_artifacts(root, recipe, shape, dtype, device)
        write_prompts(root, shape, 4 * recipe.ppo.rollout_batch_size, seed)
    return context_of(recipe, root, "random")


def context_of(recipe: Recipe, root: Path, run: str) -> StageContext:
    """The ppo stage of a run whose sft and reward artifacts are there."""
    ctx = StageContext(ppo_stage.STAGE, recipe, root, run)
    load_inputs(ctx)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    return ctx


def finished_run_context(root: Path, run: Path, recipe: Recipe) -> StageContext:
    """The ppo stage of `recipe` on the sft and reward artifacts of a finished run, which are only read.

    Its other reward models (`reward_b`) are there, too, and the cleaned data beside it, to which sets may be added.
    """
    for path in [*run.glob("sft"), *run.glob("reward*"), *run.parent.glob("data")]:
        link = root / path.name if path.name == "data" else root / recipe.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    return context_of(recipe, root, recipe.name)


def side_specs(ctx: StageContext, trl: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What our_side.py and trl_side.py read: the same artifacts, prompts and hyperparameters.

    Args:
        ctx: the ppo stage.
        trl: settings that only TRL's side has: trl_micro_batch, dtype, device.
    """
    ppo = ctx.recipe.ppo
    tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
    statistics = ctx.inputs["reward"].manifest["reward_statistics"]
    theirs = {
        "policy": str(ctx.inputs["sft"].model_dir),
        "reference": str(ctx.inputs["sft"].model_dir),
        "reward": str(ctx.inputs["reward"].model_dir),
        "score_mean": statistics["mean"],
        "score_std": statistics["std"],
        "prompts": load_prompts(
            ppo.data, ppo.split, Renderer(tokenizer, ctx.recipe.model.chat), ppo.max_prompt_length, root=ctx.root
        ).ids,
        "ppo": ppo.model_dump(mode="json"),
        # A model whose EOS lies outside of its logits never ends a response.
        "stop_at_eos": tokenizer.eos_token_id < number_of_logits(ctx.inputs["sft"].model_dir),
        "peft": ctx.recipe.peft.model_dump(mode="json") if ctx.recipe.uses_peft("ppo") else None,
        "seed": ctx.seed,
    }
    ours = {"root": str(ctx.root), "run": ctx.run, "recipe": ctx.recipe.model_dump(mode="json")}
    return {"trl": theirs | trl, "ours": ours}


def number_of_logits(directory: Path) -> int:
    """Number of logits of the model in `directory`."""
    return int(AutoConfig.from_pretrained(directory).vocab_size)
