"""The policies of an evaluation: where they come from, how they are sampled, and what every score says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.artifacts import KEPT_POLICIES, MANIFEST, UNPUBLISHED, Artifact
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.evaluation.compare import PolicySamples
from rlhf.evaluation.frontier import best_of_n_kl
from rlhf.evaluation.judges import SentimentJudge, vader_judge
from rlhf.functions import TextFunction, call_text_function, load_function
from rlhf.models import compute_dtype, load_model, load_tokenizer, tokenizer_identity
from rlhf.ppo.rewards import aggregate, shape_scores
from rlhf.recipe import JudgeSource, PolicySource, Recipe, source_names, unique
from rlhf.reward.baselines import TfidfScorer, fit_tfidf
from rlhf.sampling import Samples, perplexity, response_logprob_sums, sample_responses, score_sequences
from rlhf.stage import StageContext

logger = logging.getLogger(__name__)


def sampling_settings(recipe: Recipe) -> dict[str, Any]:
    """How every policy is sampled: the recipe's `evaluate` section, where it says nothing its `ppo` section."""
    section, ppo = recipe.evaluate, recipe.ppo
    return {
        "temperature": ppo.temperature if section.temperature is None else section.temperature,
        "top_p": ppo.top_p if section.top_p is None else section.top_p,
        "repetition_penalty": section.repetition_penalty,
        "response_length": ppo.response_length,
        "stop_strings": list(ppo.stop_strings),
        "seed": recipe.stage_seed("evaluate"),
    }


def has_knobs(settings: Mapping[str, Any]) -> bool:
    """Whether responses are drawn from something else than the softmax at the temperature."""
    return settings["top_p"] < 1 or settings["repetition_penalty"] != 1


@dataclass
class Sampler:
    """Samples any policy with the same settings and the same random numbers.

    Attributes:
        ctx: the running stage.
        renderer: of the run's own tokenizer.
        prompts: as the data recipe gives them.
        settings: see `sampling_settings`.
        reference: the SFT model, which KL is measured against.
        held_out: texts whose perplexity is measured; None = it is not.
    """

    ctx: StageContext
    renderer: Renderer
    prompts: list
    settings: dict[str, Any]
    reference: PreTrainedModel
    held_out: Samples | None = None

    def draw(self, model: PreTrainedModel, renderer: Renderer, number: int = 0) -> Samples:
        """One response per prompt; draw 0 uses the same random numbers for every policy, and so does draw 1."""
        known = self.settings
        samples = sample_responses(
            model, renderer, self.prompts, known["response_length"], known["temperature"], known["seed"],
            top_p=known["top_p"], stop_strings=known["stop_strings"], dtype=compute_dtype(self.ctx.recipe),
            repetition_penalty=known["repetition_penalty"], draw=number,
        )  # fmt: skip
        return samples if renderer is self.renderer else self._in_own_tokens(samples)

    def kl(self, model: PreTrainedModel, samples: Samples) -> list[float]:
        """log pi - log pi_ref of each response, in nats: its mean estimates the KL to the SFT model.

        With top-p or a repetition penalty, pi is the policy as it was sampled, with these knobs, and the reference the
        SFT model without them, which gives every response a probability: the SFT model then has a KL as well.
        """
        pad, temperature = self.renderer.tokenizer.pad_token_id, self.settings["temperature"]
        if has_knobs(self.settings):
            own = samples.logprobs
        elif model is self.reference:
            return [0.0] * len(samples.responses)
        else:
            own = response_logprob_sums(model, samples, temperature, pad)
        reference = response_logprob_sums(self.reference, samples, temperature, pad)
        return [a - b for a, b in zip(own, reference, strict=True)]

    def _in_own_tokens(self, samples: Samples) -> Samples:
        """Responses of another tokenizer's model in the run's tokens, which its reward models read."""
        ids = self.renderer.all_prompt_ids(self.prompts)
        rows = self.renderer.all_response_ids(self.prompts, samples.responses)
        rows = [row[: None if eos else -1] for row, eos in zip(rows, samples.has_eos, strict=True)]
        prompts = [self.renderer.prompt_text(prompt) for prompt in self.prompts]
        return replace(samples, prompts=prompts, prompt_ids=ids, response_ids=rows)


