"""A recipe over seeds and values, and one table out of it.

    python -m pipelines.sweep --recipe tiny --over ppo.kl_coef=0.05,0.1 --over seed=0,1

Each combination is a run of its own, such as `tiny-kl_coef_0.1-seed_1`. Stages that are not run again (--stages) are
those of the recipe's own run. Finished stages are skipped and interrupted ones go on, so the same command continues.
"""

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.cli import Parser, fail, setup_logging
from rlhf.artifacts import MANIFEST, STAGES, UNPUBLISHED, Artifact, check_name
from rlhf.errors import UserError
from rlhf.evaluation.sweeps import Point, is_seed, markdown, points, run_name, table
from rlhf.recipe import Recipe, load_recipe


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments.

    Raises:
        UserError: unknown ones, or values of a stage that is not run.
    """
    parser = Parser(
        prog="python -m pipelines.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", metavar="NAME-OR-PATH", help="shipped recipe or YAML file (tiny)")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR", help="artifact directory (artifacts)")
    parser.add_argument("--base", metavar="NAME", help="run whose other stages are used (the recipe's name)")
    parser.add_argument("--over", action="append", required=True, metavar="section.key=a,b,c", help="repeat for more")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["ppo", "evaluate"], help="(ppo evaluate)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="the same for every run")
    parser.add_argument("--launch", default=sys.executable, help='such as "accelerate launch --num_processes 8"')
    parser.add_argument("--metrics", nargs="+", default=[], help="columns, from the manifest of the last stage")
    parser.add_argument("--table-only", action="store_true", help="of what is finished; run nothing")
    parser.add_argument("--csv", metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    args.points = points(args.over)
    for key in args.points[0]:
        stage = key.partition(".")[0]
        if stage in STAGES and stage not in args.stages:
            raise UserError(f"--over {key}: stage {stage} is not run: add it to --stages")
    names = {run_name("run", point) for point in args.points}
    if len(names) < len(args.points):
        raise UserError("--over: two combinations make the same name of a run; leave one of the values out")
    args.base = check_name(args.base or Path(args.recipe).stem, "--base")
    if args.csv and not Path(args.csv).absolute().parent.is_dir():
        raise UserError(f"--csv {args.csv}: no such folder: make it first")
    for point in args.points:
        check_point(args, load_recipe(args.recipe, [*args.set, *settings_of(point)]))
    return args


def settings_of(point: Point) -> list[str]:
    """A combination as overrides."""
    return [f"{key}={value}" for key, value in point.items()]


def check_point(args: argparse.Namespace, recipe: Recipe) -> None:
    """The stages that are not run again must be there, before a folder is made.

    Raises:
        UserError: one is missing.
    """
    root = Path(args.artifacts) / args.base
    before = STAGES[: max(STAGES.index(stage) for stage in args.stages)]
    named = {"sft", "reward"} & set(before) - set(args.stages)
    wanted = [name for name in before if name in named and getattr(recipe, name) is not None]
    missing = [stage for stage in wanted if not (root / stage / MANIFEST).is_file()]
    if missing and not args.table_only:
        raise UserError(f"--base {args.base}: no finished {missing[0]} in {root}: make it first, or name another run")


def shared(base: Path, stages: Sequence[str]) -> list[str]:
    """Finished artifacts of `base` that a run does not make itself: its other stages, a second reward model, ..."""
    places = [path.parent for path in sorted(base.glob(f"*/{MANIFEST}"))]
    found = [Artifact.load(place) for place in places if place.suffix not in UNPUBLISHED]
    return [artifact.path.name for artifact in found if artifact.stage not in stages]


def share(base: Path, run: Path, stages: Sequence[str]) -> None:
    """Give a run what `shared` names."""
    link(base, run, shared(base, stages))


def link(base: Path, run: Path, names: Sequence[str]) -> None:
    """Give a run these artifacts of another: the same files, no copies where links can be."""
    for name in names:
        if (run / name).exists():
            continue
        half = run / f"{name}.linking"
        shutil.rmtree(half, ignore_errors=True)
        try:
            shutil.copytree(base / name, half, copy_function=os.link)
        except (OSError, shutil.Error):
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(base / name, half)
        half.rename(run / name)


def check_shared(args: argparse.Namespace) -> None:
    """One table compares settings alone: all runs stand on the same stages.

    Raises:
        UserError: a stage that is not run again was made anew since a run took it over.
    """
    root = Path(args.artifacts)
    for stage in shared(root / args.base, args.stages):
        places = {name: root / name / stage for name in [args.base, *(run_name(args.base, p) for p in args.points)]}
        hashes = {name: Artifact.load(place).hash for name, place in places.items() if (place / MANIFEST).is_file()}
        others = [name for name, found in hashes.items() if found != next(iter(hashes.values()))]
        if others:
            raise UserError(
                f"sweep: {places[others[0]]} is not the {stage} of {next(iter(hashes))}, which was made again since: "
                f"move {root / others[0]} away, or name the run that it was made from (--base)"
            )


def run_point(args: argparse.Namespace, point: Point) -> int:
    """All stages of one run; returns the first exit code that is not 0."""
    name, root = run_name(args.base, point), Path(args.artifacts)
    (root / name).mkdir(parents=True, exist_ok=True)
    share(root / args.base, root / name, args.stages)
    settings = settings_of(point)
    for stage in (stage for stage in STAGES if stage in args.stages):
        print(f"{name}: {stage}", flush=True)
        command = [*shlex.split(args.launch), "-m", f"pipelines.{stage}", "--recipe", args.recipe]
        done = subprocess.run([*command, "--artifacts", args.artifacts, "--run", name, *args.set, *settings])
        if done.returncode:
            return done.returncode
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run and print; the exit code is 0, or that of the first stage that failed."""
    setup_logging()
    try:
        args = parse(argv)
        check_shared(args)
        for point in args.points if not args.table_only else []:
            code = run_point(args, point)
            if code:
                return code
        last = [stage for stage in STAGES if stage in args.stages][-1]
        rows = table(Path(args.artifacts), args.base, args.points, last, args.metrics)
    except UserError as error:
        return fail(str(error))
    seeds = [key for key in args.points[0] if is_seed(key)]
    print((f"\nMean ± standard deviation over {' and '.join(seeds)}:\n\n" if seeds else "\n") + markdown(rows))
    if args.csv:
        with open(args.csv, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
