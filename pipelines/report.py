"""Write report.html of a run: `python -m pipelines.report --recipe tiny [--against other_run] [--stage reward]`."""

import argparse
import logging
import os
from pathlib import Path

from pipelines.cli import check_folder, leave, main
from rlhf.artifacts import MANIFEST, Artifact, check_name
from rlhf.errors import UserError

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

    own, other = run_folder(artifacts, run, "--run"), None
    if against is not None:
        beside = artifacts / against
        other = load_run(beside if beside.is_dir() else run_folder(Path(), against, "--against", artifacts))
    path = write_page(load_run(own), other)
    logger.info("report: %s (%.1f MB, opens in any browser, offline)", path, path.stat().st_size / 1e6)


def run_folder(parent: Path, name: str, option: str, artifacts: Path | None = None) -> Path:
    """The folder of a run.

    Raises:
        UserError: there is none; names the runs of `artifacts` (None = `parent`).
    """
    if (parent / name).is_dir():
        return parent / name
    root = artifacts or parent
    runs = sorted({path.parent.parent.name for path in root.glob(f"*/*/{MANIFEST}")} - {"data"})
    raise UserError(f"report: {option} {name}: no such run in {root}: there are {', '.join(runs) or 'none'}")


if __name__ == "__main__":
    leave(main("report", "rlhf.reward.train", act=report))
