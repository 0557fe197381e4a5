"""Writes docs/recipes.md from the typed recipes: `python docs/generate_recipes.py`. A test compares the two."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.data.recipe import DataRecipe
from rlhf.recipe import Recipe
from rlhf.yamlio import models_in

PAGE = Path(__file__).with_name("recipes.md")
INTRO = """# Recipe reference

Made by `python docs/generate_recipes.py` from `rlhf/recipe.py` and `rlhf/data/recipe.py`: change those, not this page.

A recipe is one YAML file: `pipelines/recipes/NAME.yaml`, or any path. It says only what differs from the defaults
below. Any field can be overridden by its dotted path: `make ppo SET="ppo.kl_coef=0.1 ppo.total_episodes=2048"`, or
`python -m pipelines.ppo --recipe tiny ppo.kl_coef=0.1`. List items go by their number: `ppo.rewards.0.weight=0.5`.
An unknown key, a wrong type or a value out of range is refused before a model is loaded; values of a `trainer`
section, which belong to the library, and files that a stage names, when that stage begins. `--dry-run` prints the
resolved recipe.

`null` switches off what can be off. A field without a default is required; `name` is taken from the file's name where
the file has none. `ppo.critic_init` is `sft` by default where `ppo.rewards` holds functions alone. Give exactly one of
`model.base` and `pretrain.architecture`. Sizes under `ppo` are global, in episodes; lengths are in tokens; KL is in
nats. "N+" is Huang et al. 2024, *The N+ Implementation Details of RLHF with PPO*; [ppo.md](ppo.md) has all sources.
"""
DATA_INTRO = """# Data recipes

A data recipe is one YAML file: `data_recipes/NAME.yaml`, or any path that ends in `.yaml`. Stages name it in their
`data` field.
"""
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def recipe_reference() -> str:
    """The text of docs/recipes.md."""
    parts = [INTRO, *_sections(Recipe, "", "The recipe"), DATA_INTRO, *_sections(DataRecipe, "", "The data recipe")]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _sections(model: type[BaseModel], path: str, title: str) -> list[str]:
    """One table for `model`, then those of the models that its fields hold."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    below: list[str] = []
    for name, field in model.model_fields.items():
        rows.append(_row(name, field))
        for nested in models_in(field.annotation):
            key = f"{path}.{name}" if path else name
            key += "[]" if "list[" in _type(field.annotation) else ""
            several = len(models_in(field.annotation)) > 1
            below += _sections(nested, key, f"`{key}`" + (f", as {nested.__name__}" if several else ""))
    return ["\n".join([f"## {title}", "", _first_paragraph(model), "", *rows]), *below]


def _row(name: str, field: FieldInfo) -> str:
    nested = models_in(field.annotation)
    meaning = field.description or (_first_paragraph(nested[0]) if nested else "")
    return f"| `{name}` | {_cell(_range(field))} | {_default(field)} | {_cell(meaning)} |"


def _range(field: FieldInfo) -> str:
    """The type, with the limits that pydantic enforces."""
    limits = []
    for constraint in field.metadata:
        limits += [f"{sign} {getattr(constraint, key)}" for key, sign in LIMITS.items() if hasattr(constraint, key)]
    if any(getattr(constraint, "min_length", 0) for constraint in field.metadata):
        limits.append("not empty")
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return ", ".join(map(str, args)) if len(args) > 3 else " or ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(arg) for arg in args))
    if origin is list:
        return f"list[{_type(args[0])}]"
    if origin is dict:
        return f"mapping of {_type(args[0])} to {_type(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "string", int: "integer", float: "number", bool: "true or false"}[annotation]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A value as YAML would write it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(exclude_unset=True))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    return '""' if value == "" else str(value)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(recipe_reference(), encoding="utf-8")