def load_policy(ctx: StageContext, source: PolicySource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a policy, ready to sample, and its tokenizer.

    Raises:
        UserError: nothing loadable there, or the artifact kept no policy of that step.
    """
    device = PartialState().device
    if source.model is not None:
        options = {"revision": source.revision} if source.revision else {}
        model, tokenizer = load_model(source.model, **options), load_tokenizer(source.model, **options)
        if tokenizer.pad_token_id is None:  # sampling alone: the mask says what counts
            tokenizer.pad_token = tokenizer.eos_token
        return model.to(device).eval(), tokenizer
    artifact = ctx.inputs[source.artifact]
    place = artifact.model_dir if source.step is None else step_dir(artifact, source.step)
    tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
    return load_kept(place, ctx.inputs["sft"]).to(device).eval(), tokenizer


def kept_steps(artifact: Artifact) -> list[int]:
    """Steps whose policies a ppo artifact kept (`ppo.keep_policies_every`), in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in (artifact.path / KEPT_POLICIES).glob("step_*"))


def step_dir(artifact: Artifact, step: int) -> Path:
    """Folder of the policy of a kept step.

    Raises:
        UserError: the step was not kept.
    """
    if step not in kept_steps(artifact):
        raise UserError(
            f"artifact {artifact.path}: kept no policy of step {step}, only of {kept_steps(artifact)}: set "
            "ppo.keep_policies_every and redo ppo, or name a step that it kept"
        )
    return artifact.path / KEPT_POLICIES / f"step_{step:06d}"


def load_kept(directory: Path, sft: Artifact) -> PreTrainedModel:
    """A policy from its whole weights, or from an adapter of the SFT model."""
    if not (directory / "adapter_config.json").is_file():
        return load_model(directory)
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(sft.model_dir), str(directory)).merge_and_unload()


def named_artifacts(recipe: Recipe) -> list[str]:
    """The artifacts that the recipe names for an evaluation: SFT, policies, reward sources and judges."""
    sources = [*recipe.evaluate.policies, *recipe.ppo.rewards, *recipe.evaluate.judges]
    return list(dict.fromkeys(["sft", *(source.artifact for source in sources if source.artifact)]))


def idle_rewards(ctx: StageContext) -> list[str]:
    """Finished reward models of the run that the recipe names nowhere, and that read the SFT model's tokens.

    One of the same weights as a source or judge is left out: it would say the same under another name.
    """
    if not ctx.recipe.evaluate.score_all_rewards or "sft" not in ctx.inputs:
        return []
    tokens = _tokens(ctx.inputs["sft"])
    hashes = {artifact.hash for artifact in ctx.inputs.values()}
    found = []
    for place in (path.parent for path in sorted(ctx.final.parent.glob(f"*/{MANIFEST}"))):
        if place.name in ctx.inputs or place.suffix in UNPUBLISHED:
            continue
        try:
            artifact = Artifact.load(place)
        except UserError as error:  # no input of the recipe's: no reason to stop
            logger.warning("evaluate: no score by %s: %s", place.name, error)
            continue
        if "reward_statistics" not in artifact.manifest or artifact.hash in hashes:
            continue
        if _tokens(artifact) != tokens:
            logger.info("evaluate: no score by %s: it reads other tokens than this run's sft", place.name)
            continue
        hashes.add(artifact.hash)
        found.append(place.name)
    return found


def _tokens(artifact: Artifact) -> list[str]:
    """What text becomes."""
    identity = artifact.manifest.get("tokenizer") or {}
    return [identity.get("hash", ""), identity.get("chat_template_hash", "")]


