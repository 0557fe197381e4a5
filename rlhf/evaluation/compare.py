"""Compares sampled responses of two or more policies to the same prompts: pure numbers in, a JSON-able dict out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import UserError
from rlhf.evaluation.statistics import Interval, bootstrap_interval, win_rate
from rlhf.evaluation.text_metrics import distinct_n, repetition_rate


@dataclass
class PolicySamples:
    """Responses of one policy, one entry per response in every list; all policies answer the same prompts in order.

    Attributes:
        name: of the policy, used in metric keys: no `/` and no spaces.
        prompts: prompt texts; a prompt that occurs several times is one unit of the intervals.
        responses: response texts.
        lengths: response tokens, EOS included.
        has_eos: whether the response ended by itself.
        kl: nats per response against the reference; 0 for the reference itself. None where the tokens are not the
            reference's, and there is none.
        scores: reward and judge scores by name, higher is better.
    """

    name: str
    prompts: list[str]
    responses: list[str]
    lengths: list[int]
    has_eos: list[bool]
    kl: list[float] | None
    scores: dict[str, list[float]]


def compare(samples: Sequence[PolicySamples], *, num_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Measures every policy, and every policy against the first.

    Metric keys, with `<p>` a policy, `<first>` the first one and `<s>` a score; each of `_mean`, `_delta` and
    `win_rate_<s>` has its 95 % limits beside it under the same key with `_low` and `_high` appended:

    - `<p>/<s>_mean`, `<p>/kl_mean` (nats per response), `<p>/length_mean` (tokens), `<p>/eos_rate` (fraction),
      `<p>/distinct_2`, `<p>/repetition_4` (fractions);
    - `<p>_vs_<first>/win_rate_<s>` (ties one half), `<p>_vs_<first>/<s>_delta`, `.../kl_delta`, `.../length_delta`,
      `.../eos_rate_delta` (paired by prompt), `.../distinct_2_ratio`.

    Args:
        samples: at least two policies, the baseline first.
        num_resamples: of the bootstrap over prompts.
        seed: of the bootstrap.

    Returns:
        `{"policies": names, "scores": score names, "num_responses": int, "num_prompts": int, "metrics": {key: float}}`.

    Raises:
        UserError: fewer than two policies, names unusable or double, lists of different lengths, other prompts, other
            score names, a number that is not finite.
    """
    _check(samples)
    baseline = samples[0]
    clusters = baseline.prompts
    metrics: dict[str, float] = {}

    def add(key: str, interval: Interval) -> None:
        metrics.update({key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high})

    def mean(values: ArrayLike) -> Interval:
        return bootstrap_interval(values, clusters=clusters, num_resamples=num_resamples, seed=seed)

    for policy in samples:
        for measure, values in _measures(policy).items():
            add(f"{policy.name}/{measure if measure == 'eos_rate' else f'{measure}_mean'}", mean(values))
        metrics[f"{policy.name}/distinct_2"] = distinct_n(policy.responses, 2)
        metrics[f"{policy.name}/repetition_4"] = repetition_rate(policy.responses, 4)
    for policy in samples[1:]:
        pair = f"{policy.name}_vs_{baseline.name}"
        for score, scores in policy.scores.items():
            wins = win_rate(scores, baseline.scores[score], clusters=clusters, num_resamples=num_resamples, seed=seed)
            add(f"{pair}/win_rate_{score}", wins)
        before = _measures(baseline)
        for measure, values in _measures(policy).items():
            if measure in before:
                add(f"{pair}/{measure}_delta", mean(values - before[measure]))
        diversity = metrics[f"{baseline.name}/distinct_2"]
        # 0 / 0 where no response has two tokens: nothing changed, and JSON has no NaN.
        ratio = metrics[f"{policy.name}/distinct_2"] / diversity if diversity else 1.0
        metrics[f"{pair}/distinct_2_ratio"] = ratio
    return {
        "policies": [policy.name for policy in samples],
        "scores": list(baseline.scores),
        "num_responses": len(clusters),
        "num_prompts": len(set(clusters)),
        "metrics": metrics,
    }


def _measures(policy: PolicySamples) -> dict[str, NDArray[np.float64]]:
    """Per-response values [N] of everything that is averaged."""
    columns = {**policy.scores, "kl": policy.kl, "length": policy.lengths, "eos_rate": policy.has_eos}
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items() if values is not None}


def _check(samples: Sequence[PolicySamples]) -> None:
    if len(samples) < 2:
        raise UserError(f"compare: got {len(samples)} policies; give at least two, the baseline first")
    names = [policy.name for policy in samples]
    if len(set(names)) < len(names):
        raise UserError(f"compare: policy names are {names}; give each policy its own name")
    baseline = samples[0]
    for policy in samples:
        where = f"compare: policy {policy.name!r}"
        if not policy.name or "/" in policy.name or any(character.isspace() for character in policy.name):
            raise UserError(f"{where}: the name becomes part of metric keys; use one word without a slash")
        if not policy.prompts:
            raise UserError(f"{where}: has 0 responses; sample at least one")
        reserved = {"kl", "length", "eos_rate"} & set(policy.scores)
        if reserved:
            raise UserError(f"{where}: a score is named {min(reserved)!r}, which is a measure of its own; rename it")
        _check_lists(policy, where)
        if policy.prompts != baseline.prompts:
            raise UserError(f"{where}: its prompts are not those of {baseline.name!r}; sample both on the same prompts")
        if set(policy.scores) != set(baseline.scores):
            raise UserError(
                f"{where}: has scores {sorted(policy.scores)} but {baseline.name!r} has {sorted(baseline.scores)}; "
                "score all policies alike"
            )


def _check_lists(policy: PolicySamples, where: str) -> None:
    lists: dict[str, Sequence[Any]] = {
        "responses": policy.responses,
        "lengths": policy.lengths,
        "has_eos": policy.has_eos,
        **({} if policy.kl is None else {"kl": policy.kl}),
        **{f"scores[{name!r}]": values for name, values in policy.scores.items()},
    }
    for name, values in lists.items():
        if len(values) != len(policy.prompts):
            counts = f"{len(values)} entries for {len(policy.prompts)} prompts"
            raise UserError(f"{where}: {name} has {counts}; give one per response")
    for name, array in _measures(policy).items():
        if not np.isfinite(array).all():
            index = int(np.flatnonzero(~np.isfinite(array))[0])
            raise UserError(f"{where}: {name} of response {index} is {array[index]}; give finite numbers only")
