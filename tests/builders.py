"""Small true artifacts for tests: a GPT-2 of a few thousand weights, its tokenizer, recipes and data, on disk.

Nothing here trains. What is written goes through `rlhf.artifacts.finish` and `publish`, as a stage's own files do.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.artifacts import Artifact, finish, partial_dir, publish
from rlhf.models import new_reward_model, tokenizer_identity
from rlhf.recipe import Recipe, load_recipe

TEXTS = ("the film is a quiet joy", "a dull and loud mess of a movie", "it moves , it sings and it ends too soon")
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"


def build_tokenizer(
    texts: tuple[str, ...] = TEXTS, vocab_size: int = 280, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with distinct pad (0), BOS (1) and EOS (2); a plain call puts BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )
    fast.chat_template = chat_template
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    n_positions: int = 64,
    n_embd: int = 16,
    n_layer: int = 1,
    n_head: int = 2,
    seed: int = 0,
    **settings: Any,
) -> GPT2LMHeadModel:
    """A GPT-2-shaped model with random weights (about 9,000 by default), dropout off, in eval mode.

    `settings` are further ones of GPT2Config.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    return GPT2LMHeadModel(config).eval()


def build_sft_artifact(
    root: Path,
    run: str = "toy",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    model: PreTrainedModel | None = None,
    recipe: Recipe | None = None,
    stage: str = "sft",
    manifest: dict[str, Any] | None = None,
) -> Artifact:
    """Publish `root/run/sft`.

    Args:
        root: the artifact directory.
        run: folder of the run.
        tokenizer: default `build_tokenizer()`.
        model: default `build_model(tokenizer)`.
        recipe: whose settings the manifest says it was built with; None = a recipe that fits nothing (stale).
        stage: `pretrain` makes a base model's artifact instead.
        manifest: entries that replace the usual ones, such as `{"tokenizer": {...}}`.
    """
    tokenizer = tokenizer or build_tokenizer()
    model = model or build_model(tokenizer)
    partial = _begin(Path(root) / run / stage)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    (partial / "model" / "README.md").write_text("a card\n", encoding="utf-8")
    (partial / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n', encoding="utf-8")
    return _publish(partial, run, stage, tokenizer, recipe, {}, manifest or {})


def build_reward_artifact(
    root: Path,
    run: str = "toy",
    *,
    sft: Artifact | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    model: PreTrainedModel | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    recipe: Recipe | None = None,
    manifest: dict[str, Any] | None = None,
) -> Artifact:
    """Publish `root/run/reward`: a sequence classifier with one output and the statistics that PPO applies.

    Args:
        root: the artifact directory.
        run: folder of the run.
        sft: what it was trained from; default the artifact `root/run/sft`, which must be there.
        tokenizer: default the SFT artifact's.
        model: default the SFT artifact's trunk with a seeded score head.
        mean: of the raw score on SFT samples.
        std: the same.
        recipe: see `build_sft_artifact`.
        manifest: entries that replace the usual ones.
    """
    sft = sft or Artifact.load(Path(root) / run / "sft")
    tokenizer = tokenizer or PreTrainedTokenizerFast.from_pretrained(sft.model_dir)
    if model is None:
        model = new_reward_model(sft.model_dir, seed=1)
    partial = _begin(Path(root) / run / "reward")
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    (partial / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n', encoding="utf-8")
    extra = {"reward_statistics": {"mean": mean, "std": std, "samples": 8}} | (manifest or {})
    return _publish(partial, run, "reward", tokenizer, recipe, {"sft": sft.hash}, extra)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data_recipe(directory: Path, kind: str = "prompts", rows: int = 24, **changes: Any) -> Path:
    """Write a data recipe and its JSONL below `directory`; returns the recipe's path.

    Args:
        directory: where both go.
        kind: prompts, sft (prompt/completion) or preference (prompt/chosen/rejected).
        rows: how many; half train, a quarter validation, a quarter test.
        changes: keys of the data recipe that replace or join the usual ones.
    """
    columns = {"prompts": (), "sft": ("completion",), "preference": ("chosen", "rejected")}[kind]
    form = {"prompts": "prompts", "sft": "prompt_completion", "preference": "preference"}[kind]
    made = [{"prompt": f"the film {i}"} | {name: f" {name} {i}" for name in columns} for i in range(rows)]
    file = write_rows(directory / f"{kind}.jsonl", made)
    split = {"by": "row", "rows": {"train": rows // 2, "validation": rows // 4, "test": rows // 4}}
    recipe = {"name": kind, "source": {"files": str(file)}, "format": form, "split": split, "clean": []} | changes
    path = directory / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def toy_recipe(directory: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of all stages for the toy model and data below `directory`, as plain data.

    Args:
        directory: where data recipes go, and the base model where `model.base` needs one.
        sections: replaces or joins keys within a section (`ppo={"kl_coef": 0.1}`); None takes the section away.
    """
    data = {kind: str(write_data_recipe(directory, kind)) for kind in ("prompts", "sft", "preference")}
    recipe: dict[str, Any] = {
        "name": "toy",
        "model": {"base": str(directory / "base")},
        "sft": {"data": data["sft"], "max_length": 48, "eos_prompts": 4, "trainer": {"max_steps": 1}},
        "reward": {"data": data["preference"], "max_length": 48, "normalize_samples": 4, "trainer": {"max_steps": 1}},
        "ppo": {
            "data": data["prompts"],
            "total_episodes": 8,
            "rollout_batch_size": 4,
            "mini_batch_size": 2,
            "num_ppo_epochs": 1,
            "max_prompt_length": 24,
            "response_length": 8,
            "max_tokens_per_micro_batch": 256,
        },
        "evaluate": {"prompts": 4, "bootstrap": 100},
        "hardware": {"device": "cpu"},
        "logging": {"report_to": []},
    }
    for name, section in sections.items():
        if section is None:
            recipe.pop(name, None)
        elif isinstance(section, dict):
            recipe[name] = recipe.get(name, {}) | section
        else:
            recipe[name] = section
    return recipe


def write_recipe(directory: Path, **sections: Any) -> Path:
    """Write `toy_recipe` as YAML; returns its path."""
    path = directory / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_recipe(directory, **sections), sort_keys=False), encoding="utf-8")
    return path


def build_recipe(directory: Path, **sections: Any) -> Recipe:
    """`toy_recipe`, loaded and checked."""
    return load_recipe(str(write_recipe(directory, **sections)))


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` by relative path: what must not change."""
    return {
        os.fspath(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def _begin(final: Path) -> Path:
    partial = partial_dir(final)
    (partial / "model").mkdir(parents=True)
    return partial


def _publish(
    partial: Path,
    run: str,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe | None,
    inputs: dict[str, str],
    changes: dict[str, Any],
) -> Artifact:
    fingerprint: dict[str, Any] = {"stage": stage, "version": 1, "section": {}, "model": {}}
    if recipe is not None:
        fingerprint["section"] = recipe.section(stage).model_dump(mode="json")
        fingerprint["model"] = recipe.model.model_dump(mode="json")
    manifest = {
        "stage": stage,
        "run": run,
        "status": "complete",
        "fingerprint": fingerprint,
        "inputs": inputs,
        "seed": 0,
        "tokenizer": tokenizer_identity(tokenizer),
        "metrics": {},
    }
    finish(partial, manifest | changes)
    return publish(partial, partial.with_name(stage))