class Scores:
    """Every score of a response: the sources of `ppo.rewards` (weight 0 among them), the judges, and `idle_rewards`.

    Reward models count the SFT samples' mean as 0 and their std as 1, as PPO sees them before the missing-EOS rule.

    Args:
        ctx: the running stage.
        columns: further dataset columns, one entry per prompt, for functions that want them.
        pad_id: of the run's tokenizer.
    """

    def __init__(self, ctx: StageContext, columns: Mapping[str, list], pad_id: int) -> None:
        self.columns, self.pad_id = columns, pad_id
        self.config = ctx.recipe.ppo
        settings = sampling_settings(ctx.recipe)
        self.as_in_ppo = not has_knobs(settings) and settings["temperature"] == self.config.temperature
        self.weights: dict[str, float] = {}
        self.sources: dict[str, Callable[[Samples], list[float]]] = {}
        for name, source in zip(source_names(self.config.rewards), self.config.rewards, strict=True):
            of_model = source.artifact is not None
            self.sources[name] = (
                self._model(ctx.inputs[source.artifact]) if of_model else self._texts(load_function(source.function))
            )
            self.weights[name] = source.weight
        for judge in ctx.recipe.evaluate.judges:
            of_model = judge.artifact is not None
            self.sources[judge.name] = (
                self._model(ctx.inputs[judge.artifact]) if of_model else self._texts(load_judge(ctx, judge))
            )

        for reference in (name for name in ctx.inputs if name not in named_artifacts(ctx.recipe)):
            self.sources[unique(reference, self.sources)] = self._model(ctx.inputs[reference])

    def __call__(self, samples: Samples) -> dict[str, list[float]]:
        """[B] scores by name, of responses to the first B prompts."""
        scores = {name: score(samples) for name, score in self.sources.items()}
        return scores if self.maximised in scores else scores | {self.maximised: self.trained(scores)}

    @property
    def maximised(self) -> str:
        """Name of what PPO maximised: the one source with a weight, or `combined`, which is then a score of its own."""
        weighted = [name for name, weight in self.weights.items() if weight]
        return weighted[0] if len(weighted) == 1 and self.weights[weighted[0]] > 0 else "combined"

    def trained(self, scores: Mapping[str, Sequence[float]]) -> list[float]:
        """[B] what PPO maximised: the weighted sources, aggregated as `ppo.reward_aggregation` says."""
        weights = {name: weight for name, weight in self.weights.items() if weight}
        columns = [torch.tensor(scores[name], dtype=torch.float64) for name in weights]
        how, uncertainty_coef = self.config.reward_aggregation, self.config.uncertainty_coef
        return aggregate(columns, list(weights.values()), how, uncertainty_coef).tolist()

    def paid(self, scores: Mapping[str, Sequence[float]], samples: Samples) -> list[float]:
        """[B] `trained`, clipped and with PPO's missing-EOS rule: what a response is worth to PPO before its KL.

        With `normalize_scores` just `trained`: clip and penalty are of scores divided by a std that moved.
        """
        trained, config = self.trained(scores), self.config
        if config.normalize_scores:
            return trained
        rule = config.score_clip, config.missing_eos_penalty, config.missing_eos_mode
        return shape_scores(
            torch.tensor(trained, dtype=torch.float64), torch.tensor(samples.has_eos), None, *rule
        ).tolist()

    def rlhf_reward(
        self, scores: Mapping[str, Sequence[float]], samples: Samples, kl: Sequence[float] | None
    ) -> list[float] | None:
        """[B] what PPO maximises: `paid`, less `kl_coef` times the KL.

        None without a KL, where PPO's numbers moved as it went (`kl_target`, `normalize_scores`), and where responses
        are not sampled as PPO does, whose KL is another.
        """
        config = self.config
        if kl is None or not self.as_in_ppo or config.kl_target is not None or config.normalize_scores:
            return None
        paid = self.paid(scores, samples)
        return [score - config.kl_coef * nats for score, nats in zip(paid, kl, strict=True)]

    @property
    def unseen(self) -> list[str]:
        """Names of the scores that PPO did not maximise."""
        return [name for name in self.sources if not self.weights.get(name)]

    def _model(self, artifact: Artifact) -> Callable[[Samples], list[float]]:
        model = load_model(artifact.model_dir, "score").to(PartialState().device).eval()
        return partial(_reward_scores, model, artifact.manifest["reward_statistics"], self.pad_id)

    def _texts(self, function: TextFunction) -> Callable[[Samples], list[float]]:
        def score(samples: Samples) -> list[float]:
            columns = {name: values[: len(samples.prompts)] for name, values in self.columns.items()}
            return call_text_function(function, samples.prompts, samples.responses, columns, self.config.reward_timeout)

        return score


