"""Data: recipes, sources, formats, splits, and the one renderer of all stages."""

from rlhf.data.fingerprint import DATA_VERSION, data_fingerprint, lineage
from rlhf.data.formats import FORMATS, KIND_COLUMNS, Prompt
from rlhf.data.load import check_split, load_rows, prepared
from rlhf.data.recipe import DATA_RECIPES_DIR, DataRecipe, load_data_recipe
from rlhf.data.render import Renderer
from rlhf.data.steps import ordered_by_difficulty

__all__ = [
    "DATA_RECIPES_DIR",
    "DATA_VERSION",
    "FORMATS",
    "KIND_COLUMNS",
    "DataRecipe",
    "Prompt",
    "Renderer",
    "check_split",
    "data_fingerprint",
    "lineage",
    "load_data_recipe",
    "load_rows",
    "ordered_by_difficulty",
    "prepared",
]
