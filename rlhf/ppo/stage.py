"""The ppo stage: prompts, models and rewards from artifacts; train; publish policy and critic."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase

from rlhf.cards import write_card
from rlhf.data import Renderer, check_split, load_data_recipe, load_rows
from rlhf.errors import UserError
from rlhf.functions import load_function, source_hashes
from rlhf.graphs import graph_pool
from rlhf.interrupt import finish_step_first
from rlhf.logs import MetricsWriter, check_trackers
from rlhf.metrics import PPO
from rlhf.models import (
    ActorCritic,
    check_position_limit,
    compile_blocks,
    compute_dtype,
    load_tokenizer,
    of_critic,
    special_attention,
    tokenizer_identity,
)
from rlhf.ppo.build import (
    Reference,
    build_actor_critic,
    build_generator,
    build_rewards,
    critic_source,
    is_adapter_of,
    publish_models,
    publish_policies,
    wants_compile,
)
from rlhf.ppo.checkpoint import Checkpointer
from rlhf.ppo.trainer import PPOTrainer, Prompts
from rlhf.recipe import PPOSection, Recipe, RewardGateSection
from rlhf.reward import gate
from rlhf.sampling import SAMPLED_WITH
from rlhf.stage import Stage, StageContext

logger = logging.getLogger(__name__)


def load_prompts(
    name: str, split: str, renderer: Renderer, max_length: int, limit: int | None = None, root: Path | None = None
) -> Prompts:
    """Prompts of a data recipe as ids and text; longer ones than `max_length` tokens are dropped and counted.

    `root` is the artifact directory, where cleaned rows are kept.

    Raises:
        UserError: none is left.
    """
    rows = load_rows(load_data_recipe(name), split, "prompts", root=root)
    ids = renderer.all_prompt_ids([row["prompt"] for row in rows])
    fits = [row for row in range(len(rows)) if len(ids[row]) <= max_length]
    if not fits:
        raise UserError(
            f"data recipe {name}: none of {len(rows)} prompts fits ppo.max_prompt_length {max_length}: raise it"
        )
    if len(fits) < len(rows):
        logger.info("prompts %s: dropped %d of %d above %d tokens", name, len(rows) - len(fits), len(rows), max_length)
    fits = fits[:limit]
    extra = sorted({column for row in rows for column in row} - {"prompt"})
    return Prompts(
        ids=[ids[row] for row in fits],
        texts=[renderer.prompt_text(rows[row]["prompt"]) for row in fits],
        columns={column: [rows[row].get(column) for row in fits] for column in extra},
    )


def fixed_prompts(ctx: StageContext, renderer: Renderer) -> Prompts:
    """Held-out prompts of the evaluations along the way. Without any, those that samples.jsonl shows each time.

    Where a data recipe has no such split and nothing is evaluated, they are the first ones that are trained on.
    """
    config, count = ctx.recipe.ppo, ctx.recipe.ppo.eval_prompts
    split = config.eval_split
    if not config.eval_every:
        count = ctx.recipe.logging.samples
        split = split if split in load_data_recipe(config.data).split.names else config.split
    return load_prompts(config.data, split, renderer, config.max_prompt_length, count, ctx.root)


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    recipe, config, sft = ctx.recipe, ctx.recipe.ppo, ctx.inputs["sft"]
    compute_dtype(recipe)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UserError("ppo: the launcher asks for DeepSpeed, which PPO does not support: use ddp.yaml or fsdp2.yaml")
    check_trackers(recipe.logging.report_to)
    check_position_limit(
        sft.model_dir, config.max_prompt_length + config.response_length, "ppo.max_prompt_length + response_length"
    )
    check_split(config.data, config.split, "ppo.split")
    if config.eval_every:
        check_split(config.data, config.eval_split, "ppo.eval_split")
    tracked = [key for key in PPO if key.startswith("eval/")]
    if config.best_metric is not None and config.best_metric not in tracked:
        raise UserError(f"ppo.best_metric {config.best_metric!r}: not measured on held-out prompts: one of {tracked}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for key in ("rollout_batch_size", "eval_prompts"):
        if getattr(config, key) % ranks:
            raise UserError(
                f"ppo.{key} {getattr(config, key)}: does not divide by {ranks} processes: change one of them"
            )
    for source in config.rewards:
        if source.function is not None:
            load_function(source.function)
        elif "reward_statistics" not in ctx.inputs[source.artifact].manifest:
            raise UserError(f"ppo.rewards: artifact {source.artifact} is no reward model: name a `reward` stage")
    check_reward_gate(ctx)
    warn_other_sampling(ctx)
    if config.gradient_checkpointing and recipe.uses_peft("ppo") and config.critic == "separate":
        raise UserError(
            "ppo.gradient_checkpointing: with LoRA and critic: separate the recomputation would run with the wrong "
            "adapter: set ppo.critic: shared, or gradient_checkpointing: false"
        )
    if recipe.uses_peft("ppo") and config.critic == "separate":
        source = critic_source(ctx)
        if source is not None and not is_adapter_of(source, sft):
            raise UserError(
                f"ppo.critic_init: {source.path} holds no adapter of this run's SFT model, which a LoRA critic starts "
                "from: add `reward` to peft.stages and redo it, or set ppo.critic_init: sft"
            )


def check_reward_gate(ctx: StageContext) -> None:
    """Say aloud what the reports on the reward models say; their measurements, by this recipe's thresholds.

    Raises:
        UserError: one says fail, and `ppo.ignore_reward_gate` is off.
    """
    config = ctx.recipe.ppo
    thresholds = ctx.recipe.reward.gate if ctx.recipe.reward else RewardGateSection()
    for source in config.rewards:
        if source.artifact is None or source.weight == 0:
            continue
        checks = gate.judge_artifact(ctx.inputs[source.artifact], thresholds)
        if checks is None:
            logger.warning("reward gate of %s: not measured: `make report STAGE=reward` does it", source.artifact)
            continue
        found, reasons = gate.verdict(checks), gate.lines(checks)
        logger.info("reward gate of %s: %s", source.artifact, found.upper())
        if found == "fail" and not config.ignore_reward_gate:
            failed = [reason for reason in reasons if reason.startswith("FAIL")]
            raise UserError(
                f"ppo.rewards: the gate of artifact {source.artifact} says {' | '.join(failed)}: mend the reward model "
                "(report.html beside it has more), ask for less in reward.gate, or set ppo.ignore_reward_gate=true"
            )
        for reason in reasons:
            logger.warning("reward gate of %s: %s", source.artifact, reason)


def warn_other_sampling(ctx: StageContext) -> None:
    """Say so where a reward model's mean and std were measured on samples of other settings than this run's."""
    config = ctx.recipe.ppo
    for source in config.rewards:
        statistics = ctx.inputs[source.artifact].manifest["reward_statistics"] if source.artifact else {}
        for key in ("data", "split", *SAMPLED_WITH):
            if statistics.get(key, getattr(config, key)) != getattr(config, key):
                logger.warning(
                    "reward statistics of %s were measured with %s %s, this run samples with %s: scores may not "
                    "average 0 on SFT samples; redo the reward stage with FORCE=1 and the new setting to be exact",
                    source.artifact,
                    key,
                    statistics[key],
                    getattr(config, key),
                )


def build(ctx: StageContext) -> dict[str, Any]:
    """Train and publish; see `Stage.build`."""
    tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
    trainer = build_trainer(ctx, tokenizer)
    with finish_step_first():
        trainer.train()
    trainer.writer.close()
    return _publish(ctx, trainer, tokenizer)


def build_trainer(ctx: StageContext, tokenizer: PreTrainedTokenizerBase) -> PPOTrainer:
    """Models, optimizer, rewards and prompts of the recipe, placed by Accelerate."""
    recipe, config = ctx.recipe, ctx.recipe.ppo
    renderer, dtype = Renderer(tokenizer, recipe.model.chat), compute_dtype(recipe)
    prompts = load_prompts(config.data, config.split, renderer, config.max_prompt_length, root=ctx.root)
    eval_prompts = fixed_prompts(ctx, renderer)
    accelerator = Accelerator(
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        cpu=recipe.hardware.device == "cpu" or not torch.cuda.is_available(),
        log_with=list(recipe.logging.report_to) or None,
        project_dir=str(ctx.dir),
    )
    set_seed(ctx.seed)
    accelerator.init_trackers("tensorboard" if recipe.logging.report_to == ["tensorboard"] else recipe.logging.project)
    model = build_actor_critic(ctx)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), lr=config.learning_rate, eps=config.adam_eps, weight_decay=0.0, fused=True
    )
    if accelerator.is_fsdp2:
        # Accelerate's own policy rounds what leaves the module to bf16 (log-probabilities!), and reduces gradients so.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(model, "generate")  # gathers weights around it, as around forward
    actor_critic = accelerator.unwrap_model(model)
    generator = build_generator(ctx, actor_critic, tokenizer, accelerator)  # it may copy the policy: before compiling
    if wants_compile(ctx, accelerator.device):
        compile_blocks(actor_critic)
    parts = [part for part in (actor_critic.policy, actor_critic.critic) if part is not None]
    pool = graph_pool(config.cuda_graphs, "ppo", parts, accelerator, config.gradient_checkpointing)
    packing = wants_packing(config.packing, pool is not None, actor_critic.plain_head, parts, accelerator)
    writer = MetricsWriter(ctx.dir, accelerator, config.total_steps, recipe.logging.samples)
    return PPOTrainer(
        config=config,
        model=model,
        optimizer=optimizer,
        reference=Reference(ctx, model, accelerator),
        rewards=build_rewards(ctx, model, accelerator, pool),
        generator=generator,
        prompts=prompts,
        eval_prompts=eval_prompts,
        decode=renderer.decode_response,
        pad_id=tokenizer.pad_token_id,
        seed=ctx.seed,
        accelerator=accelerator,
        writer=writer,
        checkpointer=Checkpointer(ctx.checkpoints, accelerator, config.keep_checkpoints, ctx.continued),
        graph_pool=pool,
        packing=packing,
    )


def parameter_groups(model: ActorCritic, config: PPOSection) -> list[dict[str, Any]]:
    """What AdamW trains: everything at one rate, or the policy and then the critic at its own."""
    if config.critic_learning_rate is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    critic = [p for name, p in model.named_parameters() if p.requires_grad and of_critic(name)]
    return [{"params": model.policy_parameters()}, {"params": critic, "lr": config.critic_learning_rate}]


def wants_packing(
    setting: str, graphs: bool, plain_head: bool, models: Sequence[Any], accelerator: Accelerator
) -> bool:
    """Whether responses are put side by side, each seeing itself alone.

    Args:
        setting: `ppo.packing`.
        graphs: whether micro-batches are CUDA graphs.
        plain_head: see `has_plain_head`: without it the logits of a whole row would be computed.
        models: that read the rows.
        accelerator: packing is for one process.

    Raises:
        UserError: it is asked for and cannot be, or would not pay.
    """
    if setting == "off" or (setting == "auto" and not graphs):
        return False
    reason = next((found for model in models if (found := special_attention(model))), None)
    if not plain_head:
        reason = "the model does more to its logits than its head"
    if accelerator.num_processes > 1:
        reason = f"there are {accelerator.num_processes} processes"
    if reason and setting == "on":
        raise UserError(f"ppo.packing on: {reason}: set ppo.packing: off")
    return reason is None


def _publish(ctx: StageContext, trainer: PPOTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    state = trainer.checkpointer.best_state(trainer)
    metrics: dict[str, Any] = dict(trainer.last_metrics)
    best = trainer.best[1] if trainer.best else trainer.ppo_step
    metrics |= {"published_ppo_step": best, "ppo_steps": trainer.ppo_step}
    if best == 0:
        logger.warning("no ppo_step was better than the SFT model by %s: it is published", ctx.recipe.ppo.best_metric)
    if "value_bias" in state:  # a sequence classifier's head has no place for it
        metrics["critic_bias"] = float(state["value_bias"])
    if trainer.accelerator.is_main_process:
        publish_models(ctx, tokenizer, state)
        publish_policies(ctx, tokenizer, trainer.checkpointer.policies())
        write_card(ctx, metrics, "Policy aligned with PPO; its critic is beside it in `critic/`.")
    return {
        "tokenizer": tokenizer_identity(tokenizer),
        "metrics": metrics,
        "stopped": trainer.stopped,
        "alerts": trainer.alerts.begun,
    }


def _inputs(recipe: Recipe) -> list[str]:
    artifacts = [source.artifact for source in recipe.ppo.rewards if source.artifact]
    return ["sft", *dict.fromkeys(artifacts)]


def _also(recipe: Recipe) -> dict[str, Any]:
    return {"functions": source_hashes([source.function for source in recipe.ppo.rewards])}


STAGE = Stage(
    "ppo",
    # 2: critic with a tokenizer that pads on the right, fixed samples each time; 3, 4: calibration by response, a least
    4,
    inputs=_inputs,
    data=lambda recipe: [recipe.ppo.data],
    check=check,
    build=build,
    also=_also,
    headline=("objective/scores", "objective/kl", "published_ppo_step"),
)
