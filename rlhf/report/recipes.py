"""What a recipe chose: its settings that are not the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from rlhf.evaluation.runs import flattened
from rlhf.recipe import Recipe
from rlhf.yamlio import models_in


def chosen_settings(recipe: Mapping[str, Any]) -> pd.DataFrame:
    """The settings of a resolved recipe that differ from today's defaults: dotted path, value, default.

    Args:
        recipe: as in a manifest; keys that the recipe does not have any more are left out.
    """
    rows = list(_chosen(Recipe, recipe, ""))
    return pd.DataFrame(rows, columns=["setting", "value", "default"])


def _chosen(model: type[BaseModel], values: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        if name not in values or (not path and name in ("name", "description")):
            continue
        value, key = values[name], f"{path}.{name}" if path else name
        required = field.is_required()
        default = None if required else to_jsonable_python(field.get_default(call_default_factory=True))
        nested = models_in(field.annotation)
        if isinstance(value, dict) and len(nested) == 1:
            yield from _chosen(nested[0], value, key)
        elif isinstance(value, dict):
            yield from ((path, text, "") for path, text in flattened(value, key).items())
        elif required or value != default:
            shown = "required" if required else json.dumps(default, ensure_ascii=False)
            yield key, json.dumps(value, ensure_ascii=False), shown
