"""The evaluate stage: SFT against PPO on held-out prompts, with judges that no stage trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from rlhf.artifacts import Artifact
from rlhf.data import Renderer, load_data_recipe, load_rows
from rlhf.evaluation.compare import PolicySamples, compare
from rlhf.evaluation.judges import SentimentJudge, vader_judge
from rlhf.evaluation.report import write_report
from rlhf.functions import TextFunction, call_text_function, function_name, load_function, source_hashes
from rlhf.logs import append_row
from rlhf.models import compute_dtype, load_model, load_tokenizer
from rlhf.recipe import JudgeSource, Recipe
from rlhf.sampling import Samples, fitting_rows, response_logprob_sums, sample_responses, score_sequences
from rlhf.stage import Stage, StageContext

logger = logging.getLogger(__name__)

POLICIES = ("sft", "ppo")


def check(ctx: StageContext) -> None:
    """See `Stage.check`."""
    compute_dtype(ctx.recipe)
    for judge in ctx.recipe.evaluate.judges:
        if judge.function is not None:
            load_function(judge.function)


def build(ctx: StageContext) -> dict[str, Any]:
    """Sample both policies with common random numbers, score, compare, report; see `Stage.build`. Rank 0 works."""
    if not PartialState().is_main_process:
        return {}
    section = ctx.recipe.evaluate
    set_seed(ctx.seed)
    tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
    renderer = Renderer(tokenizer, ctx.recipe.model.chat)
    rows = ctx.rows(section.data or ctx.recipe.ppo.data, section.split, "prompts")
    rows = fitting_rows(rows, renderer, ctx.recipe.ppo.max_prompt_length)
    rows = rows[: section.prompts]
    samples = sample_policies(ctx, renderer, [row["prompt"] for row in rows])
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    judges = {judge.name: load_judge(judge, ctx.root) for judge in section.judges}
    policies = [judged(ctx, name, *samples[name], tokenizer.pad_token_id, columns, judges) for name in POLICIES]
    result = compare(policies, num_resamples=section.bootstrap, seed=ctx.seed)
    history = ctx.inputs["ppo"].metrics()
    write_report(ctx.dir, result, policies, history, judge=headline_judge(ctx.recipe), seed=ctx.seed)
    for policy, name in zip(policies, POLICIES, strict=True):
        _write_samples(ctx.dir, policy, samples[name][0])
    append_row(ctx.dir / "metrics.jsonl", {"step": 0} | result["metrics"])
    return {"metrics": result["metrics"], "comparison": result}


def headline_judge(recipe: Recipe) -> str | None:
    """Name of the first judge; None = the report's own choice."""
    return recipe.evaluate.judges[0].name if recipe.evaluate.judges else None


def sample_policies(ctx: StageContext, renderer: Renderer, prompts: list) -> dict[str, tuple[Samples, list[float]]]:
    """Per policy: its responses and their KL to the SFT model in nats, (log pi - log pi_ref) of the sampled tokens."""
    ppo, dtype = ctx.recipe.ppo, compute_dtype(ctx.recipe)
    device, pad = PartialState().device, renderer.tokenizer.pad_token_id
    models = {name: load_model(ctx.inputs[name].model_dir).to(device).eval() for name in POLICIES}
    result = {}
    for name, model in models.items():
        samples = sample_responses(
            model,
            renderer,
            prompts,
            ppo.response_length,
            ppo.temperature,
            ctx.seed,
            top_p=ppo.top_p,
            stop_strings=ppo.stop_strings,
            dtype=dtype,
        )
        own = response_logprob_sums(model, samples, ppo.temperature, pad)
        reference = own if name == "sft" else response_logprob_sums(models["sft"], samples, ppo.temperature, pad)
        result[name] = samples, [a - b for a, b in zip(own, reference, strict=True)]
    return result


def judged(
    ctx: StageContext,
    name: str,
    samples: Samples,
    kl: list[float],
    pad_id: int,
    columns: dict[str, list],
    judges: dict[str, TextFunction],
) -> PolicySamples:
    """One policy's samples with every reward and judge score."""
    scores: dict[str, list[float]] = {}
    timeout = ctx.recipe.ppo.reward_timeout
    for source in ctx.recipe.ppo.rewards:
        if source.artifact is not None:
            scores[Path(source.artifact).name] = reward_scores(ctx, ctx.inputs[source.artifact], samples, pad_id)
        else:
            function = load_function(source.function)
            scores[function_name(function)] = call_text_function(
                function, samples.prompts, samples.responses, columns, timeout
            )
    for judge, function in judges.items():
        scores[judge] = call_text_function(function, samples.prompts, samples.responses, columns, timeout)
    return PolicySamples(name, samples.prompts, samples.responses, samples.lengths, samples.has_eos, kl, scores)


def load_judge(judge: JudgeSource, root: Path | None = None) -> TextFunction:
    """The callable of a recipe's judge; a fitted one comes from the cache when it can."""
    if judge.function is not None:
        return load_function(judge.function)
    if judge.vader:
        return vader_judge
    rows = load_rows(load_data_recipe(judge.sentiment), "judge", "rated", root=root)
    fitted = SentimentJudge.fit([row["text"] for row in rows], [row["label"] for row in rows])
    logger.info(
        "judge %s: held-out accuracy %.3f, %.3f on their first %d words (%d texts)",
        judge.name,
        fitted.held_out_accuracy,
        fitted.held_out_short_accuracy,
        fitted.settings.short_words,
        fitted.held_out_n,
    )
    return fitted


@torch.no_grad()
def reward_scores(ctx: StageContext, artifact: Artifact, samples: Samples, pad_id: int) -> list[float]:
    """Scores as PPO sees them before the missing-EOS rule: SFT samples average 0 with std 1."""
    model = load_model(artifact.model_dir, "score").to(PartialState().device).eval()
    ids = [prompt + response for prompt, response in zip(samples.prompt_ids, samples.response_ids, strict=True)]
    statistics = artifact.manifest["reward_statistics"]
    return [(score - statistics["mean"]) / statistics["std"] for score in score_sequences(model, ids, pad_id)]


def _write_samples(directory: Path, policy: PolicySamples, samples: Samples) -> None:
    with open(directory / "samples.jsonl", "a", encoding="utf-8") as file:
        for i in range(len(samples.prompts)):
            row = {
                "policy": policy.name,
                "prompt": samples.prompts[i],
                "prompt_ids": samples.prompt_ids[i],
                "response": samples.responses[i],
                "response_ids": samples.response_ids[i],
                "scores": {name: round(values[i], 4) for name, values in policy.scores.items()},
                "kl": round(policy.kl[i], 4),
                "length": policy.lengths[i],
                "has_eos": policy.has_eos[i],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _inputs(recipe: Recipe) -> list[str]:
    rewards = [source.artifact for source in recipe.ppo.rewards if source.artifact]
    return [*POLICIES, *dict.fromkeys(rewards)]


def _data(recipe: Recipe) -> list[str]:
    judges = [judge.sentiment for judge in recipe.evaluate.judges if judge.sentiment]
    return [recipe.evaluate.data or recipe.ppo.data, *judges]


def _also(recipe: Recipe) -> dict[str, Any]:
    keys = {"max_prompt_length", "response_length", "temperature", "top_p", "stop_strings", "rewards"}
    functions = [source.function for source in (*recipe.ppo.rewards, *recipe.evaluate.judges)]
    return recipe.ppo.model_dump(mode="json", include=keys) | {"functions": source_hashes(functions)}


STAGE = Stage("evaluate", 1, inputs=_inputs, data=_data, check=check, build=build, also=_also)
