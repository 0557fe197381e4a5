"""What decides the rows of a data recipe, as one hash."""

import hashlib
import json
from typing import Any

from rlhf.data.recipe import DataRecipe, load_data_recipe
from rlhf.data.sources import describe, source_hash
from rlhf.data.steps import all_steps, inputs_identity

# Part of every fingerprint. Raise it when the same recipe and source begin to give other rows.
DATA_VERSION = 2
ABOUT = {"licence", "homepage", "synthetic"}  # correcting these must not retrain a model


def data_fingerprint(recipe: DataRecipe) -> str:
    """sha256 (hex) over everything that the rows depend on: recipe, bytes of the source, what steps read, this code.

    Raises:
        UserError: the source, or what a step reads, does not exist.
    """
    content = recipe.model_dump(mode="json", exclude=ABOUT | {"clean"})
    parts: dict[str, Any] = {"version": DATA_VERSION, "recipe": content}
    if recipe.source is not None:
        parts["source"] = source_hash(recipe.source)
        parts["clean"] = [step.model_dump(mode="json") for step in all_steps(recipe)]
        parts["step_inputs"] = inputs_identity(recipe, data_fingerprint)
    else:
        parts["mixture"] = [data_fingerprint(load_data_recipe(item.recipe)) for item in recipe.mixture or ()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def lineage(recipe: DataRecipe) -> dict[str, Any]:
    """Where the rows come from, for a stage's manifest: fingerprint and source, of a mixture those of its parts."""
    found: dict[str, Any] = {"fingerprint": data_fingerprint(recipe)}
    if recipe.source is not None:
        return found | {"source": describe(recipe.source), "source_sha256": source_hash(recipe.source)}
    return found | {"parts": {item.recipe: lineage(load_data_recipe(item.recipe)) for item in recipe.mixture or ()}}
