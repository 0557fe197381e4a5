"""A recipe's base model as a plain folder: safetensors, pad apart from EOS, checked against what it came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.artifacts import sha256_file, write_json
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.models import (
    base_path,
    load_base_model,
    load_base_tokenizer,
    load_model,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)
from rlhf.recipe import Recipe

# What tokenizers get wrong when they are converted: digits, runs of spaces, other scripts, code, marks of their own.
PROBES = (
    "What is the capital of France?",
    "In 1984, 12345 people:\n\n1. x  = 3.14\n\n  22 more",
    "你好，世界！请介绍一下北京。",
    "\tif x == 10:\n\t\treturn 'it''s'  # ½ ٣ 🙂",
    "Write a haiku about autumn.",
)
GREEDY_TOKENS = 24


def convert(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write the base model of `recipe` to `out`, load it again, and compare.

    Returns:
        What was checked, also in `out/conversion.json`: the base and sha256 of its GGUF file, the tokenizer's identity,
        and for each probe its token ids and the greedy continuation of the original, which the copy gives, too.

    Raises:
        UserError: `out` exists, no `model.base`, or the copy says something else than the original.
    """
    if out.exists():
        raise UserError(f"{out}: exists already: remove it, or name another folder")
    if recipe.model.base is None:
        raise UserError(f"recipe {recipe.name}: has no model.base to convert: name one")
    tokenizer = load_base_tokenizer(recipe.model)
    model = load_base_model(recipe.model, tokenizer).eval()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial, "causal")
    facts = compare(model, tokenizer, partial, recipe.model.chat)
    facts |= {"base": recipe.model.model_dump(mode="json", exclude_none=True)}
    if recipe.model.gguf_file:
        facts["gguf_sha256"] = sha256_file(Path(base_path(recipe.model)) / recipe.model.gguf_file)
    write_json(partial / "conversion.json", facts)
    partial.rename(out)
    return facts


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, copy: Path, chat: bool) -> dict[str, Any]:
    """Token ids, template, logits and greedy continuations of the copy in folder `copy` beside the original's.

    Raises:
        UserError: one of them differs, or the tokens of a probe do not spell it.
    """
    other, other_tokenizer = load_model(copy).eval(), load_tokenizer(copy)
    if tokenizer_identity(other_tokenizer) != tokenizer_identity(tokenizer):
        raise UserError(f"{copy}: its tokenizer is not the one that was saved: this transformers cannot convert it")
    probes = []
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise UserError(f"{copy}: the tokens of {text!r} spell {tokenizer.decode(ids)!r}: no use as a base")
        prompt = Renderer(tokenizer, chat).prompt_ids(text)
        if Renderer(other_tokenizer, chat).prompt_ids(text) != prompt:
            raise UserError(f"{copy}: renders {text!r} in another way than the original: its template was not saved")
        with torch.no_grad():
            shift = (logits(model, prompt) - logits(other, prompt)).abs().max().item()
        said = [greedy(part, tokenizer, prompt) for part in (model, other)]
        if shift > 1e-4 or said[0] != said[1]:
            raise UserError(f"{copy}: answers {text!r} in another way (logits differ by {shift:.2g}): it was not kept")
        probes.append({"text": text, "ids": ids, "logits_shift": shift, "greedy": said[0]})
    return {"tokenizer": tokenizer_identity(tokenizer), "probes": probes}


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]."""
    return model(torch.tensor([ids])).logits[0]


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The likeliest continuation, as text with its special tokens."""
    prompt = torch.tensor([ids])
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": GREEDY_TOKENS}
    made = model.generate(prompt, **settings)  # type: ignore[operator]  # the type of PreTrainedModel hides it
    return str(tokenizer.decode(made[0, len(ids) :]))
