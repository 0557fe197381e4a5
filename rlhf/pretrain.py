"""(Continued) pre-training on raw text: the tiny recipe makes its base model here."""

from __future__ import annotations

import logging
from typing import Any

import numpy
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from rlhf.cards import write_card
from rlhf.data import check_split
from rlhf.errors import UserError
from rlhf.logs import check_trackers
from rlhf.models import (
    base_files,
    base_path,
    check_position_limit,
    compute_dtype,
    load_base_model,
    load_base_tokenizer,
    tokenizer_identity,
)
from rlhf.recipe import Architecture, Recipe
from rlhf.stage import Stage, StageContext
from rlhf.trainers import ExactResume, check_trainer, run_trainer, save_trained, trainer_args

logger = logging.getLogger(__name__)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with distinct pad, BOS and EOS; `tokenizer(text)` puts BOS in front.

    Byte-level: any text of any language becomes tokens and comes back. The BOS is in the post-processor, so that the
    plain call gives what the stages feed the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A GPT-2-shaped model with random weights, dropout off."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=architecture.n_positions,
        n_embd=architecture.n_embd,
        n_layer=architecture.n_layer,
        n_head=architecture.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it falls back to with a warning: transformers knows classes named so alone
    return model


def packed_blocks(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, max_tokens: int | None
) -> numpy.ndarray:
    """Texts joined as BOS text EOS and cut into rows [N, block_size] of token ids.

    Raises:
        UserError: less text than one block.
    """
    stream: list[int] = []
    for first in range(0, len(texts), 1000):
        for ids in tokenizer(texts[first : first + 1000], verbose=False).input_ids:
            stream += [*ids, tokenizer.eos_token_id]
        if max_tokens is not None and len(stream) >= max_tokens:
            stream = stream[:max_tokens]
            break
    rows = len(stream) // block_size
    if rows == 0:
        raise UserError(f"pretrain: {len(stream)} tokens of text are less than one block of {block_size}: add text")
    return numpy.array(stream[: rows * block_size]).reshape(rows, block_size)


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    section = ctx.recipe.pretrain
    compute_dtype(ctx.recipe)
    check_trackers(ctx.recipe.logging.report_to)
    check_trainer(TrainingArguments, section.trainer, ctx, without_eval="leave it out")
    for name in section.data:
        check_split(name, section.split, "pretrain.split")
    architecture = section.architecture
    if architecture is None and ctx.recipe.model.gguf_file is None:
        check_position_limit(base_path(ctx.recipe.model), section.block_size, "pretrain.block_size", ctx.recipe.model)
    if architecture and section.block_size > architecture.n_positions:
        raise UserError(
            f"pretrain.block_size {section.block_size}: above architecture.n_positions {architecture.n_positions}: "
            "lower it"
        )
    from rlhf.sft import check_section  # heavy, and of no use to this stage itself: `make sft` goes on with that one

    check_section(ctx.recipe)


def build(ctx: StageContext) -> dict[str, Any]:
    """Train and write model/; see `Stage.build`."""
    section = ctx.recipe.pretrain
    texts = [row["text"] for name in section.data for row in ctx.rows(name, section.split, "text")]
    numpy.random.default_rng(ctx.seed).shuffle(texts)
    if section.architecture:
        tokenizer = train_tokenizer(texts, section.architecture.vocab_size)  # deterministic: the same on every rank
        model = new_model(section.architecture, tokenizer, ctx.seed)
    else:
        tokenizer = load_base_tokenizer(ctx.recipe.model)
        model = load_base_model(ctx.recipe.model, tokenizer)
    blocks = packed_blocks(texts, tokenizer, section.block_size, section.max_tokens)
    logger.info("pretrain: %d parameters, %d tokens", model.num_parameters(), blocks.size)
    rows = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    trainer = ExactResume(model, trainer_args(TrainingArguments, section.trainer, ctx), train_dataset=rows)
    metrics = run_trainer(trainer, ctx) | {"parameters": model.num_parameters(), "tokens": int(blocks.size)}
    save_trained(trainer, tokenizer, ctx, model, "causal")
    if trainer.accelerator.is_main_process:
        write_card(ctx, metrics, "Base language model, trained on raw text.")
    return {"tokenizer": tokenizer_identity(tokenizer), "metrics": metrics}


def _data(recipe: Recipe) -> list[str]:
    return recipe.pretrain.data if recipe.pretrain else []


STAGE = Stage(
    "pretrain",
    1,
    inputs=lambda recipe: [],
    data=_data,
    check=check,
    build=build,
    also=base_files,
    headline=("train_loss",),
)
