"""Scalar reward model: TRL's RewardTrainer from the SFT artifact, measured on held-out pairs beside baselines."""

from __future__ import annotations

import logging
from typing import Any

import numpy
from accelerate import PartialState
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlhf.cards import write_card
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.evaluation.statistics import wilson_interval
from rlhf.logs import check_trackers
from rlhf.models import (
    check_position_limit,
    compute_dtype,
    load_model,
    load_tokenizer,
    lora_config,
    new_reward_model,
    tokenizer_identity,
)
from rlhf.reward.baselines import length_baseline, tfidf_baseline
from rlhf.sampling import fitting_rows, score_sequences
from rlhf.sft import sample_published
from rlhf.stage import Stage, StageContext
from rlhf.trainers import ExactResume, check_trainer_args, in_curriculum_order, run_trainer, save_trained, trainer_args

logger = logging.getLogger(__name__)


class ExactRewardTrainer(ExactResume, RewardTrainer):
    """TRL's, which resumes exactly."""


def rendered_pairs(rows: list[dict], renderer: Renderer, max_length: int, where: str) -> tuple[Dataset, list[dict]]:
    """`chosen_ids` and `rejected_ids` (prompt and response, EOS last) of each pair, and the rows that fitted.

    Raises:
        UserError: no pair fits.
    """
    chosen, rejected, kept = [], [], []
    for row in rows:
        prompt = renderer.prompt_ids(row["prompt"])
        pair = [prompt + renderer.response_ids(row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if max(map(len, pair)) <= max_length:
            chosen.append(pair[0])
            rejected.append(pair[1])
            kept.append(row)
    if not kept:
        raise UserError(f"{where}: none of {len(rows)} pairs fits max_length {max_length} tokens: raise it")
    if len(kept) < len(rows):
        logger.info("%s: dropped %d of %d pairs above %d tokens", where, len(rows) - len(kept), len(rows), max_length)
    return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}), kept


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    section = ctx.recipe.reward
    compute_dtype(ctx.recipe)
    check_trackers(ctx.recipe.logging.report_to)
    check_trainer_args(RewardConfig, section.trainer, "reward.trainer")
    check_position_limit(ctx.inputs["sft"].model_dir, section.max_length, "reward.max_length")


def build(ctx: StageContext) -> dict[str, Any]:
    """Train, publish, measure; see `Stage.build`."""
    recipe, section = ctx.recipe, ctx.recipe.reward
    sft_dir = ctx.inputs["sft"].model_dir
    tokenizer = load_tokenizer(sft_dir)
    renderer = Renderer(tokenizer, recipe.model.chat)
    train_rows = ctx.rows(section.data, section.split, "preference", limit=section.limit, seed=ctx.seed)
    train, train_rows = rendered_pairs(train_rows, renderer, section.max_length, "reward")
    test_rows = ctx.rows(section.data, section.eval_split, "preference")
    test, test_rows = rendered_pairs(test_rows, renderer, section.max_length, "reward eval")
    peft = lora_config(recipe.peft, "SEQ_CLS") if recipe.uses_peft("reward") else None
    values = in_curriculum_order(section.data, section.trainer)
    args = trainer_args(RewardConfig, values, ctx, max_length=None)  # longer pairs are gone already
    trainer = ExactRewardTrainer(
        new_reward_model(sft_dir, ctx.seed),
        args=args,
        train_dataset=train,
        eval_dataset=test if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=peft,
    )
    metrics = run_trainer(trainer, ctx)
    save_trained(trainer, tokenizer, ctx, new_reward_model(sft_dir, ctx.seed), "score")
    trainer.accelerator.wait_for_everyone()
    result: dict[str, Any] = {"tokenizer": tokenizer_identity(tokenizer), "metrics": metrics}
    if trainer.accelerator.is_main_process:
        measured = Measured(ctx, renderer)
        metrics |= measured.accuracy(test)
        if section.baselines:
            metrics |= baselines(train_rows, test_rows)
        result["reward_statistics"] = measured.statistics()
        write_card(
            ctx, metrics | result["reward_statistics"], "Scalar reward model; scores are raw (see the manifest)."
        )
    return result


class Measured:
    """Measurements of the published reward model: what PPO will load, not what training had in memory."""

    def __init__(self, ctx: StageContext, renderer: Renderer) -> None:
        self.ctx, self.renderer = ctx, renderer
        self.model = load_model(ctx.dir / "model", "score").to(PartialState().device).eval()

    def _scores(self, sequences: list[list[int]]) -> numpy.ndarray:
        return numpy.array(score_sequences(self.model, sequences, self.renderer.tokenizer.pad_token_id))

    def accuracy(self, pairs: Dataset) -> dict[str, float]:
        """Held-out accuracy with its 95 % Wilson interval; a tie counts one half."""
        margin = self._scores(pairs["chosen_ids"]) - self._scores(pairs["rejected_ids"])
        correct = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
        interval = wilson_interval(correct, len(margin))
        return {
            "accuracy": correct / len(margin),
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
            "pairs": len(margin),
            "margin": float(margin.mean()),
        }

    def statistics(self) -> dict[str, float]:
        """Mean and std of the raw score on responses that the SFT model samples; PPO shifts and scales by them."""
        recipe, section = self.ctx.recipe, self.ctx.recipe.reward
        name, split = (recipe.ppo.data, recipe.ppo.split) if recipe.ppo else (section.data, section.split)
        rows = self.ctx.rows(name, split, "prompts")
        rows = fitting_rows(rows, self.renderer, recipe.ppo.max_prompt_length if recipe.ppo else None)
        prompts = [row["prompt"] for row in rows[: section.normalize_samples]]
        samples = sample_published(self.ctx, self.renderer, prompts, self.ctx.inputs["sft"].model_dir, self.ctx.seed)
        ids = [p + r for p, r in zip(samples.prompt_ids, samples.response_ids, strict=True)]
        scores = self._scores(ids)
        return {
            "mean": float(scores.mean()),
            "std": float(max(scores.std(), 1e-6)),
            "samples": len(ids),
            "temperature": recipe.ppo.temperature if recipe.ppo else 1.0,
            "response_length": recipe.ppo.response_length if recipe.ppo else max(samples.lengths),
        }


def baselines(train_rows: list[dict], test_rows: list[dict]) -> dict[str, float]:
    """Held-out accuracy of trivial models: a reward model that does not beat them has learned nothing."""
    length, words = length_baseline(train_rows, test_rows), tfidf_baseline(train_rows, test_rows)
    return {"accuracy_length_only": length.accuracy, "accuracy_tfidf": words.accuracy}


STAGE = Stage(
    "reward",
    1,
    inputs=lambda recipe: ["sft"],
    data=lambda recipe: [recipe.reward.data] + ([recipe.ppo.data] if recipe.ppo else []),
    check=check,
    build=build,
    headline=("accuracy", "accuracy_tfidf", "accuracy_length_only"),
)
