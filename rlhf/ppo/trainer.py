"""PPO. One step reads here, top to bottom; the formulas are in advantages.py and losses.py.

Proximal Policy Optimization (Schulman et al. 2017) with a per-token KL penalty against the SFT model (Ziegler et al.
2019), in the details that Huang et al. 2024 found to matter.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.errors import UserError
from rlhf.evaluation.text_metrics import distinct_n, refusal_rate
from rlhf.graphs import Graphed, GraphPool, allocate_gradients, recorded
from rlhf.interrupt import Interrupted, requested
from rlhf.logs import MetricsWriter
from rlhf.models import Outputs, Response, explicit_masks
from rlhf.ppo.advantages import gae, kl_penalty, token_rewards
from rlhf.ppo.alerts import Alerts
from rlhf.ppo.checkpoint import Checkpointer
from rlhf.ppo.generation import Generator
from rlhf.ppo.guards import BadUpdates, bad_rollout, bad_update
from rlhf.ppo.kl_control import AdaptiveKL, FixedKL
from rlhf.ppo.losses import policy_loss, value_loss
from rlhf.ppo.masking import affine_fit, masked_mean, masked_moments, masked_whiten
from rlhf.ppo.packing import CPU, GPU, graph_shapes, packed_shapes
from rlhf.ppo.perf import FlopCounter, compilations, matmul_peak, now, padding_share
from rlhf.ppo.rewards import RunningMoments, ScoreSource, aggregate, shape_scores
from rlhf.ppo.rollout import (
    PromptStream,
    Rollout,
    add_logprobs_and_values,
    sample,
    token_batches,
    uniforms,
)
from rlhf.recipe import PPOSection
from rlhf.stage import peak_memory_gib

logger = logging.getLogger(__name__)

TRAIN, EVAL, PERMUTE = 0, 1, 2  # streams of random numbers
LEAST_SCALE = 0.3  # of a calibrated critic; docs/results.md has what a smaller one costs
STATISTICS = (
    *("loss/policy_avg", "policy/clipfrac_avg", "policy/approxkl_avg"),
    *("loss/value_avg", "val/clipfrac_avg", "val/ratio", "policy/grad_norm"),
)


@dataclass
class Prompts:
    """Prompts as tokens and as text, with the extra columns of their rows."""

    ids: list[list[int]]
    texts: list[str]
    columns: dict[str, list]

    def take(self, rows: Sequence[int]) -> Prompts:
        """The given rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Prompts([self.ids[row] for row in rows], [self.texts[row] for row in rows], columns)


@dataclass
class Targets:
    """What the two losses of an update aim at, [B,R] each, the same on every rank."""

    advantages: Tensor
    returns: Tensor


