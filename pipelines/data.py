"""Clean one data recipe: `python -m pipelines.data --recipe hh_rlhf --artifacts artifacts`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pipelines.cli import Parser, guarded
from rlhf.artifacts import DATA
from rlhf.data import DataRecipe, load_data_recipe
from rlhf.data.load import parts_of
from rlhf.data.prepare import prepare
from rlhf.errors import UserError

logger = logging.getLogger("rlhf")


def main(argv: list[str] | None = None) -> int:
    """Writes ARTIFACTS/data/NAME, of a mixture those of its parts; returns 0, or 2 after one line on stderr."""
    parser = Parser(prog="python -m pipelines.data", description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="NAME-OR-PATH", help="data recipe")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write the set again although nothing changed")
    parser.add_argument("--tokenizer", metavar="FOLDER-OR-ID", help="adds token counts to the card")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    return guarded("data", clean, parser, argv)


def clean(args: argparse.Namespace) -> None:
    """Prepares the set, of a mixture those of its parts."""
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    for part in parts_of(load_data_recipe(args.recipe)):
        write(part, args)


def write(recipe: DataRecipe, args: argparse.Namespace) -> None:
    """Prepares one set and says what became of its rows."""
    final = Path(args.artifacts) / DATA / recipe.name
    counter = (args.tokenizer, load_tokenizer(args.tokenizer)) if args.tokenizer else None
    manifest = prepare(recipe, final, args.force, args.workers, counter)
    lost = {step["step"]: step["rows"] - step["kept"] for step in manifest["cleaning"] if step["rows"] > step["kept"]}
    steps = ", ".join(f"{name} {count}" for name, count in manifest["steps"].items())
    logger.info("%s: %s%s", final, steps, "".join(f", {name} -{count}" for name, count in lost.items()))


def load_tokenizer(name: str) -> Any:
    """Function from a text to its number of tokens.

    Raises:
        UserError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


if __name__ == "__main__":
    sys.exit(main())
