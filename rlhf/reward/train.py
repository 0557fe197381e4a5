"""Scalar reward model: TRL's RewardTrainer from the SFT artifact, measured on held-out pairs beside baselines."""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from rlhf.artifacts import Artifact, check_run
from rlhf.cards import write_card
from rlhf.data import Renderer, check_split
from rlhf.data.splits import group_key
from rlhf.errors import UserError
from rlhf.graphs import GraphPool
from rlhf.locks import locked
from rlhf.logs import check_trackers
from rlhf.models import (
    attention_options,
    captured_hidden_states,
    check_position_limit,
    compile_blocks,
    compute_dtype,
    keep_residuals_in,
    load_model,
    load_tokenizer,
    lora_config,
    new_reward_model,
    position_limit,
    tokenizer_identity,
)
from rlhf.ppo.alerts import warn_cut
from rlhf.ppo.packing import Sizes
from rlhf.recipe import Recipe, RewardSection
from rlhf.reward import report
from rlhf.reward.batches import EXTRA, PairCollator, pair_lengths
from rlhf.reward.objective import Objective, frozen_head
from rlhf.reward.probes import check_finite
from rlhf.sampling import SAMPLED_WITH, score_sequences
from rlhf.sft import Budget, sample_published, sampled_prompts, sampling_budget
from rlhf.stage import Stage, StageContext, check_lineage, differences, is_main_process, load_inputs
from rlhf.trainers import GraphedTrainer, check_trainer, in_curriculum_order, run_trainer, save_trained, trainer_args

logger = logging.getLogger(__name__)

COMPILE_FROM_STEPS = 1000  # optimizer steps
COLUMNS = Sizes(32, 4)  # of a batch that a CUDA graph replays