class MicroBatch(NamedTuple):
    """What one forward and backward needs: tensors alone, so that a CUDA graph can hold it.

    Attributes:
        input_ids, attention_mask: [b,T'].
        mask, logprobs, advantages, values, returns: [b,R'], see `Rollout` and `Targets`.
        tokens: scalar, of the whole mini-batch on all ranks: the denominator.
        weight: scalar, of the loss in the backward pass.
        before: of packed rows, the places [N] before the response tokens; the others are [N] then.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    tokens: Tensor
    weight: Tensor
    before: Tensor | None = None


class PPOTrainer:
    """Trains an ActorCritic on prompts against reward sources.

    Args:
        config: the recipe's `ppo` section.
        model: ActorCritic as `accelerator.prepare` returned it.
        optimizer: prepared; its parameters are the trainable ones of `model`.
        reference: (input ids, attention mask, R' or places) -> log-probabilities under the reference policy.
        rewards: weighted sources of scores.
        generator: samples responses of the current policy.
        prompts, eval_prompts: what is trained on; what is evaluated, or only shown in samples.jsonl, along the way.
        decode: response ids -> text.
        pad_id: for left-padding prompts.
        seed: of sampling, of the order of prompts and of mini-batches.
        accelerator, writer, checkpointer: placement, logs, resume.
        graph_pool: of CUDA graphs that replay micro-batches (one process, not sharded); None = no graphs.
        packing: several responses side by side in a row of a micro-batch.
    """

    def __init__(
        self,
        config: PPOSection,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reference: Callable[[Tensor, Tensor, Response], Tensor],
        rewards: list[ScoreSource],
        generator: Generator,
        prompts: Prompts,
        eval_prompts: Prompts | None,
        decode: Callable[[Sequence[int]], str],
        pad_id: int,
        seed: int,
        accelerator: Accelerator,
        writer: MetricsWriter,
        checkpointer: Checkpointer,
        graph_pool: GraphPool | None = None,
        packing: bool = False,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.reference, self.rewards, self.generator = reference, rewards, generator
        self.prompts, self.eval_prompts = prompts, eval_prompts
        self.decode, self.pad_id, self.seed = decode, pad_id, seed
        self.accelerator, self.writer, self.checkpointer = accelerator, writer, checkpointer
        self.stream = PromptStream(len(prompts.ids), config.rollout_batch_size, seed)
        self.running = RunningMoments() if config.normalize_scores else None
        adaptive = config.kl_target is not None
        self.kl_controller = (
            AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon) if adaptive else FixedKL(config.kl_coef)
        )
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ppo_step = self.optimizer_step = 0
        self.best: tuple[float, int] | None = None  # value of best_metric, ppo_step
        self.last_metrics: dict[str, float] = {}
        self.stopped = ""
        self.flops = FlopCounter(accelerator.unwrap_model(model))
        self.peak = matmul_peak(
            accelerator.device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        )
        self.bad_updates = BadUpdates(writer.directory, config.max_bad_updates, accelerator)
        self.alerts = Alerts(config)
        self.graphs = graph_pool is not None
        self.shapes = CPU if accelerator.device.type == "cpu" else GPU
        longest = max(map(len, prompts.ids + (eval_prompts.ids if eval_prompts else []))) + config.response_length
        budget = config.max_tokens_per_micro_batch
        if self.graphs:
            self.shapes = graph_shapes(budget, longest, config.response_length, config.mini_batch_size)
        self.packed = packed_shapes(budget, longest, self.graphs, config.packing == "on") if packing else None
        self.read = Graphed(self._read, graph_pool)
        self.forward_backward = Graphed(
            self._forward_backward, graph_pool, prepare=lambda: allocate_gradients(self.parameters)
        )

    # ------------------------------------------------------------------------------------------------------ the run
    def train(self) -> None:
        """Run (or continue) until `total_episodes`, `max_kl`, or an error."""
        self.restore()
        if self.ppo_step == 0:
            fixed = self.evaluate()[1] if self.config.eval_every else self.respond()
            self.writer.write_samples(0, None, fixed, self.decode)
        while self.ppo_step < self.config.total_steps and not self.stopped:
            metrics, rollout = self.step()
            self.ppo_step += 1
            metrics |= self.alerts.check(metrics, self._judges(rollout))
            self._stop_if_asked(metrics)
            fixed = None
            if self._due(self.config.eval_every):
                held_out, fixed = self.evaluate()
                metrics |= held_out
            self.writer.write(metrics)
            self.last_metrics = {key: value for key, value in metrics.items() if not key.startswith("perf/")}
            sampled = self.ppo_step == 1 or self._due(self.config.sample_every)
            if sampled and not self.config.eval_every:
                fixed = self.respond()
            self.writer.write_samples(self.ppo_step, rollout if sampled else None, fixed, self.decode)
            if self.bad_updates.too_many:
                self._give_up()
            if self._due(self.config.keep_policies_every):
                self.checkpointer.save_policy(self)  # before the checkpoint, after which this step is not run again
            signal, bad = requested(), self._had_bad_update()
            # Not in a step with a bad update: the checkpoint from before it stays.
            if not bad and (signal or self._due(self.config.checkpoint_every or self.config.total_steps)):
                self.checkpointer.save(self)
            if signal:
                done = "is done, not saved for its bad update" if bad else "is done and saved"
                raise Interrupted(signal, f"ppo_step {self.ppo_step} of {self.config.total_steps} {done}")

    def _due(self, every: int | None) -> bool:
        """Whether something that happens every so many ppo_steps happens now; at the end it does in any case."""
        if every is None:
            return False
        return self.ppo_step % every == 0 or self.ppo_step == self.config.total_steps or bool(self.stopped)

    def step(self) -> tuple[dict[str, float], Rollout]:
        """One ppo_step: sample, score, estimate advantages, update. Returns its metrics and its rollout."""
        config, started = self.config, now(self.accelerator.device)

        # 1. Sample one response per prompt from the current policy.
        rollout = self.rollout(self.prompts.take(self.stream.indices(self.ppo_step)), TRAIN, self.ppo_step)
        generated = now(self.accelerator.device)

        # 2. Score the responses; log-probabilities of policy and reference, values of the critic.
        self.score(rollout, update=True)
        add_logprobs_and_values(rollout, self.read, config.max_tokens_per_micro_batch, self.accelerator)
        mask = rollout.response_mask

        # 3. Reward of each token: -kl_coef * KL, and the score on the last one.
        kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
        rewards = token_rewards(rollout.scores, kl, mask, self.kl_controller.kl_coef)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if self.ppo_step == 0 and config.calibrates_critic:
            self._calibrate_critic(rollout, rewards)
        rollout.rewards = rewards

        # 4. Advantages, whitened over the global batch, and the critic's targets.
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        targets = Targets(masked_whiten(advantages, mask), returns)
        scored = now(self.accelerator.device)

        # 5. Several passes of clipped updates.
        statistics, mini_batches = self.update(rollout, targets)
        metrics = self.metrics(rollout, targets, statistics)
        if math.isfinite(metrics["objective/kl"]):  # NaN would stay in the coefficient
            self.kl_controller.update(metrics["objective/kl"], config.rollout_batch_size)
        return metrics | self._timing(rollout, mini_batches, started, generated, scored), rollout

    def update(self, rollout: Rollout, targets: Targets) -> tuple[list[dict[str, float]], int]:
        """`num_ppo_epochs` passes over the rollout in shuffled mini-batches.

        Returns:
            Statistics of each mini-batch that was applied (of all where none was), and how many were computed.
        """
        found = bad_rollout(rollout)
        if found:
            self._skip(found, rollout, targets, range(len(rollout.prompts)))
            return [dict.fromkeys(STATISTICS, math.nan)], 0
        applied, skipped = [], []
        for number, rows in enumerate(self._mini_batches()):
            self._set_learning_rate(number)
            statistics = self._optimizer_step(rollout, targets, rows)
            found = bad_update(statistics)
            if found:
                skipped.append(statistics)
                self._skip(found, rollout, targets, rows)
                if self.bad_updates.too_many:
                    break
                continue
            applied.append(statistics)
            self.optimizer_step += 1
            if self.config.target_kl is not None and statistics["policy/approxkl_avg"] > self.config.target_kl:
                break
        return applied or skipped, len(applied) + len(skipped)

    def _optimizer_step(self, rollout: Rollout, targets: Targets, rows: list[int]) -> dict[str, float]:
        """One mini-batch: losses over all its tokens, on all ranks, in micro-batches; then one step of AdamW.

        Where the loss or the gradient is not finite, on any rank, no rank takes the step.
        """
        ranks = self.accelerator.num_processes
        tokens = sum(
            rollout.response_lengths[row] for row in rows
        )  # of the whole mini-batch, all ranks: the denominator
        totals = torch.zeros(6, device=rollout.response_mask.device)
        waits = self.ppo_step < self.config.critic_warmup_steps  # the policy, while a fresh critic finds its feet
        forward_backward = self._forward_backward if waits else self.forward_backward
        batches = list(token_batches(rollout, rows, self.config.max_tokens_per_micro_batch, self.accelerator))
        for number, (batch, counts) in enumerate(batches):
            last = number == len(batches) - 1
            with _sync_gradients(self.accelerator, self.model, last):
                # DDP and FSDP average gradients over ranks; ours are shares of one sum.
                micro = (  # see MicroBatch
                    *(batch.input_ids, batch.attention_mask, batch.fit(rollout.response_mask)),
                    *(batch.fit(rollout.logprobs), batch.fit(targets.advantages)),
                    *(batch.fit(rollout.values), batch.fit(targets.returns)),
                    *(totals.new_full((), value) for value in (tokens, ranks * float(counts))),
                    *batch.before,
                )
                totals += forward_backward(*micro) * float(counts)
        if waits:
            for parameter in self.accelerator.unwrap_model(self.model).policy_parameters():
                parameter.grad = None
        norm = totals.new_tensor([self._clip_gradients() / ranks])  # the same on every rank: summed, it is itself
        values = self.accelerator.reduce(torch.cat([totals, norm]), "sum").tolist()
        statistics = dict(zip(STATISTICS, values, strict=True))
        if not bad_update(statistics):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphs)
        return statistics

    def _forward_backward(self, *tensors: Tensor) -> Tensor:
        """Gradients of one micro-batch (its share of the mini-batch's); returns six statistics, shares as well."""
        batch = MicroBatch(*tensors)
        packed = batch.before is not None
        response = batch.before if packed else batch.mask.shape[1]
        with explicit_masks() if packed else nullcontext():
            new: Outputs = self.model(batch.input_ids, batch.attention_mask, response, self.config.temperature)
            loss, parts = self._losses(new, batch)
            self.accelerator.backward(loss * batch.weight)
        return parts

    def _losses(self, new: Outputs, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        config, mask, tokens = self.config, batch.mask, batch.tokens
        pg_loss, pg_clipfrac, approxkl = policy_loss(
            new.logprobs, batch.logprobs, batch.advantages, mask, config.cliprange, denominator=tokens
        )
        vf_loss, vf_clipfrac = value_loss(
            new.values, batch.values, batch.returns, mask, config.cliprange_value, denominator=tokens
        )
        log_ratio = torch.where(mask, new.logprobs.detach() - batch.logprobs, 0)
        ratio = torch.where(mask, log_ratio.exp(), 0).sum() / tokens
        parts = torch.stack([pg_loss.detach(), pg_clipfrac, approxkl, vf_loss.detach(), vf_clipfrac, ratio])
        return pg_loss + config.vf_coef * vf_loss, parts

    @torch.no_grad()
    def _read(self, input_ids: Tensor, attention_mask: Tensor, *before: Tensor, length: int) -> tuple[Tensor, ...]:
        """Log-probabilities, values, entropy and the reference's log-probabilities [b,R'] or [N] of responses."""
        response = before[0] if before else length
        with explicit_masks() if before else nullcontext():
            out: Outputs = self.model(input_ids, attention_mask, response, self.config.temperature, mode="rollout")
            assert out.entropy is not None
            return out.logprobs, out.values, out.entropy, self.reference(input_ids, attention_mask, response)

    # ----------------------------------------------------------------------------------------------------- parts of it
    def rollout(self, prompts: Prompts, stream: int, step: int) -> Rollout:
        """Sample responses; the same for the same stream and step, however many ranks there are."""
        noise = uniforms(len(prompts.ids), self.config.response_length, self.seed, stream, step)
        self.generator.sync()
        return sample(
            self.generator,
            prompts.ids,
            noise,
            self.config.temperature,
            self.config.top_p,
            self.pad_id,
            self.accelerator,
            self.decode,
            prompts.texts,
            prompts.columns,
            self.shapes,
            self.packed,
        )

    def score(self, rollout: Rollout, update: bool) -> None:
        """Fill in `raw_scores` of every source and the `scores` that PPO maximises."""
        config = self.config
        budget = config.max_tokens_per_micro_batch
        rollout.raw_scores = {s.name: s.score(rollout, budget, self.accelerator) for s in self.rewards}
        rewarding = [source for source in self.rewards if source.weight != 0]  # weight 0: a judge, only measured
        raw = [rollout.raw_scores[source.name] for source in rewarding]
        weights = [source.weight for source in rewarding]
        scores = aggregate(raw, weights, config.reward_aggregation, config.uncertainty_coef)
        if update and self.running is not None and bool(torch.isfinite(scores).all()):  # NaN would stay in the mean
            self.running.update(scores)
        rollout.scores = shape_scores(
            scores,
            rollout.finished,
            self.running,
            config.score_clip,
            config.missing_eos_penalty,
            config.missing_eos_mode,
        )

    def _calibrate_critic(self, rollout: Rollout, rewards: Tensor) -> None:
        """Fit the critic's scale and offset to the returns of the first rollout.

        A reward model was taught at the last token alone. Before it, its score is on a scale of its own: on `tiny` the
        mean is two standard deviations off and half of the spread is noise, which advantages then are full of. Where
        values are off by a constant, every end is a surprise, good or bad, and responses become shorter or longer:
        each response counts the same, since each has one end. Where it says nothing before the end the scale that fits
        is 0, and a critic with no head learns slowly: a little noise is cheaper.
        """
        mask = rollout.response_mask
        returns, _ = gae(rewards, torch.zeros_like(rewards), mask, self.config.gamma, lam=1.0)
        scale, offset = affine_fit(rollout.values, returns, mask, LEAST_SCALE)
        if math.isfinite(scale) and math.isfinite(offset):  # else the rollout is bad, and is not learned from
            say_calibrated(scale, offset, self.config)
            self.accelerator.unwrap_model(self.model).calibrate(scale, offset)
            rollout.values = torch.where(mask, scale * rollout.values + offset, 0)

    def respond(self) -> Rollout | None:
        """Responses of the current policy to the held-out prompts, always with the same random numbers, and scored."""
        if self.eval_prompts is None:
            return None
        rollout = self.rollout(self.eval_prompts, EVAL, 0)
        self.score(rollout, update=False)
        add_logprobs_and_values(rollout, self.read, self.config.max_tokens_per_micro_batch, self.accelerator)
        token_kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k1")
        rollout.rewards = token_rewards(rollout.scores, token_kl, rollout.response_mask, self.config.kl_coef)
        return rollout

    def evaluate(self) -> tuple[dict[str, float], Rollout | None]:
        """The current policy on held-out prompts, always with the same random numbers: metrics and responses."""
        rollout = self.respond()
        if rollout is None:
            return {}, None
        kl = _per_response(kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k1"), rollout.response_mask)
        score = float(rollout.scores.mean())
        metrics = {
            "eval/scores": score,
            "eval/kl": kl,
            "eval/rlhf_reward": score - self.config.kl_coef * kl,
            "eval/response_length": float(rollout.response_mask.sum(1).float().mean()),
            "eval/eos_rate": float(rollout.finished.float().mean()),
        }
        self._keep_best(metrics)
        return metrics, rollout

    def metrics(self, rollout: Rollout, targets: Targets, statistics: list[dict[str, float]]) -> dict[str, float]:
        """One row of metrics.jsonl; see docs/metrics.md."""
        mask = rollout.response_mask
        kl = _per_response(kl_penalty(rollout.logprobs, rollout.ref_logprobs, self.config.kl_estimator), mask)
        k1 = kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k1")
        penalty = -self.kl_controller.kl_coef * kl
        scores = float(rollout.scores.mean())
        residual = masked_moments(targets.returns - rollout.values, mask)[1]
        spread = masked_moments(targets.returns, mask)[1]
        drift = masked_mean((rollout.sampler_logprobs - rollout.logprobs).abs(), mask)
        row = {
            "ppo_step": self.ppo_step + 1,
            "episode": (self.ppo_step + 1) * self.config.rollout_batch_size,
            "optimizer_step": self.optimizer_step,
            "objective/kl": _per_response(k1, mask),
            "objective/entropy": _per_response(rollout.entropy, mask),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": scores + penalty,
            "objective/scores": scores,
            "objective/scores_std": float(rollout.scores.std(unbiased=False)),
            "objective/kl_coef": self.kl_controller.kl_coef,
            "val/explained_variance": float(1 - residual / spread.clamp(min=1e-8)),
            "val/values_avg": float(masked_mean(rollout.values, mask)),
            "rollout/response_length": float(mask.sum(1).float().mean()),
            "rollout/eos_rate": float(rollout.finished.float().mean()),
            "rollout/logprob_drift": float(drift),
            "rollout/distinct_2": distinct_n(rollout.responses, 2),
            "rollout/refusal_rate": refusal_rate(rollout.responses),
            "policy/bad_updates": self.bad_updates.count,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        row |= {f"objective/scores/{name}": float(value.mean()) for name, value in rollout.raw_scores.items()}
        for name in statistics[0]:
            row[name] = sum(part[name] for part in statistics) / len(statistics)
        return row

    def _timing(
        self, rollout: Rollout, mini_batches: int, started: float, generated: float, scored: float
    ) -> dict[str, float]:
        done, ranks = now(self.accelerator.device), self.accelerator.num_processes
        each = self.config.rollout_batch_size // self.config.mini_batch_size  # mini-batches of a pass
        flops = mini_batches / each * self.flops.training(rollout.prompt_lengths, rollout.response_lengths)
        one_pass = list(islice(self._mini_batches(), each))
        return {
            "perf/mfu": flops / (done - scored) / (self.peak * ranks),
            "perf/padding_share": padding_share(rollout, one_pass, self.config.max_tokens_per_micro_batch, ranks),
            "perf/episodes_per_second": rollout.response_mask.shape[0] / (done - started),
            "perf/generate_seconds": generated - started,
            "perf/score_seconds": scored - generated,
            "perf/train_seconds": done - scored,
            "perf/tokens_per_second": float(rollout.response_mask.sum()) / (done - started),
            "perf/peak_memory_gib": peak_memory_gib(),
            "perf/compilations": compilations(),
            "perf/cuda_graphs": recorded(),
        }

    def _mini_batches(self) -> Iterator[list[int]]:
        """Rows of each mini-batch: a fresh permutation of the global batch per PPO epoch."""
        size = self.config.rollout_batch_size
        for epoch in range(self.config.num_ppo_epochs):
            order = list(range(size))
            random.Random(f"{self.seed}/{PERMUTE}/{self.ppo_step}/{epoch}").shuffle(order)
            for first in range(0, size, self.config.mini_batch_size):
                yield order[first : first + self.config.mini_batch_size]

    def _set_learning_rate(self, number: int) -> None:
        """Linear warm-up, then linear to 0, by planned optimizer steps: an early stop by target_kl skips some."""
        config = self.config
        each = config.num_ppo_epochs * (config.rollout_batch_size // config.mini_batch_size)
        total, step = each * config.total_steps, each * self.ppo_step + number
        warmup = math.ceil(config.warmup_ratio * total)
        factor = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
        peaks = config.learning_rate, config.critic_learning_rate or config.learning_rate  # see `parameter_groups`
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=False):
            group["lr"] = peak * factor

    def _clip_gradients(self) -> float:
        """Norm before clipping; clips to `max_grad_norm` if set."""
        limit = self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # sharded by FSDP2

    def _skip(self, found: dict[str, int], rollout: Rollout, targets: Targets, rows: Sequence[int]) -> None:
        self.bad_updates.record(self.ppo_step + 1, found, rollout, rows, vars(targets))

    def _had_bad_update(self) -> bool:
        return self.bad_updates.last_step == self.ppo_step

    def _give_up(self) -> None:
        if not self.checkpointer.steps():  # the weights are those from before: no bad update was applied
            self.checkpointer.save(self)
        self.writer.close()
        raise UserError(self.bad_updates.advice())

    def _judges(self, rollout: Rollout) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of the sources that are measured and not trained on."""
        scores = {source.name: rollout.raw_scores[source.name] for source in self.rewards if source.weight == 0}
        return {name: (float(x.mean()), float(x.std(unbiased=False))) for name, x in scores.items()}

    def _stop_if_asked(self, metrics: dict[str, float]) -> None:
        limit = self.config.max_kl
        if limit is not None and metrics["objective/kl"] > limit:
            self.stopped = f"objective/kl {metrics['objective/kl']:.2f} is above ppo.max_kl {limit}"
        else:
            self.stopped = self.alerts.stop(metrics)
        if self.stopped:
            logger.warning("stopping at ppo_step %d: %s", self.ppo_step, self.stopped)

    def _keep_best(self, metrics: dict[str, float]) -> None:
        name = self.config.best_metric
        if name is None:
            return
        if math.isfinite(metrics[name]) and (self.best is None or metrics[name] > self.best[0]):
            self.best = (metrics[name], self.ppo_step)
            self.checkpointer.save_best(self)

    # ---------------------------------------------------------------------------------------------------------- resume
    def state_dict(self) -> dict[str, object]:
        """Everything but tensors: counters, KL coefficient, running statistics, the best step. Plain JSON.

        There is no generator state: random numbers and data order are functions of the seed and `ppo_step`.
        """
        return {
            "ppo_step": self.ppo_step,
            "optimizer_step": self.optimizer_step,
            "kl_controller": self.kl_controller.state_dict(),
            "running": self.running.state_dict() if self.running else None,
            "best": self.best,
            "stopped": self.stopped,
            "last_metrics": self.last_metrics,
            "bad_updates": self.bad_updates.count,
            "alerts": self.alerts.state_dict(),
        }

    def restore(self) -> None:
        """Continue from the last whole checkpoint, if there is one."""
        state = self.checkpointer.load(self)
        if state is None:
            self.writer.rewind(-1)  # an earlier attempt may have logged steps that no checkpoint holds
            return
        self.ppo_step, self.optimizer_step = state["ppo_step"], state["optimizer_step"]
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.running is not None:
            self.running.load_state_dict(state["running"])
        self.best = tuple(state["best"]) if state["best"] else None
        self.stopped, self.last_metrics = state["stopped"], state["last_metrics"]
        self.bad_updates.count = state["bad_updates"]
        self.alerts.load_state_dict(state["alerts"])
        self.writer.rewind(self.ppo_step)
        logger.info("continuing after ppo_step %d", self.ppo_step)


def _per_response(x: Tensor, mask: Tensor) -> float:
    """Sum over a response, mean over responses."""
    return float(torch.where(mask, x, 0).sum(dim=1).mean())


def _sync_gradients(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients only with the last micro-batch."""
    return nullcontext() if last else accelerator.no_sync(model)


def say_calibrated(scale: float, offset: float, config: PPOSection) -> None:
    """What the first returns made of the critic, and what to do where they have little to do with it."""
    slow = (config.critic_learning_rate or config.learning_rate) < 2 * config.learning_rate
    hint = (
        "; less would fit better, it says little of them: ppo.critic_learning_rate, 3 to 10 times the policy's, helps"
    )
    logger.info(
        "critic: %.2f times the reward model's values, %+.2f, for the first returns%s",
        *(scale, offset, hint if slow and scale <= LEAST_SCALE else ""),
    )


__all__ = ["PPOTrainer", "Prompts", "Targets"]
