"""Talk to the policies of a run: to each prompt an answer of each, and what every score of the run says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlhf.artifacts import Artifact
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.evaluation.policies import Sampler, Scores, load_policy, sampling_settings
from rlhf.evaluation.stage import STAGE
from rlhf.models import load_model, load_tokenizer
from rlhf.recipe import Recipe, apply_override
from rlhf.stage import StageContext, load_inputs
from rlhf.yamlio import validate


@dataclass
class Answer:
    """What a policy said.

    Attributes:
        policy: its name.
        text: the response.
        tokens: of the response, EOS included.
        ended: whether it ended by itself.
        scores: of every reward source and judge of the run, by name.
        kl: log pi - log pi_SFT of the response, in nats.
    """

    policy: str
    text: str
    tokens: int
    ended: bool
    scores: dict[str, float]
    kl: float


def chat_context(root: Path, run: str, stage: str, overrides: list[str]) -> StageContext:
    """The evaluate stage of a run with its own recipe, and `stage` (`ppo`, or `sft` alone) beside the SFT model.

    Raises:
        UserError: the stage is not there, or an override does not fit.
    """
    path = root / run / stage
    if not path.is_dir():
        raise UserError(f"chat: no finished stage {path}: name another with --run, --stage or --artifacts")
    data = Artifact.load(path).manifest["recipe"]
    for section in ("evaluate", "ppo"):
        data[section] = data.get(section) or {}
    data["evaluate"] |= {"policies": [{"artifact": "sft"}, {"artifact": stage, "name": "other"}]}
    for override in overrides:
        apply_override(data, override)
    ctx = StageContext(STAGE, validate(Recipe, data, f"recipe of {path}"), root, run)
    load_inputs(ctx)
    return ctx


class Chat:
    """A conversation with the policies of a run, each with a history of its own.

    Args:
        ctx: see `chat_context`.
    """

    def __init__(self, ctx: StageContext) -> None:
        recipe = ctx.recipe
        tokenizer = load_tokenizer(ctx.inputs["sft"].model_dir)
        reference = load_model(ctx.inputs["sft"].model_dir).to(PartialState().device).eval()
        self.sampler = Sampler(ctx, Renderer(tokenizer, recipe.model.chat), [], sampling_settings(recipe), reference)
        self.scores = Scores(ctx, {}, tokenizer.pad_token_id)
        self.longest = recipe.ppo.max_prompt_length
        self.models = {"sft": reference}
        other = recipe.evaluate.policies[1]
        if other.artifact not in self.models:
            self.models[str(other.artifact)] = load_policy(ctx, other)[0]
        self.histories: dict[str, list[dict[str, str]]] = {name: [] for name in self.models}
        self.last: tuple[str, int] | None = None  # what was asked, and how often

    def forget(self) -> None:
        """Begin a new conversation."""
        self.histories = {name: [] for name in self.models}
        self.last = None

    def ask(self, text: str) -> list[Answer]:
        """An answer of each policy, all with the same random numbers.

        Raises:
            UserError: the conversation is longer than the policies were trained for.
        """
        prompts = self._prompts(text)
        self.last = text, 0
        return self._answers(prompts)

    def again(self) -> list[Answer]:
        """Other answers to the last prompt, in the place of those that were given.

        Raises:
            UserError: nothing has been asked.
        """
        if self.last is None:
            raise UserError("nothing to answer again: type a prompt first")
        for history in self.histories.values():
            del history[-2:]
        self.last = self.last[0], self.last[1] + 1
        return self._answers(self._prompts(self.last[0]))

    def _prompts(self, text: str) -> dict[str, Any]:
        chat, prompts = self.sampler.renderer.chat, {}
        for name, history in self.histories.items():
            prompts[name] = [*history, {"role": "user", "content": text}] if chat else text
            tokens = len(self.sampler.renderer.prompt_ids(prompts[name]))
            if tokens > self.longest:
                raise UserError(
                    f"the prompt has {tokens} tokens for {name}, ppo.max_prompt_length is {self.longest}: say less"
                    + (", or /new for another conversation" if chat else "")
                )
        return prompts

    def _answers(self, prompts: dict[str, Any]) -> list[Answer]:
        assert self.last is not None
        text, draw = self.last
        answers = []
        for name, prompt in prompts.items():
            sampler = replace(self.sampler, prompts=[prompt])
            samples = sampler.draw(self.models[name], sampler.renderer, draw)
            scores = {key: values[0] for key, values in self.scores(samples).items()}
            (response,), (kl,) = samples.responses, sampler.kl(self.models[name], samples)
            answers.append(Answer(name, response, samples.lengths[0], samples.has_eos[0], scores, kl))
            self.histories[name] += [{"role": "user", "content": text}, {"role": "assistant", "content": response}]
        return answers
