"""The evaluate stage: two or more policies on held-out prompts, with judges that no stage trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import set_seed

from rlhf.artifacts import Artifact, sha256_file
from rlhf.data import Renderer, check_split
from rlhf.data.load import PART
from rlhf.errors import UserError
from rlhf.evaluation import frontier
from rlhf.evaluation.compare import PolicySamples, compare, compare_parts, with_limits
from rlhf.evaluation.llm_judge import check_reachable, judge_pairs, read_key
from rlhf.evaluation.policies import (
    Sampler,
    Scores,
    evaluate_policy,
    has_knobs,
    held_out_texts,
    idle_rewards,
    kept_steps,
    load_kept,
    named_artifacts,
    sampling_settings,
    step_dir,
)
from rlhf.evaluation.policy_gate import judge_published, not_measured, policy_gate
from rlhf.evaluation.ranking import at_equal_length
from rlhf.evaluation.report import main_judge, write_report
from rlhf.evaluation.statistics import bootstrap_interval
from rlhf.functions import load_function, source_hashes
from rlhf.logs import append_row
from rlhf.models import check_position_limit, compute_dtype, load_model, load_tokenizer, tokenizer_identity
from rlhf.recipe import LlmJudgeSection, PolicySource, Recipe
from rlhf.reward.gate import lines as gate_lines
from rlhf.reward.gate import verdict
from rlhf.sampling import Samples, fitting_rows
from rlhf.stage import Stage, StageContext

logger = logging.getLogger(__name__)


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    section, ppo = ctx.recipe.evaluate, ctx.recipe.ppo
    compute_dtype(ctx.recipe)
    if section.llm_judge is not None:
        read_key(section.llm_judge)
    for judge in section.judges:
        if judge.function is not None:
            load_function(judge.function)
        if judge.artifact is not None and "reward_statistics" not in ctx.inputs[judge.artifact].manifest:
            raise UserError(f"evaluate.judges: artifact {judge.artifact} is no reward model: name one")
    check_split(section.data or ppo.data, section.split, "evaluate.split")
    length, what = ppo.max_prompt_length + ppo.response_length, "ppo.max_prompt_length + response_length"
    for artifact in ctx.inputs.values():
        check_position_limit(artifact.model_dir, length, what)
    for policy in section.policies:
        if policy.step is not None:
            step_dir(ctx.inputs[policy.artifact], policy.step)
        if policy.model is not None:
            load_tokenizer(policy.model, **({"revision": policy.revision} if policy.revision else {}))
            check_position_limit(policy.model, length, what)


def build(ctx: StageContext) -> dict[str, Any]:
    """Sample all policies with common random numbers, score, compare, report; see `Stage.build`. Rank 0 works."""
    if not PartialState().is_main_process:
        return {}
    section = ctx.recipe.evaluate
    if section.llm_judge is not None:
        check_reachable(section.llm_judge)
    set_seed(ctx.seed)
    tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
    renderer = Renderer(tokenizer, ctx.recipe.model.chat)
    rows = ctx.rows(section.data or ctx.recipe.ppo.data, section.split, "prompts")
    rows = fitting_rows(rows, renderer, ctx.recipe.ppo.max_prompt_length)
    rows = rows[: section.prompts]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    scores = Scores(ctx, columns, tokenizer.pad_token_id)
    reference = load_model(ctx.inputs["sft"].model_dir).to(PartialState().device).eval()
    settings = sampling_settings(ctx.recipe)
    held_out = held_out_texts(ctx, renderer)
    sampler = Sampler(ctx, renderer, [row["prompt"] for row in rows], settings, reference, held_out)
    evaluated = [evaluate_policy(sampler, scores, source) for source in section.policies]
    policies = [policy for policy, _ in evaluated]
    result = compare(policies, num_resamples=section.bootstrap, seed=ctx.seed)
    parts = columns.get(PART, [])
    result["parts"] = compare_parts(policies, parts, num_resamples=section.bootstrap, seed=ctx.seed)
    result["sampling"] = settings | {"kl_as_sampled": has_knobs(settings)}
    result["headline"] = main_judge(result["scores"], first_judge(ctx.recipe))
    if section.llm_judge is not None:
        ask_llm(section.llm_judge, policies, result, {"num_resamples": section.bootstrap, "seed": ctx.seed})
    trained = ppo_artifact(ctx)
    if section.best_of_n > 1 or trained is not None:
        result["frontier"] = reward_against_kl(ctx, sampler, scores)
    history = trained.metrics() if trained else None
    write_report(ctx.dir, result, policies, history, judge=result["headline"], seed=ctx.seed)
    for source, (policy, samples) in zip(section.policies, evaluated, strict=True):
        _write_samples(ctx.dir, policy, samples, policy_step(ctx, source), scores.maximised)
    append_row(ctx.dir / "metrics.jsonl", {"step": 0} | result["metrics"])
    found = {"tokenizer": tokenizer_identity(tokenizer), "metrics": result["metrics"], "comparison": result}
    return found | _gate(result.get("frontier"))


def _gate(curve: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of the published policy; nothing where there is none."""
    checks = policy_gate(curve) if curve else []
    if not curve or not checks:
        return {}
    summary = {"verdict": verdict(checks), "reasons": gate_lines(checks), "not_measured": not_measured(curve)}
    return {"gate": summary}


