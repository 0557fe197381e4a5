"""Supervised fine-tuning: TRL's SFTTrainer on rendered prompts and completions, EOS learned and measured."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from rlhf.cards import write_card
from rlhf.data import Renderer, check_split
from rlhf.errors import UserError
from rlhf.graphs import GraphPool
from rlhf.logs import check_trackers
from rlhf.models import (
    align_special_tokens,
    base_files,
    base_path,
    check_length,
    compute_dtype,
    has_plain_head,
    in_pieces,
    load_base_model,
    load_base_tokenizer,
    load_model,
    load_tokenizer,
    lora_config,
    position_limit,
    tokenizer_identity,
    trunk_of,
)
from rlhf.recipe import Recipe
from rlhf.sampling import Samples, fitting_rows, sample_responses
from rlhf.stage import Stage, StageContext
from rlhf.trainers import (
    GraphedTrainer,
    check_trainer,
    check_trainer_args,
    in_curriculum_order,
    run_trainer,
    save_trained,
    trainer_args,
)

logger = logging.getLogger(__name__)

COLUMNS = 32  # batches in CUDA graphs are as long as a multiple of it
# Settings of SFTConfig that change the loss, the rows or what a step does beside them.
UNGRAPHABLE = ("label_smoothing_factor", "packing", "padding_free", "activation_offloading", "use_liger_kernel")
UNGRAPHABLE += ("neftune_noise_alpha", "torch_empty_cache_steps")
DEFAULT_BUDGET = 128  # tokens of a response that is sampled without a `ppo` section


class ExactSFTTrainer(GraphedTrainer, SFTTrainer):
    """TRL's, which resumes exactly; on a GPU a small model's steps are CUDA graphs."""

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row; evaluations have the same collator."""
        sets: list[Any] = [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]
        return max(len(ids) for rows in sets for ids in rows["input_ids"])

    def columns(self) -> int:
        """What lengths are rounded up to: 16 shapes or fewer, unless `pad_to_multiple_of` asks for something else."""
        args: Any = self.args
        return math.lcm(COLUMNS * -(-self.longest // (16 * COLUMNS)), args.pad_to_multiple_of or 1)

    def ungraphable(self) -> str | None:
        """Also another loss than TRL's `nll` on padded rows, and rows that leave no room to round up."""
        args: Any = self.args
        if args.loss_type != "nll":
            return f"trainer.loss_type {args.loss_type}"
        if special := next((key for key in UNGRAPHABLE if getattr(args, key)), None):
            return f"trainer.{special}"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts"
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and -(-self.longest // self.columns()) * self.columns() > limit:
            return f"rows of {self.longest} tokens, rounded up to more than the model's {limit} positions,"
        if not has_plain_head(self.model):
            return "a model that scales or caps its logits"
        return super().ungraphable()

    def use_graphs(self, pool: GraphPool | None) -> None:
        """Also rounds up the lengths of batches."""
        self.data_collator.pad_to_multiple_of = self.columns()
        super().use_graphs(pool)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch; returns its loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.graphed is not None:
            entropy, right, counted, tokens = self.measured
            self._total_train_tokens = self._total_train_tokens + tokens.long()
            metrics = {"entropy": entropy / counted.clamp(min=1), "mean_token_accuracy": right / counted.clamp(min=1)}
            for key, value in metrics.items():
                self._metrics["train"][key].append(value)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's. In a graph the same without its waits: it picks the tokens that count, of which no number is known."""
        if self.graphed is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            hidden = trunk_of(plain)(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            loss, measured = token_losses(plain.get_output_embeddings(), hidden[:, :-1], inputs["labels"][:, 1:])
        self.measured = torch.cat([measured, inputs["attention_mask"].sum().unsqueeze(0)])
        items = measured[2] if num_items_in_batch is None else num_items_in_batch
        return loss / torch.as_tensor(items).clamp(min=1)


def token_losses(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and what metrics are made of, of the labels that are not -100.

    Args:
        head: the output layer, with V rows.
        hidden: [B,T,D]; only so many logits exist at a time as `LOGITS_BYTES` hold.
        labels: [B,T].

    Returns:
        a scalar in nats; [3] in float32: summed entropy in nats, tokens that are the likeliest ones, tokens.
    """
    pieces = in_pieces(partial(_token_losses, head), head.weight.shape[0], hidden.flatten(0, 1), labels.flatten())
    losses, measured = zip(*pieces, strict=True)
    return torch.stack(losses).sum(), torch.stack(measured).sum(dim=0)


def _token_losses(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    with torch.no_grad():
        logprobs, counted = logits.log_softmax(dim=-1), labels != -100
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        right = logprobs.argmax(dim=-1) == labels
        measured = torch.stack([(entropy * counted).sum(), (right & counted).sum(), counted.sum()])
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), measured


def rendered_rows(rows: list[dict], renderer: Renderer, max_length: int, where: str) -> Dataset:
    """Token ids and completion mask of each row; rows above `max_length` tokens are dropped and counted.

    Tokenised here and not by TRL: SFT, reward model and PPO see the same ids for the same conversation.

    Raises:
        UserError: no row fits.
    """
    input_ids, masks = [], []
    asked = [row["prompt"] for row in rows]
    completions = renderer.all_response_ids(asked, [row["completion"] for row in rows])
    for prompt, completion in zip(renderer.all_prompt_ids(asked), completions, strict=True):
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


def load_start_tokenizer(ctx: StageContext) -> PreTrainedTokenizerBase:
    """Tokenizer that SFT starts from: the pretrain artifact's, or the recipe's base's."""
    if "pretrain" in ctx.inputs:
        return load_tokenizer(ctx.inputs["pretrain"].model_dir)
    return load_base_tokenizer(ctx.recipe.model)


def load_start_model(ctx: StageContext, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Model that SFT starts from, fitted to its tokenizer."""
    if "pretrain" in ctx.inputs:
        return load_model(ctx.inputs["pretrain"].model_dir)
    model = load_base_model(ctx.recipe.model, tokenizer)
    align_special_tokens(model, tokenizer)
    return model


def start_limit(ctx: StageContext) -> int | None:
    """Position limit of the model that SFT starts from; None where its config states none, or it is a GGUF file."""
    if "pretrain" in ctx.inputs:
        return position_limit(ctx.inputs["pretrain"].model_dir)
    section = ctx.recipe.model
    return position_limit(base_path(section), section) if section.gguf_file is None else None


def check_section(recipe: Recipe) -> None:
    """What the section alone tells, before there is a model to start from.

    Raises:
        UserError: a key or value that TRL does not have or take, no such data recipe, or no such split in it.
    """
    section = recipe.sft
    check_trainer_args(SFTConfig, section.trainer, "sft.trainer")
    check_split(section.data, section.split, "sft.split")
    if section.eval_split:
        check_split(section.data, section.eval_split, "sft.eval_split")


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    recipe, section = ctx.recipe, ctx.recipe.sft
    compute_dtype(recipe)
    check_trackers(recipe.logging.report_to)
    check_section(recipe)
    no_eval = None if section.eval_split else "name sft.eval_split, or set eval_strategy to 'no'"
    check_trainer(SFTConfig, section.trainer, ctx, no_eval)
    check_length(section.max_length, start_limit(ctx), "sft.max_length")
    if section.eval_split and section.eos_prompts:
        eos_budget(ctx)


def build(ctx: StageContext) -> dict[str, Any]:
    """Train, publish the (merged) model, measure the EOS rate; see `Stage.build`."""
    recipe, section = ctx.recipe, ctx.recipe.sft
    tokenizer = load_start_tokenizer(ctx)
    renderer = Renderer(tokenizer, recipe.model.chat)
    train_rows = ctx.rows(section.data, section.split, "sft", limit=section.limit, seed=ctx.seed)
    train = rendered_rows(train_rows, renderer, section.max_length, "sft")
    held_out, prompts = None, []
    if section.eval_split:
        rows = ctx.rows(section.data, section.eval_split, "sft")
        held_out = rendered_rows(rows, renderer, section.max_length, "sft eval")
        if section.eos_prompts:
            prompts = sampled_prompts(ctx, renderer, rows, section.eos_prompts, eos_budget(ctx))
    model = load_start_model(ctx, tokenizer)
    peft = lora_config(recipe.peft, "CAUSAL_LM") if recipe.uses_peft("sft") else None
    base = load_start_model(ctx, tokenizer) if peft else model  # PEFT changes the model it is given
    values = in_curriculum_order(section.data, section.trainer)
    args = trainer_args(SFTConfig, values, ctx, max_length=section.max_length, completion_only_loss=True)
    trainer = ExactSFTTrainer(
        model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, peft_config=peft
    )
    trainer.graph_steps("sft", section.cuda_graphs)
    metrics = run_trainer(trainer, ctx)
    if held_out is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    save_trained(trainer, tokenizer, ctx, base, "causal")
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        metrics |= measure_eos(ctx, renderer, prompts)
        write_card(ctx, metrics, "Supervised fine-tuned policy; also PPO's reference.")
    return {"tokenizer": tokenizer_identity(tokenizer), "metrics": metrics}


@dataclass(frozen=True)
class Budget:
    """Most tokens of a prompt (None = any) and of its response, where a policy is sampled outside of PPO."""

    prompt: int | None
    response: int


def sampling_budget(recipe: Recipe, limit: int | None, own: bool = False) -> Budget:
    """PPO's lengths: what it trains on is what gets measured. Without a `ppo` section: what the model has room for.

    Args:
        recipe: of the run.
        limit: of the model's positions; None = it states none.
        own: sft.eos_max_new_tokens goes before ppo.response_length.

    Raises:
        UserError: the recipe names more than the limit.
    """
    ppo, named = recipe.ppo, recipe.sft.eos_max_new_tokens
    if ppo is not None:
        response, key = (named, "sft.eos_max_new_tokens") if own and named else (ppo.response_length, "response_length")
        check_length(ppo.max_prompt_length + response, limit, f"ppo.max_prompt_length + {key}")
        return Budget(ppo.max_prompt_length, response)
    if named is not None:
        check_length(1 + named, limit, "a prompt of one token + sft.eos_max_new_tokens")
    response = named or min(DEFAULT_BUDGET, DEFAULT_BUDGET if limit is None else limit // 2)
    return Budget(None if limit is None else limit - response, response)


def sampled_prompts(ctx: StageContext, renderer: Renderer, rows: list[dict], count: int, budget: Budget) -> list:
    """The first `count` prompts that fit the budget.

    Raises:
        UserError: none does.
    """
    room = None
    if ctx.recipe.ppo is None:
        room = (
            f"the {budget.prompt} tokens that a response of {budget.response} leaves of the model's position limit: "
            "lower sft.eos_max_new_tokens, or take shorter prompts"
        )
    return [row["prompt"] for row in fitting_rows(rows, renderer, budget.prompt, room)[:count]]


def sample_published(ctx: StageContext, renderer: Renderer, prompts: list, model_dir: Any, length: int) -> Samples:
    """Responses of at most `length` tokens of a published policy, sampled as PPO does, where the recipe has one.

    Args:
        ctx: of the stage that asks.
        renderer: of the policy's tokenizer.
        prompts: texts or messages.
        model_dir: of the policy.
        length: most tokens of a response.
    """
    recipe, ppo = ctx.recipe, ctx.recipe.ppo
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


def eos_budget(ctx: StageContext) -> Budget:
    """Of the responses that show whether SFT taught the EOS."""
    return sampling_budget(ctx.recipe, start_limit(ctx), own=True)


def measure_eos(ctx: StageContext, renderer: Renderer, prompts: list) -> dict[str, float]:
    """Share of sampled responses to held-out prompts that end by themselves: PPO cannot teach an EOS never seen."""
    if not prompts:
        return {}
    samples = sample_published(ctx, renderer, prompts, ctx.dir / "model", eos_budget(ctx).response)
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
