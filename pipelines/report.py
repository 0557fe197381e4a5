"""Redo the report on a finished stage: `python -m pipelines.report --stage reward --recipe tiny [key=value ...]`."""

import argparse
import logging
import os
import sys
from pathlib import Path

from pipelines.cli import check_folder, main
from rlhf.artifacts import Artifact

logger = logging.getLogger("rlhf")


def redo(args: argparse.Namespace) -> Artifact | None:
    """Measure the reward model of the run again, in one process."""
    from rlhf.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run or int(os.environ.get("RANK", "0")):
        logger.info("report: would measure the reward model of run %s again", args.run or recipe.name)
        return None
    from rlhf.reward.train import redo_report  # torch only after the recipe has been read

    return redo_report(recipe, Path(args.artifacts), args.run, check_folder(args.folder or "reward"))


if __name__ == "__main__":
    sys.exit(main("report", "rlhf.reward.train", act=redo))