def ask_llm(
    section: LlmJudgeSection, policies: Sequence[PolicySamples], result: dict[str, Any], options: dict[str, int]
) -> None:
    """Add the LLM judge's win rates over the first policy to `result`."""
    first, *others = policies
    count = min(section.prompts, len(first.prompts))
    prompts, lengths = first.prompts[:count], first.lengths[:count]
    result["pairwise"] = {"name": section.name, "model": section.model, "pairs": count}
    for policy in others:
        verdicts = judge_pairs(section, prompts, policy.responses[:count], first.responses[:count])
        pair, wins = f"{policy.name}_vs_{first.name}", verdicts.wins
        rate = bootstrap_interval(wins, clusters=prompts, **options)
        equal = at_equal_length(wins, policy.lengths[:count], lengths, clusters=prompts, **options)
        result["metrics"] |= with_limits(f"{pair}/win_rate_{section.name}", rate)
        result["metrics"] |= with_limits(f"{pair}/lc_win_rate_{section.name}", equal)
        result["metrics"][f"{pair}/unread_{section.name}"] = verdicts.unread
        if verdicts.agreement is not None:
            result["metrics"][f"{pair}/order_agreement_{section.name}"] = verdicts.agreement
        if verdicts.unread > 0.1:
            logger.warning(
                "llm judge: %.0f %% of the replies were neither A, B nor tie: raise evaluate.llm_judge.max_tokens, or "
                "take a model that follows instructions",
                100 * verdicts.unread,
            )


def reward_against_kl(ctx: StageContext, sampler: Sampler, scores: Scores) -> dict[str, Any]:
    """Best-of-n on the SFT model and PPO at its kept steps: every score and the KL paid, on the same prompts.

    Returns:
        `best_of_n` and `steps`, rows as `frontier.frontier` and `frontier.policy_point` make them (without the scores
        of single prompts), `published` step, `best_steps` by score (0 = the SFT model), what `judge_published` found,
        and what they were computed from.
    """
    section = ctx.recipe.evaluate
    part = replace(sampler, prompts=sampler.prompts[: section.frontier_prompts])
    drawn = [part.draw(part.reference, part.renderer, number) for number in range(section.best_of_n)]
    draws = [scores(samples) for samples in drawn]
    columns = {name: np.array([draw[name] for draw in draws]).T for name in draws[0]}
    kl = np.array([part.kl(part.reference, samples) for samples in drawn]).T
    prompts = drawn[0].prompts
    options = {"num_resamples": section.bootstrap, "seed": ctx.seed, "clusters": prompts}
    paid = np.array([scores.paid(draw, samples) for draw, samples in zip(draws, drawn, strict=True)]).T
    rows = frontier.frontier(paid, columns, kl, **options)
    curve: dict[str, Any] = {
        "prompts": len(part.prompts), "samples": section.best_of_n, "scores": list(columns),
        "trained": scores.maximised, "unseen": scores.unseen, "best_of_n": rows, "steps": [], "published": None,
        "best_steps": {}, "findings": [], "sft_std": {name: float(values.std()) for name, values in columns.items()},
    }  # fmt: skip
    artifact = ppo_artifact(ctx)
    if artifact is not None:
        published = int(artifact.manifest["metrics"]["published_ppo_step"])
        points = ppo_points(part, scores, artifact, published, options)
        candidates = [{"step": 0, **rows[0]}, *points]
        curve |= {
            "steps": points,
            "published": published,
            "best_steps": {name: frontier.best_step(candidates, name) for name in columns},
            **judge_published(rows, points, published, scores.unseen, clusters=prompts),
        }
        for line in gate_lines(policy_gate(curve)):
            logger.warning("%s", line)
        for name, remedy in not_measured(curve).items():
            logger.info("%s was not measured: %s", name, remedy)
    for row in [*rows, *curve["steps"]]:
        for point in row["scores"].values():
            point.pop("by_prompt")
    return curve


