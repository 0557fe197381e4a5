"""Scores of responses: reward artifacts and Python callables, weighted and aggregated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.errors import UserError
from rlhf.functions import TextFunction, call_text_function
from rlhf.models import last_position
from rlhf.ppo.rollout import Batch, Rollout, micro_batches, my_share


class ScoreSource(Protocol):
    """One source of scores."""

    name: str
    weight: float

    def score(self, rollout: Rollout, max_tokens: int, accelerator: Accelerator) -> Tensor:
        """Scores [B] float32, the same on every rank."""
        ...


class ModelScore:
    """A reward model's score at the last response token, shifted and scaled by its statistics on SFT samples.

    Args:
        name: shown in metrics.
        weight: see `ppo.rewards`.
        forward: batch -> score at every position [b,P'+R'].
        mean, std: of the raw score on SFT samples, from the artifact's manifest: SFT responses then average 0 (N+).
    """

    def __init__(
        self, name: str, weight: float, forward: Callable[[Batch], Tensor], mean: float = 0.0, std: float = 1.0
    ) -> None:
        self.name, self.weight, self.forward, self.mean, self.std = name, weight, forward, mean, std

    @torch.no_grad()
    def score(self, rollout: Rollout, max_tokens: int, accelerator: Accelerator) -> Tensor:
        """See `ScoreSource`."""
        rows = rollout.response_mask.shape[0]
        result = torch.zeros(rows, device=rollout.response_mask.device)
        for batch, counts in micro_batches(rollout, range(rows), max_tokens, accelerator):
            scores = last_position(self.forward(batch), batch.attention_mask)
            if counts:
                result[batch.index[: batch.count]] = (scores[: batch.count] - self.mean) / self.std
        return accelerator.reduce(result, "sum")


class FunctionScore:
    """A callable of prompts and responses (and dataset columns that it asks for by name).

    Args:
        name: shown in metrics.
        weight: see `ppo.rewards`.
        function: see `rlhf.functions.call_text_function`.
        timeout: seconds that one call may take; None = no limit.
    """

    def __init__(self, name: str, weight: float, function: TextFunction, timeout: float | None = None) -> None:
        self.name, self.weight, self.function, self.timeout = name, weight, function, timeout

    def score(self, rollout: Rollout, max_tokens: int, accelerator: Accelerator) -> Tensor:
        """See `ScoreSource`. Each rank scores its share of the responses.

        Raises:
            UserError: on every rank, when the function fails on one: the others would wait for it for hours.
        """
        count = len(rollout.prompts)
        share = my_share(count, accelerator)
        columns = {name: [values[row] for row in share] for name, values in rollout.columns.items()}
        prompts, responses = [rollout.prompts[row] for row in share], [rollout.responses[row] for row in share]
        failure = None
        try:
            mine = call_text_function(self.function, prompts, responses, columns, self.timeout)
        except UserError as error:
            failure, mine = error, [math.nan] * len(share)  # a function that works returns no NaN
        device = rollout.response_mask.device
        scores = accelerator.gather(torch.tensor(mine, dtype=torch.float64, device=device))[:count]
        if bool(torch.isnan(scores).any()):
            messages = gather_object([str(failure) if failure else ""]) if accelerator.num_processes > 1 else []
            raise failure or UserError(next(filter(None, messages)))
        return scores.float()


class RunningMoments:
    """Mean and variance of all scores seen, for `normalize_scores` (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.var = 0, 0.0, 1.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch [B]."""
        n, mean, var = scores.numel(), float(scores.mean()), float(scores.var(unbiased=False))
        total = self.count + n
        delta = mean - self.mean
        self.var = (self.var * self.count + var * n) / total + delta**2 * self.count * n / total**2
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation, at least 1e-6."""
        return max(self.var**0.5, 1e-6)

    def state_dict(self) -> dict[str, float]:
        """Plain JSON."""
        return {"count": self.count, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict`."""
        self.count, self.mean, self.var = int(state["count"]), state["mean"], state["var"]


def aggregate(scores: list[Tensor], weights: list[float], how: str, uncertainty_coef: float = 1.0) -> Tensor:
    """One score [B] from weighted sources [B]: their sum, mean, the worst of them, or penalised where they disagree.

    Source:
        Coste et al. 2023, *Reward Model Ensembles Help Mitigate Overoptimization*: mean, worst-case and
        uncertainty-weighted. They subtract the variance; we the standard deviation, which has the unit of a score.
    """
    weighted = torch.stack([weight * score for weight, score in zip(weights, scores, strict=True)])
    if how == "sum":
        return weighted.sum(dim=0)
    if how == "penalised":
        return weighted.mean(dim=0) - uncertainty_coef * weighted.std(dim=0, unbiased=False)
    return weighted.mean(dim=0) if how == "mean" else weighted.amin(dim=0)


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    running: RunningMoments | None,
    score_clip: float | None,
    missing_eos_penalty: float | None,
    missing_eos_mode: str,
) -> Tensor:
    """Normalise, clip, then the missing-EOS rule: what PPO maximises [B].

    The rule comes last, so that "replace" means score = -penalty whatever the scale of the reward model.
    """
    if running is not None:
        scores = scores / running.std
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if missing_eos_penalty is None:
        return scores
    penalised = -missing_eos_penalty * torch.ones_like(scores)
    if missing_eos_mode == "subtract":
        penalised = scores - missing_eos_penalty
    return torch.where(finished, scores, penalised)
