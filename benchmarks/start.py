"""What both sides start from: a run with random weights, made on the spot from a seed, or a finished one."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from rlhf.artifacts import Artifact, finish, partial_dir, publish
from rlhf.data import Renderer
from rlhf.models import init_score_head, load_tokenizer, tokenizer_identity
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.stage import load_prompts
from rlhf.recipe import Recipe, apply_override
from rlhf.stage import StageContext, load_inputs
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


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its prompts; policy, reference, critic and reward model are equally large.

    Attributes:
        family: gpt2 or llama.
        vocab: size of the vocabulary.
        sizes: of the config, by its own names.
        prompt_tokens: shortest and longest prompt.
        ends: whether EOS is a token that the policy can sample; if not, every response has full length.
    """

    family: str
    vocab: int
    sizes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: tuple[int, int] = (128, 128)
    ends: bool = False

    @property
    def eos_id(self) -> int:
        """One past the logits where responses must not end: a token that no model can sample."""
        return EOS if self.ends else self.vocab

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


def write_model(shape: Shape, stage: str, directory: Path, seed: int, dtype: torch.dtype, device: str) -> None:
    """Random weights of a policy (`sft`) or a reward model, and the tokenizer."""
    torch.manual_seed(seed)
    config = shape.config()
    auto = AutoModelForCausalLM
    if stage == "reward":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    if stage == "reward":
        init_score_head(model.cpu(), seed)
    model.save_pretrained(directory)
    tokenizer_of(shape).save_pretrained(directory)


def write_artifact(root: Path, stage: str, shape: Shape, seed: int, dtype: torch.dtype, device: str) -> Artifact:
    """Publish `root/random/<stage>`."""
    partial = partial_dir(root / "random" / stage)
    write_model(shape, stage, partial / "model", seed, dtype, device)
    manifest: dict[str, Any] = {
        "stage": stage,
        "run": "random",
        "status": "complete",
        "fingerprint": {"stage": stage, "version": 1, "section": {}, "model": {}},
        "inputs": {},
        "seed": seed,
        "tokenizer": tokenizer_identity(tokenizer_of(shape)),
        "metrics": {},
    }
    if stage == "reward":
        manifest["reward_statistics"] = {"mean": 0.0, "std": 1.0, "samples": 0}
    finish(partial, manifest)
    return publish(partial, root / "random" / stage)


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
        overrides: dotted ones, such as `ppo.critic=shared`.
        seed: of weights, prompts and training.
        dtype: of the weights on disk; they are read in the dtype that each side trains in.
        device: where weights are drawn, cpu or cuda.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "random" / "sft").is_dir():
        write_artifact(root, "sft", shape, seed, dtype, device)
        write_artifact(root, "reward", shape, seed + 1, dtype, device)
        write_prompts(root, shape, 4 * ppo["rollout_batch_size"], seed)
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
    return context_of(validate(Recipe, data, "benchmark"), root, "random")


def context_of(recipe: Recipe, root: Path, run: str) -> StageContext:
    """The ppo stage of a run whose sft and reward artifacts are there."""
    ctx = StageContext(ppo_stage.STAGE, recipe, root, run)
    load_inputs(ctx)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    return ctx


def finished_run_context(root: Path, run: Path, recipe: Recipe) -> StageContext:
    """The ppo stage of `recipe` on the sft and reward artifacts of a finished run, which is only read."""
    for stage in ("sft", "reward"):
        link = root / recipe.name / stage
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((run / stage).resolve())
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
            ppo.data, ppo.split, Renderer(tokenizer, ctx.recipe.model.chat), ppo.max_prompt_length
        ).ids,
        "ppo": ppo.model_dump(mode="json"),
        # A model whose EOS lies outside of its logits never ends a response.
        "stop_at_eos": tokenizer.eos_token_id < number_of_logits(ctx.inputs["sft"].model_dir),
        "seed": ctx.seed,
    }
    ours = {"root": str(ctx.root), "run": ctx.run, "recipe": ctx.recipe.model_dump(mode="json")}
    return {"trl": theirs | trl, "ours": ours}


def number_of_logits(directory: Path) -> int:
    """Number of logits of the model in `directory`."""
    return int(AutoConfig.from_pretrained(directory).vocab_size)
