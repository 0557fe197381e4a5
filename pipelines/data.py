"""Clean one data recipe: `python -m pipelines.data --recipe hh_rlhf --artifacts artifacts`."""

import argparse
import logging
import sys
from pathlib import Path

from pipelines.cli import BAD_INPUT, setup_logging
from rlhf.data import load_data_recipe
from rlhf.data.prepare import prepare
from rlhf.errors import UserError

logger = logging.getLogger("rlhf")


def main(argv: list[str] | None = None) -> int:
    """Writes ARTIFACTS/data/NAME; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.data", description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="NAME-OR-PATH", help="data recipe")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write the set again although nothing changed")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        recipe = load_data_recipe(args.recipe)
        final = Path(args.artifacts) / "data" / recipe.name
        manifest = prepare(recipe, final, args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    steps = ", ".join(f"{name} {count}" for name, count in manifest["steps"].items())
    logger.info("%s: %s", final, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
