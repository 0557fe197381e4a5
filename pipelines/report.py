"""Write report.html of a run: `python -m pipelines.report --recipe tiny [--against other_run] [--stage reward]`."""

import argparse
import logging
import os
import sys
from pathlib import Path

from pipelines.cli import check_folder, main
from rlhf.artifacts import Artifact, check_name

logger = logging.getLogger("rlhf")


def report(args: argparse.Namespace) -> Artifact | None:
    """Measure a reward model again where stage, folder or settings ask for it; then write the page of the run."""
    from rlhf.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    run = check_name(args.run or recipe.name, "--run")
    measure = bool(args.stage or args.folder or args.overrides)
    if args.dry_run or int(os.environ.get("RANK", "0")):
        first = "measure the reward model again and " if measure else ""
        logger.info("report: would %swrite the page of run %s", first, run)
        return None
    if measure:
        from rlhf.reward.train import redo_report  # torch only after the recipe has been read

        redo_report(recipe, Path(args.artifacts), run, check_folder(args.folder or "reward"))
    write(Path(args.artifacts), run, args.against)
    return None


def write(artifacts: Path, run: str, against: str | None) -> None:
    """Write the page and say where it is; `against` is a run beside it, or the path of one."""
    from rlhf.evaluation.curves import load_run
    from rlhf.report.page import write_page

    other = None if against is None else load_run(against if os.sep in against else artifacts / against)
    path = write_page(load_run(artifacts / run), other)
    logger.info("report: %s (%.1f MB, opens in any browser, offline)", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    sys.exit(main("report", "rlhf.reward.train", act=report))
