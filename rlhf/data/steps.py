"""The cleaning steps of a recipe: the default ones, what they read of a row, and what they need beside rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.artifacts import hash_files, sha256_json
from rlhf.data.cleaning import (
    CleaningStep,
    ContaminationStep,
    PerplexityStep,
    PreferenceStep,
    SafetyStep,
    SemanticStep,
    SensitiveStep,
    StepConfig,
)
from rlhf.data.cleaning.base import texts_of
from rlhf.data.cleaning.contamination import EvalIndex, eval_index
from rlhf.data.cleaning.duplicates import ExactStep, NearStep
from rlhf.data.formats import FORMATS
from rlhf.data.pipeline import Counts, detected, named, native_rows
from rlhf.data.quarantine import Quarantine
from rlhf.data.recipe import DataRecipe, DefaultSteps, load_data_recipe
from rlhf.data.sources import expanded, file_hash
from rlhf.errors import UserError

# What of a native row is text to train on, by its kind: what makes two rows the same.
TEXT_OF = {
    "text": ["text"],
    "rated": ["text"],
    "sft": ["prompt", "completion"],
    "thumbs": ["prompt", "completion"],
    "preference": ["prompt", "chosen", "rejected"],
    "pairs": ["prompt", "response_a", "response_b"],
    "scored": ["prompt", "responses"],
    "prompts": ["prompt", "turns"],
}
# Cleaned, whatever the format, should a row have them; other columns reach reward functions as they are.
TEXT_COLUMNS = list(dict.fromkeys(column for columns in TEXT_OF.values() for column in columns))

# Needs no model and suits every language. Not trimmed: the completion of a plain prompt begins with its space. Pairs
# are looked at before duplicates go, which would hide contradictions. `repetition` reads answers alone, of pairs the
# chosen one: what people ask is as it is, a bad rejected side a lesson.
DEFAULT_STEPS = TypeAdapter(list[CleaningStep]).validate_python(
    [
        {"step": "unicode", "trim": False},
        {"step": "length"},
        {"step": "boilerplate", "columns": ["text"]},
        {"step": "repetition", "columns": ["text", "completion", "chosen"]},
        {"step": "pii"},
        {"step": "preferences"},
        {"step": "exact_duplicates"},
        {"step": "near_duplicates"},
        {"step": "near_duplicates", "columns": ["prompt"], "across_only": True},
    ]
)


def all_steps(recipe: DataRecipe) -> list[StepConfig]:
    """The recipe's steps with the default ones filled in."""
    steps: list[StepConfig] = []
    for step in recipe.clean:
        steps += DEFAULT_STEPS if isinstance(step, DefaultSteps) else [step]
    return steps


def steps_for(recipe: DataRecipe) -> list[StepConfig]:
    """The steps as they run on rows of the recipe's format (`detected`).

    Steps without columns read those that hold text, for duplicates those of the format. The default steps hold
    `preferences`, which other formats skip.
    """
    native = FORMATS[named(recipe)].native
    same = ExactStep | NearStep
    asked = [step for step in recipe.clean if not isinstance(step, DefaultSteps)]
    return [
        step
        if step.columns
        else step.model_copy(update={"columns": TEXT_OF[native] if isinstance(step, same) else TEXT_COLUMNS})
        for step in all_steps(recipe)
        if native == "preference" or step in asked or not isinstance(step, PreferenceStep)
    ]


def ordered_by_difficulty(recipe: DataRecipe) -> bool:
    """Whether the rows come in a curriculum's order, which a trainer must keep."""
    return any(isinstance(step, PerplexityStep) and step.order != "keep" for step in recipe.clean)


def step_inputs(step: StepConfig) -> dict[str, Any]:
    """What a step takes beside rows: evaluation texts as an index, models loaded.

    Raises:
        UserError: a model or an evaluation set is missing.
    """
    if isinstance(step, ContaminationStep):
        return {"eval_sets": _index(step)}
    loader = _LOADERS.get(type(step))
    if loader is None:
        return {}
    model = expanded(str(step.model_dump()["model"]), f"{step.model_dump()['step']}.model")
    return loader(step.model_copy(update={"model": model}))


def _index(step: ContaminationStep) -> EvalIndex:
    sets = {}
    for name in step.sets:
        recipe = detected(load_data_recipe(name))
        rows = native_rows(recipe, Counts(Quarantine()))
        sets[recipe.name] = [text for _, row in rows for text in texts_of(row, TEXT_COLUMNS)]
    return eval_index(sets, step)


def _embedder(step: Any) -> dict[str, Any]:
    from rlhf.data.cleaning.semantic import load_embedder

    return {"embed": load_embedder(step.model, device=_device())}


def _classifier(step: Any) -> dict[str, Any]:
    from rlhf.data.cleaning.safety import load_classifier

    return {"classify": load_classifier(step.model, step.max_length, step.batch_size, _device())}


def _language_model(step: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(step.model)
        model: Any = AutoModelForCausalLM.from_pretrained(step.model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"perplexity.model: cannot load {step.model!r} ({reason}); give a model folder") from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and step.max_length > positions:
        raise UserError(f"perplexity.max_length {step.max_length}: {step.model!r} reads {positions} tokens; lower it")
    return {"model": model.to(_device()).eval(), "tokenizer": tokenizer}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_LOADERS: dict[type[StepConfig], Callable[[Any], dict[str, Any]]] = {
    SemanticStep: _embedder,
    SafetyStep: _classifier,
    PerplexityStep: _language_model,
}


def inputs_identity(recipe: DataRecipe, fingerprint: Callable[[DataRecipe], str]) -> list[str]:
    """Hashes of what the steps read beside rows: word lists, models, evaluation sets.

    Raises:
        UserError: one of them is missing, or a recipe is checked against itself.
    """
    return [digest for step in all_steps(recipe) for digest in _identity(step, recipe, fingerprint)]


def _identity(step: StepConfig, recipe: DataRecipe, fingerprint: Callable[[DataRecipe], str]) -> list[str]:
    if isinstance(step, SensitiveStep) and step.file is not None:
        path = Path(step.file).expanduser()
        if not path.is_file():
            raise UserError(f"sensitive.file: {step.file!r} does not exist; check the path")
        return [file_hash(path)]
    if isinstance(step, ContaminationStep):
        named_sets = [load_data_recipe(name) for name in step.sets]
        if recipe.name in [item.name for item in named_sets]:
            raise UserError(f"contamination.sets: {recipe.name!r} is checked against itself; name other sets")
        return [fingerprint(item) for item in named_sets]
    if type(step) in _LOADERS:
        model = expanded(str(step.model_dump()["model"]), f"{step.model_dump()['step']}.model")
        return [_folder_hash(model) if Path(model).is_dir() else model]
    return []


def _folder_hash(folder: str) -> str:
    return sha256_json(hash_files(Path(folder)))