def ppo_points(
    sampler: Sampler, scores: Scores, artifact: Artifact, published: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The policies of the kept steps and of the published one, by step."""
    points = []
    for step in sorted({*kept_steps(artifact), published}):
        place = artifact.model_dir if step == published else step_dir(artifact, step)
        model = load_kept(place, sampler.ctx.inputs["sft"]).to(PartialState().device).eval()
        samples = sampler.draw(model, sampler.renderer)
        points.append(frontier.policy_point(step, sampler.kl(model, samples), scores(samples), **options))
    return points


def ppo_artifact(ctx: StageContext) -> Artifact | None:
    """The first of the policies' artifacts that PPO made."""
    sources = [ctx.inputs[policy.artifact] for policy in ctx.recipe.evaluate.policies if policy.artifact]
    return next((artifact for artifact in sources if artifact.stage == "ppo"), None)


def first_judge(recipe: Recipe) -> str | None:
    """Name of the first judge; None = the report's own choice."""
    return recipe.evaluate.judges[0].name if recipe.evaluate.judges else None


def policy_step(ctx: StageContext, source: PolicySource) -> int:
    """The ppo_step that a policy is of; 0 where no PPO made it."""
    if source.artifact is None or ctx.inputs[source.artifact].stage != "ppo":
        return 0
    return source.step or int(ctx.inputs[source.artifact].manifest["metrics"]["published_ppo_step"])


def _write_samples(directory: Path, policy: PolicySamples, samples: Samples, step: int, maximised: str) -> None:
    with open(directory / "samples.jsonl", "a", encoding="utf-8") as file:
        for i in range(len(samples.prompts)):
            row = {
                "step": step,
                "policy": policy.name,
                "prompt": samples.prompts[i],
                "prompt_ids": samples.prompt_ids[i],
                "response": samples.responses[i],
                "response_ids": samples.response_ids[i],
                "score": round(policy.scores[maximised][i], 4),
                "scores": {name: round(values[i], 4) for name, values in policy.scores.items()},
                "kl": None if policy.kl is None else round(policy.kl[i], 4),
                "length": policy.lengths[i],
                "has_eos": policy.has_eos[i],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _data(recipe: Recipe) -> list[str]:
    judges = [data for judge in recipe.evaluate.judges if (data := judge.sentiment or judge.pairs)]
    held_out = [recipe.sft.data] if recipe.evaluate.perplexity_rows else []
    return [recipe.evaluate.data or recipe.ppo.data, *judges, *held_out]


def _also(recipe: Recipe) -> dict[str, Any]:
    keys = {"max_prompt_length", "response_length", "temperature", "top_p", "stop_strings", "rewards"}
    keys |= {"keep_policies_every", "reward_aggregation", "uncertainty_coef", "score_clip", "normalize_scores"}
    keys |= {"missing_eos_penalty", "missing_eos_mode", "kl_coef", "kl_target"}
    functions = [source.function for source in (*recipe.ppo.rewards, *recipe.evaluate.judges)]
    folders = [Path(policy.model) for policy in recipe.evaluate.policies if policy.model]
    weights = {
        path.as_posix(): sha256_file(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))
    }
    also = {"functions": source_hashes(functions), "weights": weights}
    held_out = recipe.sft.model_dump(mode="json", include={"data", "eval_split", "max_length"})
    return recipe.ppo.model_dump(mode="json", include=keys) | also | {"sft": held_out}


STAGE = Stage(
    "evaluate", 4, inputs=named_artifacts, data=_data, check=check, build=build, also=_also, found=idle_rewards
)
