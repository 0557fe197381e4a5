"""Supervised fine-tuning: TRL's SFTTrainer on rendered prompts and completions, EOS learned and measured."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from rlhf.cards import write_card
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.logs import check_trackers
from rlhf.models import (
    align_special_tokens,
    base_files,
    base_path,
    check_position_limit,
    compute_dtype,
    load_base_model,
    load_base_tokenizer,
    load_model,
    load_tokenizer,
    lora_config,
    tokenizer_identity,
)
from rlhf.recipe import Recipe
from rlhf.sampling import Samples, fitting_rows, sample_responses
from rlhf.stage import Stage, StageContext
from rlhf.trainers import ExactResume, check_trainer_args, in_curriculum_order, run_trainer, save_trained, trainer_args

logger = logging.getLogger(__name__)


class ExactSFTTrainer(ExactResume, SFTTrainer):
    """TRL's, which resumes exactly."""


def rendered_rows(rows: list[dict], renderer: Renderer, max_length: int, where: str) -> Dataset:
    """Token ids and completion mask of each row; rows above `max_length` tokens are dropped and counted.

    Tokenised here and not by TRL: SFT, reward model and PPO see the same ids for the same conversation.

    Raises:
        UserError: no row fits.
    """
    input_ids, masks = [], []
    for row in rows:
        prompt = renderer.prompt_ids(row["prompt"])
        completion = renderer.response_ids(row["prompt"], row["completion"])
        if len(prompt) + len(completion) <= max_length:
            input_ids.append(prompt + completion)
            masks.append([0] * len(prompt) + [1] * len(completion))
    if not input_ids:
        raise UserError(f"{where}: none of {len(rows)} rows fits max_length {max_length} tokens: raise it")
    if len(input_ids) < len(rows):
        logger.info(
            "%s: dropped %d of %d rows above %d tokens", where, len(rows) - len(input_ids), len(rows), max_length
        )
    return Dataset.from_dict({"input_ids": input_ids, "completion_mask": masks})


def load_base(ctx: StageContext) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer that SFT starts from: the pretrain artifact, or the recipe's base."""
    if "pretrain" in ctx.inputs:
        directory = ctx.inputs["pretrain"].model_dir
        tokenizer = load_tokenizer(directory)
        return load_model(directory), tokenizer
    tokenizer = load_base_tokenizer(ctx.recipe.model)
    model = load_base_model(ctx.recipe.model, tokenizer)
    align_special_tokens(model, tokenizer)
    return model, tokenizer


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    recipe, section = ctx.recipe, ctx.recipe.sft
    compute_dtype(recipe)
    check_trackers(recipe.logging.report_to)
    check_trainer_args(SFTConfig, section.trainer, "sft.trainer")
    if "pretrain" in ctx.inputs:
        check_position_limit(ctx.inputs["pretrain"].model_dir, section.max_length, "sft.max_length")
    elif recipe.model.gguf_file is None:
        check_position_limit(base_path(recipe.model), section.max_length, "sft.max_length", recipe.model)


def build(ctx: StageContext) -> dict[str, Any]:
    """Train, publish the (merged) model, measure the EOS rate; see `Stage.build`."""
    recipe, section = ctx.recipe, ctx.recipe.sft
    model, tokenizer = load_base(ctx)
    renderer = Renderer(tokenizer, recipe.model.chat)
    train_rows = ctx.rows(section.data, section.split, "sft", limit=section.limit, seed=ctx.seed)
    train = rendered_rows(train_rows, renderer, section.max_length, "sft")
    held_out = None
    if section.eval_split:
        held_out = rendered_rows(
            ctx.rows(section.data, section.eval_split, "sft"), renderer, section.max_length, "sft eval"
        )
    peft = lora_config(recipe.peft, "CAUSAL_LM") if recipe.uses_peft("sft") else None
    base = load_base(ctx)[0] if peft else model  # PEFT changes the model it is given
    values = in_curriculum_order(section.data, section.trainer)
    args = trainer_args(SFTConfig, values, ctx, max_length=section.max_length, completion_only_loss=True)
    trainer = ExactSFTTrainer(
        model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, peft_config=peft
    )
    metrics = run_trainer(trainer, ctx)
    if held_out is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    save_trained(trainer, tokenizer, ctx, base, "causal")
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        metrics |= measure_eos(ctx, renderer)
        write_card(ctx, metrics, "Supervised fine-tuned policy; also PPO's reference.")
    return {"tokenizer": tokenizer_identity(tokenizer), "metrics": metrics}


def sample_published(
    ctx: StageContext, renderer: Renderer, prompts: list, model_dir: Any, length: int | None = None
) -> Samples:
    """Responses of a published policy, sampled as PPO does, where the recipe has a `ppo` section.

    Args:
        ctx: of the stage that asks.
        renderer: of the policy's tokenizer.
        prompts: texts or messages.
        model_dir: of the policy.
        length: most tokens of a response; None = PPO's, else sft.eos_max_new_tokens, else 128.
    """
    recipe, ppo = ctx.recipe, ctx.recipe.ppo
    length = length or (ppo.response_length if ppo else recipe.sft.eos_max_new_tokens or 128)
    model = load_model(model_dir, dtype=torch.float32).to(PartialState().device).eval()
    return sample_responses(
        model,
        renderer,
        prompts,
        length,
        ppo.temperature if ppo else 1.0,
        ctx.seed,
        top_p=ppo.top_p if ppo else 1.0,
        stop_strings=ppo.stop_strings if ppo else [],
        dtype=compute_dtype(recipe),
    )


def measure_eos(ctx: StageContext, renderer: Renderer) -> dict[str, float]:
    """Share of sampled responses to held-out prompts that end by themselves: PPO cannot teach an EOS never seen."""
    section = ctx.recipe.sft
    if not section.eval_split or not section.eos_prompts:
        return {}
    rows = ctx.rows(section.data, section.eval_split, "sft")
    rows = fitting_rows(rows, renderer, ctx.recipe.ppo.max_prompt_length if ctx.recipe.ppo else None)
    prompts = [row["prompt"] for row in rows[: section.eos_prompts]]
    samples = sample_published(ctx, renderer, prompts, ctx.dir / "model", section.eos_max_new_tokens)
    if samples.eos_rate < 0.5:
        logger.warning(
            "sft: only %.0f %% of responses end within %d tokens: PPO will see mostly cut responses; train longer, "
            "raise the length, or check that completions end",
            100 * samples.eos_rate,
            max(samples.lengths),
        )
    return {"eos_rate": samples.eos_rate, "response_length": sum(samples.lengths) / len(samples.lengths)}


def _inputs(recipe: Recipe) -> list[str]:
    return ["pretrain"] if recipe.pretrain else []


STAGE = Stage(
    "sft",
    1,
    inputs=_inputs,
    data=lambda recipe: [recipe.sft.data],
    check=check,
    build=build,
    also=base_files,
    headline=("eval_loss", "eos_rate"),
)
