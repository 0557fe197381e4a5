"""PPO on models of a few thousand weights: stage contexts, trainers, LoRA artifacts and rule rewards for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf.artifacts import Artifact, finish, publish
from rlhf.models import load_model, load_tokenizer, lora_config, save_model, tokenizer_identity
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.trainer import PPOTrainer
from rlhf.stage import StageContext, load_inputs
from tests.builders import build_model, build_recipe, build_reward_artifact, build_sft_artifact, build_tokenizer

torch.set_num_threads(1)  # models this small gain nothing from a second one, and two that spin lose a shared core

RULE = [{"function": "tests.ppo_toys:share_of_e"}]
PEFT = {"r": 4, "lora_alpha": 8}
SHAPES = ("full-separate", "full-shared", "lora-separate", "lora-shared")


def share_of_e(prompts: list[str], responses: list[str]) -> list[float]:
    """Letters e among the characters of a response."""
    return [response.count("e") / max(len(response), 1) for response in responses]


def share_of_letters(prompts: list[str], responses: list[str]) -> list[float]:
    """ASCII letters among the characters of a response."""
    return [sum(c.isascii() and c.isalpha() for c in response) / max(len(response), 1) for response in responses]


def length_in_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Pieces between blanks: another rule, to have two."""
    return [float(len(response.split())) for response in responses]


def near_five_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Minus the distance from five words: what gets shorter and shorter has more of it for a while."""
    return [-abs(words - 5) for words in length_in_words(prompts, responses)]


def column_reward(prompts: list[str], responses: list[str], wanted: list[float]) -> list[float]:
    """A dataset column, as it is."""
    return [float(value) for value in wanted]


def toy_context(root: Path, shape: str = "full-separate", ppo: dict | None = None, **sections: Any) -> StageContext:
    """A ppo stage on tiny artifacts below `root` (built on the first call), ready for `build_trainer` or `build`.

    Args:
        root: the artifact directory, and where the recipe and its data go.
        shape: one of SHAPES.
        ppo: changes of the ppo section.
        sections: other sections of the recipe.
    """
    root.mkdir(parents=True, exist_ok=True)
    kind, critic = shape.split("-")
    lora = kind == "lora"
    recipe = build_recipe(root, ppo={"critic": critic} | (ppo or {}), peft=PEFT if lora else None, **sections)
    build_artifacts(root, lora)
    ctx = StageContext(ppo_stage.STAGE, recipe, root, "toy")
    load_inputs(ctx)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    return ctx


def build_artifacts(root: Path, lora: bool) -> None:
    """SFT and reward artifacts of the toy run, where they are not there yet."""
    run = root / "toy"
    if not (run / "sft").is_dir():
        tokenizer = build_tokenizer()
        build_sft_artifact(root, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    if not (run / "reward").is_dir():
        if lora:
            build_lora_reward(Artifact.load(run / "sft"))
        else:
            build_reward_artifact(root, mean=0.25, std=2.0)


def lively(model: Any) -> Any:
    """Larger weights, and an EOS that comes now and then: an untrained GPT-2 is so near to uniform that errors hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter *= 5 if "wpe" in name or "wte" in name else 3
        eos = model.transformer.wte.weight[model.config.eos_token_id]
        model.transformer.ln_f.bias += 4 * eos / eos.square().sum()  # about 4 nats more for EOS
    return model


def build_lora_reward(sft: Artifact, alpha: float = 12, mean: float = 0.25, std: float = 2.0) -> Artifact:
    """A reward artifact with an adapter whose weights are not zero, in PEFT's layout beside the merged model."""
    from peft import get_peft_model

    from rlhf.recipe import PeftSection

    base = load_model(sft.model_dir, "score")
    torch.manual_seed(3)
    model = get_peft_model(base, lora_config(PeftSection(r=3, lora_alpha=alpha), "SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("score" in name and parameter.requires_grad):
            torch.nn.init.normal_(parameter.data, std=0.3)
    partial = sft.path.with_name("reward.partial")
    model.save_pretrained(partial / "adapter")
    tokenizer = load_tokenizer(sft.model_dir)
    save_model(model.merge_and_unload(), tokenizer, partial / "model")
    manifest = {
        "stage": "reward",
        "run": "toy",
        "status": "complete",
        "fingerprint": {"stage": "reward", "version": 1, "section": {}, "model": {}},
        "inputs": {"sft": sft.hash},
        "seed": 0,
        "tokenizer": tokenizer_identity(tokenizer),
        "reward_statistics": {"mean": mean, "std": std, "samples": 8},
        "metrics": {},
    }
    finish(partial, manifest)
    return publish(partial, partial.with_name("reward"))


def toy_trainer(root: Path, shape: str = "full-separate", ppo: dict | None = None, **sections: Any) -> PPOTrainer:
    """A PPOTrainer as the stage builds it."""
    return trainer_of(toy_context(root, shape, ppo, **sections))


def trainer_of(ctx: StageContext) -> PPOTrainer:
    """The trainer that the stage would run."""
    return ppo_stage.build_trainer(ctx, load_tokenizer(ctx.inputs["sft"].model_dir))


def first_rollout(trainer: PPOTrainer) -> Rollout:
    """The rollout of the first ppo_step, scored, with log-probabilities and values."""
    from rlhf.ppo.rollout import add_logprobs_and_values
    from rlhf.ppo.trainer import TRAIN

    config = trainer.config
    rollout = trainer.rollout(trainer.prompts.take(trainer.stream.indices(0)), TRAIN, 0)
    trainer.score(rollout, update=False)
    add_logprobs_and_values(rollout, trainer.read, config.max_tokens_per_micro_batch, trainer.accelerator)
    return rollout


def rows_of(path: Path, perf: bool = False) -> list[dict]:
    """Rows of a JSONL file, without what the clock decides."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if perf or not key.startswith("perf/")} for row in rows]


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
