"""Compares sampled responses of two or more policies to the same prompts: pure numbers in, a JSON-able dict out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import UserError
from rlhf.evaluation.ranking import bradley_terry, length_controlled_win_rate
from rlhf.evaluation.statistics import Interval, bootstrap_interval, win_rate
from rlhf.evaluation.text_metrics import distinct_n, is_refusal, repetition_rate, self_bleu


@dataclass
class PolicySamples:
    """Responses of one policy, one entry per response in every list; all policies answer the same prompts in order.

    Attributes:
        name: of the policy, used in metric keys: no `/` and no spaces.
        prompts: prompt texts; a prompt that occurs several times is one unit of the intervals.
        responses: response texts.
        lengths: response tokens, EOS included.
        has_eos: whether the response ended by itself.
        kl: nats per response against the reference; 0 for the reference itself without top-p or repetition penalty.
            None where the tokens are not the reference's, and there is none.
        scores: reward and judge scores by name, higher is better.
        perplexity: of held-out text; None where it was not measured.
        rlhf_reward: what PPO maximises, the missing-EOS rule and the KL counted in; None where it is not known.
    """

    name: str
    prompts: list[str]
    responses: list[str]
    lengths: list[int]
    has_eos: list[bool]
    kl: list[float] | None
    scores: dict[str, list[float]]
    perplexity: float | None = None
    rlhf_reward: list[float] | None = None


def compare(samples: Sequence[PolicySamples], *, num_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Measures every policy, and every policy against the first.

    Metric keys, with `<p>` a policy, `<first>` the first one and `<s>` a score; each mean, rate, delta and strength has
    its 95 % limits beside it under the same key with `_low` and `_high` appended:

    - `<p>/<s>_mean`, `<p>/rlhf_reward_mean` (where known), `<p>/kl_mean` (nats per response), `<p>/length_mean`
      (tokens), `<p>/eos_rate`, `<p>/refusal_rate` (fractions), and without limits `<p>/distinct_2`, `<p>/self_bleu`,
      `<p>/repetition_4` (fractions), `<p>/perplexity` (of held-out text);
    - `<p>_vs_<first>/win_rate_<s>` (ties one half), `.../lc_win_rate_<s>` (at equal length), `.../<s>_delta`,
      `.../rlhf_reward_delta`, `.../kl_delta`, `.../length_delta`, `.../eos_rate_delta`, `.../refusal_rate_delta`
      (paired by prompt), and without limits `.../distinct_2_ratio`, `.../perplexity_ratio`;
    - with more than two policies `<p>/strength_<s>`: Bradley-Terry, in logits against the first.

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
    options = {"clusters": baseline.prompts, "num_resamples": num_resamples, "seed": seed}
    metrics: dict[str, float] = {}
    for policy in samples:
        metrics |= _own(policy, options)
    for policy in samples[1:]:
        metrics |= _against(policy, baseline, options)
    for score in baseline.scores if len(samples) > 2 else ():
        strengths = bradley_terry([policy.scores[score] for policy in samples], **options)
        for policy, strength in zip(samples, strengths, strict=True):
            metrics |= with_limits(f"{policy.name}/strength_{score}", strength)
    return {
        "policies": [policy.name for policy in samples],
        "scores": list(baseline.scores),
        "num_responses": len(baseline.prompts),
        "num_prompts": len(set(baseline.prompts)),
        "metrics": metrics,
    }


def compare_parts(
    samples: Sequence[PolicySamples], parts: Sequence[str | None], *, num_resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """What `compare` measures, of the prompts of each part of a mixture alone: refusals, lengths and win rates.

    Args:
        samples: as for `compare`.
        parts: [N], the part that each prompt is of; None = it is of none.
        num_resamples, seed: as for `compare`.

    Returns:
        One `{"part": name, "num_responses": int, "metrics": {key: float}}` per part, the largest first; nothing where
        there are not two.
    """
    counts = Counter(part for part in parts if part is not None)
    found = []
    for part, count in counts.most_common() if len(counts) > 1 else ():
        rows = [row for row, name in enumerate(parts) if name == part]
        few = [_of_rows(policy, rows) for policy in samples]
        options = {"clusters": few[0].prompts, "num_resamples": num_resamples, "seed": seed}
        metrics: dict[str, float] = {}
        for policy in few:
            measures = _measures(policy)
            for key, name in (("refusal_rate", "refusal_rate"), ("length", "length_mean")):
                metrics |= with_limits(f"{policy.name}/{name}", bootstrap_interval(measures[key], **options))
        for policy in few[1:]:
            for score, scores in policy.scores.items():
                rate = win_rate(scores, few[0].scores[score], **options)
                metrics |= with_limits(f"{policy.name}_vs_{few[0].name}/win_rate_{score}", rate)
        found.append({"part": part, "num_responses": count, "metrics": metrics})
    return found


def _of_rows(policy: PolicySamples, rows: Sequence[int]) -> PolicySamples:
    def pick(values: list) -> list:
        return [values[row] for row in rows]

    return replace(
        policy,
        prompts=pick(policy.prompts),
        responses=pick(policy.responses),
        lengths=pick(policy.lengths),
        has_eos=pick(policy.has_eos),
        kl=None if policy.kl is None else pick(policy.kl),
        rlhf_reward=None if policy.rlhf_reward is None else pick(policy.rlhf_reward),
        scores={name: pick(values) for name, values in policy.scores.items()},
    )


def with_limits(key: str, interval: Interval) -> dict[str, float]:
    """The value under its key, its limits beside it."""
    return {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}


def _own(policy: PolicySamples, options: dict[str, Any]) -> dict[str, float]:
    """What is measured of one policy."""
    metrics: dict[str, float] = {}
    for measure, values in _measures(policy).items():
        key = measure if measure.endswith("_rate") else f"{measure}_mean"
        metrics |= with_limits(f"{policy.name}/{key}", bootstrap_interval(values, **options))
    return metrics | {f"{policy.name}/{measure}": value for measure, value in _of_the_set(policy).items()}


def _against(policy: PolicySamples, baseline: PolicySamples, options: dict[str, Any]) -> dict[str, float]:
    """What is measured of a policy against the baseline, paired by prompt."""
    pair = f"{policy.name}_vs_{baseline.name}"
    metrics: dict[str, float] = {}
    for score, scores in policy.scores.items():
        both, lengths = (scores, baseline.scores[score]), (policy.lengths, baseline.lengths)
        equal = length_controlled_win_rate(*both, *lengths, **options)
        metrics |= with_limits(f"{pair}/win_rate_{score}", win_rate(*both, **options))
        metrics |= with_limits(f"{pair}/lc_win_rate_{score}", equal)
    before = _measures(baseline)
    for measure, values in _measures(policy).items():
        if measure in before:
            delta = bootstrap_interval(values - before[measure], **options)
            metrics |= with_limits(f"{pair}/{measure}_delta", delta)
    diversity = distinct_n(baseline.responses, 2)
    # 0 / 0 where no response has two tokens: nothing changed, and JSON has no NaN.
    metrics[f"{pair}/distinct_2_ratio"] = distinct_n(policy.responses, 2) / diversity if diversity else 1.0
    if policy.perplexity is not None and baseline.perplexity is not None:
        metrics[f"{pair}/perplexity_ratio"] = policy.perplexity / baseline.perplexity
    return metrics


def _measures(policy: PolicySamples) -> dict[str, NDArray[np.float64]]:
    """Per-response values [N] of everything that is averaged."""
    refusals = [is_refusal(response) for response in policy.responses]
    rates = {"eos_rate": policy.has_eos, "refusal_rate": refusals}
    columns = {**policy.scores, "rlhf_reward": policy.rlhf_reward, "kl": policy.kl, "length": policy.lengths, **rates}
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items() if values is not None}


def _of_the_set(policy: PolicySamples) -> dict[str, float]:
    """What is a number of all responses together, or of the policy itself."""
    measures = {
        "distinct_2": distinct_n(policy.responses, 2),
        "self_bleu": self_bleu(policy.responses),
        "repetition_4": repetition_rate(policy.responses, 4),
    }
    return measures if policy.perplexity is None else measures | {"perplexity": policy.perplexity}


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
        reserved = {"rlhf_reward", "kl", "length", "eos_rate", "refusal_rate"} & set(policy.scores)
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
        **({} if policy.rlhf_reward is None else {"rlhf_reward": policy.rlhf_reward}),
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