@torch.no_grad()
def _reward_scores(model: PreTrainedModel, statistics: dict[str, float], pad_id: int, samples: Samples) -> list[float]:
    ids = [prompt + response for prompt, response in zip(samples.prompt_ids, samples.response_ids, strict=True)]
    return [(score - statistics["mean"]) / statistics["std"] for score in score_sequences(model, ids, pad_id)]


def load_judge(ctx: StageContext, judge: JudgeSource) -> TextFunction:
    """The callable of a recipe's judge; a fitted one comes from the cache when it can."""
    if judge.function is not None:
        return load_function(judge.function)
    if judge.vader:
        return vader_judge
    if judge.pairs is not None:
        return pair_judge(fit_tfidf(ctx.rows(judge.pairs, judge.split or "train", "preference")))
    rows = ctx.rows(judge.sentiment, "judge", "rated")
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


def pair_judge(scorer: TfidfScorer) -> TextFunction:
    """Log-odds of each response, up to a constant, that the pairs' annotators prefer it; prompts are not read."""

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return scorer(responses).tolist()

    return judge


def evaluate_policy(sampler: Sampler, scores: Scores, source: PolicySource) -> tuple[PolicySamples, Samples]:
    """Sample one policy, measure its KL and score it.

    The KL of a best-of-n policy is its log-ratio plus the bound `best_of_n_kl`. A model with another tokenizer has no
    KL to the SFT model.
    """
    model, tokenizer = sampler.reference, sampler.renderer.tokenizer
    if source.artifact != "sft":
        model, tokenizer = load_policy(sampler.ctx, source)
    renderer = sampler.renderer
    if tokenizer_identity(tokenizer)["hash"] != tokenizer_identity(renderer.tokenizer)["hash"]:
        renderer = Renderer(tokenizer, sampler.ctx.recipe.model.chat)
    samples, values = best_of(sampler, scores, model, renderer, source.best_of)
    kl = surprise = None
    if renderer is sampler.renderer:
        kl = [best_of_n_kl(source.best_of) + ratio for ratio in sampler.kl(model, samples)]
        if sampler.held_out is not None and source.best_of == 1:
            surprise = perplexity(model, sampler.held_out, renderer.tokenizer.pad_token_id)
    texts = samples.prompts, samples.responses, samples.lengths, samples.has_eos
    return PolicySamples(source.label, *texts, kl, values, surprise, scores.rlhf_reward(values, samples, kl)), samples


def held_out_texts(ctx: StageContext, renderer: Renderer) -> Samples | None:
    """Completions that SFT did not train on, for the perplexity of every policy; None where the recipe has none."""
    section, count = ctx.recipe.sft, ctx.recipe.evaluate.perplexity_rows
    if not count or section.eval_split is None:
        return None
    rows = ctx.rows(section.data, section.eval_split, "sft")
    asked = [row["prompt"] for row in rows]
    prompts = renderer.all_prompt_ids(asked)
    responses = renderer.all_response_ids(asked, [row["completion"] for row in rows])
    fits = [i for i in range(len(rows)) if len(prompts[i]) + len(responses[i]) <= section.max_length][:count]
    texts = [renderer.prompt_text(rows[i]["prompt"]) for i in fits], [rows[i]["completion"] for i in fits]
    if not fits:
        return None
    return Samples(texts[0], [prompts[i] for i in fits], texts[1], [responses[i] for i in fits], [True] * len(fits))


def best_of(
    sampler: Sampler, scores: Scores, model: PreTrainedModel, renderer: Renderer, n: int
) -> tuple[Samples, dict[str, list[float]]]:
    """For each prompt the one of `n` responses that PPO would pay most for (the first of equals), and its scores."""
    draws = [sampler.draw(model, renderer, number) for number in range(n)]
    scored = [scores(samples) for samples in draws]
    liked = [scores.paid(values, samples) for values, samples in zip(scored, draws, strict=True)]
    best = [max(range(n), key=lambda draw: liked[draw][row]) for row in range(len(sampler.prompts))]
    lists = {
        field.name: [getattr(draws[draw], field.name)[row] for row, draw in enumerate(best)]
        for field in fields(Samples)
    }
    values = {name: [scored[draw][name][row] for row, draw in enumerate(best)] for name in scored[0]}
    return Samples(**lists), values