class ExactRewardTrainer(GraphedTrainer, RewardTrainer):
    """TRL's, which resumes exactly and keeps the device busy.

    Pairs of like length go together, the forward needs no mask, and nothing waits for the device.
    """

    objective: Objective
    _signature_columns: Any

    def ungraphable(self) -> str | None:
        """Also the language model beside the preferences: which tokens it counts is not known before."""
        return "reward.lm_coef" if self.objective.head is not None else super().ungraphable()

    def use_graphs(self, pool: GraphPool | None) -> None:
        """Also rounds up the lengths of batches, never above the positions that the model has."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.data_collator.columns = COLUMNS._replace(largest=limit)
        super().use_graphs(pool)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch; returns its loss."""
        inputs = self._prepare_inputs(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._keep_metrics(self.measured, inputs["tokens"])
        return loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted({*(self._signature_columns or ()), *EXTRA})

    def row_lengths(self) -> list[int]:
        """Tokens of the longer sequence of each pair."""
        return pair_lengths(self.train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        lengths = pair_lengths(eval_dataset)
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The recipe's objective on raw scores; without its options that is TRL's loss."""
        wanted = self.objective.head is not None
        with captured_hidden_states(self.accelerator.unwrap_model(model)) if wanted else nullcontext() as states:
            # Causal attention never looks at the padding on the right. Without a mask it has its fastest kernel.
            outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        loss = self.objective(scores, inputs, states[0] if states else None)
        self.measured = scores.detach()
        if not self.model.training:
            self._keep_metrics(self.measured, inputs["tokens"])
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


def rendered_pairs(
    rows: list[dict], renderer: Renderer, max_length: int, where: str, margin_scale: float | None = None
) -> tuple[Dataset, list[dict]]:
    """`chosen_ids` and `rejected_ids` (prompt and response, EOS last) of each pair, and the rows that fitted.

    Beside them `prompt_length` in tokens, and with `margin_scale` the pair's `margin` times it.

    Raises:
        UserError: no pair fits, or one has no number as its margin.
    """
    chosen, rejected, kept, prompts = [], [], [], []
    asked = [row["prompt"] for row in rows]
    answers = [renderer.all_response_ids(asked, [row[side] for row in rows]) for side in ("chosen", "rejected")]
    for row, prompt, *both in zip(rows, renderer.all_prompt_ids(asked), *answers, strict=True):
        pair = [prompt + answer for answer in both]
        if max(map(len, pair)) <= max_length:
            chosen.append(pair[0])
            rejected.append(pair[1])
            prompts.append(len(prompt))
            kept.append(row)
    if not kept:
        raise UserError(f"{where}: none of {len(rows)} pairs fits max_length {max_length} tokens: raise it")
    if len(kept) < len(rows):
        logger.info("%s: dropped %d of %d pairs above %d tokens", where, len(rows) - len(kept), len(rows), max_length)
    columns = {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": prompts}
    if margin_scale is not None:
        columns["margin"] = [margin_scale * _margin(row, where) for row in kept]
    return Dataset.from_dict(columns), kept


def _margin(row: dict, where: str) -> float:
    value = row.get("margin")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{where}: reward.margin_scale is set, but a pair's margin is {value!r}: name the column of numbers with "
            "`keep: {margin: column}` in the data recipe"
        )
    return float(value)


def mismatched(rows: list[dict], share: float, seed: int) -> list[dict]:
    """A share of the pairs once more, with the better answer to another prompt as the worse one.

    Pairs of one prompt seldom say that an answer has to be about it: where only the answers to harmful prompts refuse,
    a refusal becomes a good answer to everything. Liu et al. 2024 (RRM), their non-contextual pairs.

    Args:
        rows: pairs.
        share: of them, from 0 to 1.
        seed: of the choice.

    Raises:
        UserError: all rows have the same prompt.
    """
    rng, prompts = random.Random(seed), [group_key(row["prompt"]) for row in rows]
    picked = rng.sample(range(len(rows)), round(share * len(rows)))
    if picked and len(set(prompts)) < 2:
        raise UserError(
            "reward.mismatched: it takes another prompt's answers, and all pairs have one prompt: set it to 0"
        )
    made = []
    for number in picked:
        other = rng.randrange(len(rows))
        while prompts[other] == prompts[number]:
            other = rng.randrange(len(rows))
        made.append(rows[number] | {"rejected": rows[other]["chosen"]})
    return made


def truncated(pairs: Dataset, share: float, seed: int) -> Dataset:
    """A share of the pairs once more, with the better answer as the worse one, cut somewhere before its EOS.

    Every answer in preference data ends. What a reward model says of one that does not is left to chance, and where
    the better answers are the longer ones it is praise: a policy is cut at `ppo.response_length` all the time.

    Args:
        pairs: as `rendered_pairs` gives them. Answers without a token before the EOS are not taken.
        share: of them, from 0 to 1.
        seed: of the choice and of the cuts.
    """
    rng = random.Random(seed)
    ends = [len(ids) - 1 for ids in pairs["chosen_ids"]]  # where the EOS is
    long = [row for row, (end, start) in enumerate(zip(ends, pairs["prompt_length"], strict=True)) if end > start]
    picked = rng.sample(long, min(round(share * len(pairs)), len(long)))
    made = []
    for number in picked:
        row = pairs[number]
        cut = rng.randint(row["prompt_length"] + 1, ends[number])  # one token at least, all but the EOS at most
        made.append(row | {"rejected_ids": row["chosen_ids"][:cut]})
    columns = {name: [row[name] for row in made] for name in pairs.column_names}
    return Dataset.from_dict(columns, features=pairs.features)


def training_pairs(
    rows: list[dict], renderer: Renderer, section: RewardSection, seed: int, where: str
) -> tuple[Dataset, list[dict]]:
    """What is trained on, and the rows that fitted: those pairs, and what `truncated` and `mismatched` add to them.

    The rows are without what is added: baselines are fitted on the labels alone.
    """
    length, margin_scale = section.max_length, section.margin_scale
    train, kept = rendered_pairs(rows, renderer, length, where, margin_scale)
    added = [truncated(train, section.truncated, seed)] if section.truncated else []
    if more := mismatched(kept, section.mismatched, seed):
        added.append(rendered_pairs(more, renderer, length, f"{where}, mismatched", margin_scale)[0])
    return (concatenate_datasets([train, *added]) if added else train), kept


def load_pairs(ctx: StageContext, renderer: Renderer) -> tuple[tuple[Dataset, list[dict]], tuple[Dataset, list[dict]]]:
    """The training pairs, as `training_pairs` gives them, and the held-out ones, as `rendered_pairs` does."""
    section = ctx.recipe.reward
    rows = ctx.rows(section.data, section.split, "preference", limit=section.limit, seed=ctx.seed)
    test = ctx.rows(section.data, section.eval_split, "preference")
    train = training_pairs(rows, renderer, section, ctx.seed, "reward")
    return train, rendered_pairs(test, renderer, section.max_length, "reward eval", section.margin_scale)


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    section = ctx.recipe.reward
    compute_dtype(ctx.recipe)
    check_trackers(ctx.recipe.logging.report_to)
    check_trainer(RewardConfig, section.trainer, ctx)
    check_position_limit(ctx.inputs["sft"].model_dir, section.max_length, "reward.max_length")
    statistics_budget(ctx)
    check_split(section.data, section.split, "reward.split")
    check_split(section.data, section.eval_split, "reward.eval_split")
    check_split(*statistics_source(ctx.recipe), "ppo.split" if ctx.recipe.ppo else "reward.split")
    for other in section.report.ood if is_main_process() else ():  # a misspelt name must not cost the training
        ctx.rows(other.data, other.split, "preference", limit=1)


def build(ctx: StageContext) -> dict[str, Any]:
    """Train, publish, measure; see `Stage.build`."""
    recipe, section = ctx.recipe, ctx.recipe.reward
    sft_dir = ctx.inputs["sft"].model_dir
    tokenizer = load_tokenizer(sft_dir)
    renderer = Renderer(tokenizer, recipe.model.chat)
    (train, train_rows), (test, test_rows) = load_pairs(ctx, renderer)
    prompts = statistics_prompts(ctx, renderer)
    options = {"train_sampling_strategy": "group_by_length"} | in_curriculum_order(section.data, section.trainer)
    args = trainer_args(RewardConfig, options, ctx, max_length=None)  # longer pairs are gone already
    model = new_reward_model(sft_dir, ctx.seed, **attention_options(ctx.recipe.model))
    trainer = reward_trainer(ctx, model, args, tokenizer, train, test)
    metrics = run_trainer(trainer, ctx)
    with torch.compiler.set_stance("force_eager"):  # one forward, of another precision
        save_trained(trainer, tokenizer, ctx, new_reward_model(sft_dir, ctx.seed), "score")
    trainer.accelerator.wait_for_everyone()
    result: dict[str, Any] = {"tokenizer": tokenizer_identity(tokenizer), "metrics": metrics}
    if trainer.accelerator.is_main_process:
        found = report.report_on(ctx, ctx.dir, train_rows, test_rows)
        metrics |= headline(found)
        result["gate"] = report.summary(found)
        report.say(found, ctx.final)
        result["reward_statistics"] = statistics(ctx, renderer, prompts)
        verdict = result["gate"]["verdict"].upper()
        summary = f"Scalar reward model; scores are raw (see the manifest). Its gate says {verdict} (report.html)."
        write_card(ctx, metrics | result["reward_statistics"], summary)
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
    section = recipe.reward
    head = frozen_head(ctx.inputs["sft"].model_dir) if section.lm_coef else None
    trainer.objective = Objective(section, args.center_rewards_coefficient, head)
    trainer.train_dataset = [{key: torch.tensor(ids) for key, ids in pair.items()} for pair in train]
    for module in trainer.model.modules():  # GPT-2 would look for padding without a mask: a wait for the device
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
    keep_residuals_in(torch.bfloat16 if args.bf16 else torch.float32, trainer.model)
    if wants_compile(recipe, len(train), args):
        compile_blocks(trainer.model)
    trainer.graph_steps("reward", section.cuda_graphs)
    return trainer


def wants_compile(recipe: Recipe, pairs: int, args: Any) -> bool:
    """Whether the blocks are compiled: it costs about a minute, which a short run does not earn back."""
    if recipe.reward.compile != "auto":
        return recipe.reward.compile == "on"
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * pairs / each
    return args.device.type == "cuda" and steps >= COMPILE_FROM_STEPS


def statistics_source(recipe: Recipe) -> tuple[str, str]:
    """Data recipe and split of the prompts that the statistics are measured on: PPO's, where there is one."""
    return (recipe.ppo.data, recipe.ppo.split) if recipe.ppo else (recipe.reward.data, recipe.reward.split)


def statistics_budget(ctx: StageContext) -> Budget:
    """Lengths of the samples that the statistics are measured on."""
    return sampling_budget(ctx.recipe, position_limit(ctx.inputs["sft"].model_dir))


def statistics_prompts(ctx: StageContext, renderer: Renderer) -> list:
    """Prompts of the statistics; loaded before anything is trained, since there may be none that fits."""
    rows = ctx.rows(*statistics_source(ctx.recipe), "prompts")
    return sampled_prompts(ctx, renderer, rows, ctx.recipe.reward.normalize_samples, statistics_budget(ctx))


def statistics(ctx: StageContext, renderer: Renderer, prompts: list) -> dict[str, float]:
    """Mean and std of the raw score on responses that the SFT model samples; PPO shifts and scales by them.

    Of the published model: what PPO will load, not what training had in memory.
    """
    recipe = ctx.recipe
    name, split = statistics_source(recipe)
    samples = sample_published(ctx, renderer, prompts, ctx.inputs["sft"].model_dir, statistics_budget(ctx).response)
    if recipe.ppo is not None and recipe.ppo.missing_eos_penalty is not None:
        warn_cut(samples.eos_rate, recipe.ppo.response_length)
    ids = [p + r for p, r in zip(samples.prompt_ids, samples.response_ids, strict=True)]
    model = load_model(ctx.dir / "model", "score").to(PartialState().device).eval()
    scores = check_finite(score_sequences(model, ids, renderer.tokenizer.pad_token_id), "responses of the SFT model")
    return {
        "mean": float(scores.mean()),
        "std": float(max(scores.std(), 1e-6)),
        "samples": len(ids),
        "eos_rate": samples.eos_rate,
        "data": name,
        "split": split,
        **{key: getattr(recipe.ppo, key) for key in SAMPLED_WITH if recipe.ppo},
    }


def headline(found: dict[str, Any]) -> dict[str, float]:
    """What the manifest says of the report: held-out accuracy with its 95 % interval, and that of the baselines."""
    accuracy = found["accuracy"]
    metrics = {
        "accuracy": accuracy["value"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "pairs": accuracy["n"],
        "margin": found["margin"],
        "calibration_error": found["calibration"]["ece"],
    }
    keys = {"length-only": "accuracy_length_only", "TF-IDF": "accuracy_tfidf"}
    return metrics | {keys[name]: item["value"] for name, item in found["baselines"].items()}


PAIRS = ("data", "split", "eval_split", "max_length", "limit")  # settings that decide which pairs are used


def redo_report(recipe: Recipe, root: Path, run: str | None = None, folder: str = "reward") -> Artifact:
    """Measure a published reward model again, with the report settings and thresholds of the recipe at hand.

    Args:
        recipe: as for the stage.
        root: the artifact directory.
        run: folder of the run; None = the recipe's name.
        folder: of the reward model in it.

    Raises:
        UserError: no reward artifact, damaged, or not the one that this recipe and SFT model make.
    """
    ctx = StageContext(replace(STAGE, folder=folder), recipe, Path(root), check_run(run or recipe.name))
    recipe.section("reward")
    with locked(ctx.final.with_name(f"{folder}.lock")):
        load_inputs(ctx)
        check_lineage(ctx)
        artifact, sft = Artifact.load(ctx.final), ctx.inputs["sft"]
        made, wanted = artifact.manifest, recipe.reward.model_dump(mode="json")
        old = {"sft": made["inputs"]["sft"], "seed": made["seed"]} | {k: made["recipe"]["reward"].get(k) for k in PAIRS}
        new = {"sft": sft.hash, "seed": ctx.seed} | {key: wanted[key] for key in PAIRS}
        changed = differences(old, new)
        if changed:
            raise UserError(
                f"{ctx.final}: was not made by this recipe ({'; '.join(changed[:3])}): give the settings that made it, "
                "or `make reward` first"
            )
        artifact.verify(without=(report.REPORT, report.PAGE))  # they are made anew
        renderer = Renderer(load_tokenizer(sft.model_dir), recipe.model.chat)
        (_, train_rows), (_, test_rows) = load_pairs(ctx, renderer)
        return report.redo(ctx, artifact, train_rows, test_rows)


STAGE = Stage(
    "reward",
    3,  # 2: pairs of like length in a batch; 3: statistics of what PPO samples, tokenizer that pads on the right
    inputs=lambda recipe: ["sft"],
    data=lambda recipe: [recipe.reward.data] + ([recipe.ppo.data] if recipe.ppo else []),
    check=check,
    build=build,
    headline=("accuracy", "accuracy_tfidf", "accuracy_length_only"),
)
