"""Scalar reward model: TRL's RewardTrainer from the SFT artifact, measured on held-out pairs beside baselines."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from rlhf.cards import write_card
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.evaluation.statistics import wilson_interval
from rlhf.logs import check_trackers
from rlhf.models import (
    check_position_limit,
    compile_blocks,
    compute_dtype,
    keep_residuals_in,
    load_model,
    load_tokenizer,
    lora_config,
    new_reward_model,
    tokenizer_identity,
)
from rlhf.recipe import Recipe
from rlhf.reward.baselines import length_baseline, tfidf_baseline
from rlhf.reward.batches import LengthSampler, PairCollator, pair_lengths
from rlhf.reward.losses import pairwise_loss
from rlhf.sampling import fitting_rows, score_sequences
from rlhf.sft import sample_published
from rlhf.stage import Stage, StageContext
from rlhf.trainers import ExactResume, check_trainer_args, in_curriculum_order, run_trainer, save_trained, trainer_args

logger = logging.getLogger(__name__)

COMPILE_FROM_STEPS = 1000  # optimizer steps


class ExactRewardTrainer(ExactResume, RewardTrainer):
    """TRL's, which resumes exactly and keeps the device busy.

    Pairs of like length go together, the forward needs no mask, and metrics stay on the device until they are logged:
    TRL's own waits for it six times a step.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthSampler(pair_lengths(self.train_dataset), batch, args.seed, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        lengths = pair_lengths(eval_dataset)
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Bradley-Terry, as TRL's, on raw scores; `reward.trainer`'s `center_rewards_coefficient` applies."""
        # Causal attention never looks at the padding on the right. Without a mask it has its fastest kernel.
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        loss = pairwise_loss(chosen, rejected)
        centre = self.args.center_rewards_coefficient  # type: ignore[attr-defined]
        if centre is not None:
            loss = loss + centre * (chosen + rejected).square().mean()
        self._keep_metrics(scores.detach(), inputs["tokens"])
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _keep_metrics(self, scores: Tensor, tokens: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        lead = torch.sub(*scores.chunk(2))
        means = torch.stack([scores.mean(), (lead > 0).float().mean(), lead.mean()])
        extremes = self.accelerator.gather(torch.stack([scores.min(), scores.max()]).unsqueeze(0))
        mean, accuracy, margin = self.accelerator.reduce(means, "mean")
        if mode == "train":
            self._total_train_tokens = self._total_train_tokens + self.accelerator.reduce(tokens, "sum")
        values = {"mean_reward": mean, "accuracy": accuracy, "margin": margin}
        values |= {"min_reward": extremes[:, 0].min(), "max_reward": extremes[:, 1].max()}
        for key, value in values.items():
            self._metrics[mode][key].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The only place where metrics leave the device."""
        kept = self._metrics["train" if self.model.training else "eval"]
        device = self.accelerator.device
        for key, values in kept.items():  # those of before a resume are plain numbers
            kept[key] = torch.stack([torch.as_tensor(value, device=device).double() for value in values]).tolist()
        super().log(logs, start_time)


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
    options = {"train_sampling_strategy": "group_by_length"} | in_curriculum_order(section.data, section.trainer)
    args = trainer_args(RewardConfig, options, ctx, max_length=None)  # longer pairs are gone already
    trainer = reward_trainer(ctx, new_reward_model(sft_dir, ctx.seed), args, tokenizer, train, test)
    metrics = run_trainer(trainer, ctx)
    with torch.compiler.set_stance("force_eager"):  # one forward, of another precision
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


def reward_trainer(
    ctx: StageContext,
    model: PreTrainedModel,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset,
) -> ExactRewardTrainer:
    """The trainer of `model` on rendered pairs."""
    recipe = ctx.recipe
    trainer = ExactRewardTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=test if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        data_collator=PairCollator(tokenizer.pad_token_id),
        peft_config=lora_config(recipe.peft, "SEQ_CLS") if recipe.uses_peft("reward") else None,
    )
    trainer.train_dataset = [{key: torch.tensor(ids) for key, ids in pair.items()} for pair in train]
    for module in trainer.model.modules():  # GPT-2 would look for padding without a mask: a wait for the device
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
    keep_residuals_in(torch.bfloat16 if args.bf16 else torch.float32, trainer.model)
    if wants_compile(recipe, len(train), args):
        compile_blocks(trainer.model)
    return trainer


def wants_compile(recipe: Recipe, pairs: int, args: Any) -> bool:
    """Whether the blocks are compiled: it costs about a minute, which a short run does not earn back."""
    if recipe.reward.compile != "auto":
        return recipe.reward.compile == "on"
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * pairs / each
    return args.device.type == "cuda" and steps >= COMPILE_FROM_STEPS


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
    2,  # 2: pairs of like length in a batch
    inputs=lambda recipe: ["sft"],
    data=lambda recipe: [recipe.reward.data] + ([recipe.ppo.data] if recipe.ppo else []),
    check=check,
    build=build,
    headline=("accuracy", "accuracy_tfidf", "accuracy_length_only"),
)
