"""List the runs below an artifact directory: `python -m pipelines.status --artifacts artifacts`."""

import argparse
import sys
from pathlib import Path

from pipelines.cli import Parser, guarded
from rlhf.artifacts import MANIFEST, STAGES, Artifact
from rlhf.errors import UserError
from rlhf.labels.records import LABELS
from rlhf.locks import running


def status(root: Path, verify: bool = False) -> list[str]:
    """One line per stage: complete, stale, running, interrupted or damaged, with its time and headline.

    Args:
        root: artifact directory.
        verify: compare every file with the manifest, which reads all of it.
    """
    lines = []
    for run in sorted(path for path in root.iterdir() if path.is_dir() and path.name != LABELS):
        stages = sorted((path for path in run.iterdir() if path.is_dir()), key=_order)
        lines += [f"{run.name}/{stage.name:10} {describe(stage, verify)}" for stage in stages]
    return lines


def _order(path: Path) -> tuple[int, str]:
    stage = path.name.split(".")[0]
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), path.name)


def describe(stage: Path, verify: bool = False) -> str:
    """State of one stage folder; with `verify` also of the bytes of its files."""
    if stage.suffix == ".partial":
        pid = running(stage.with_suffix(".lock"))
        if pid:
            return f"running, process {pid}"
        if (stage.parent / stage.stem / MANIFEST).is_file():  # the finished one would be skipped
            return "interrupted, and the finished one beside it stays in use: FORCE=1 makes it again"
        return "interrupted: run the stage again to continue"
    try:
        artifact = Artifact.load(stage)
        if verify:
            artifact.verify()
    except UserError as error:
        return f"damaged: {error}"
    missing = artifact.missing()
    if missing:
        return f"damaged: {missing[0]} is missing; run the stage again"
    stale = stale_inputs(artifact)
    if stale:
        return f"stale: {', '.join(stale)} changed since; run the stage again"
    manifest = artifact.manifest
    gate = f", gate {manifest['gate']['verdict'].upper()}" if "gate" in manifest else ""
    return f"complete in {manifest['wall_seconds']:.0f} s, {manifest['peak_memory_gib']:.1f} GiB{gate}"


def stale_inputs(artifact: Artifact) -> list[str]:
    """Inputs that are not what this stage was made from any more."""
    stale = []
    for reference, digest in artifact.manifest["inputs"].items():
        path = artifact.path.parent / reference if "/" not in reference else Path(reference)
        try:
            current = Artifact.load(path)
        except UserError:
            stale.append(reference)
            continue
        if current.hash != digest or stale_inputs(current):
            stale.append(reference)
    return stale


def main(argv: list[str] | None = None) -> int:
    """Print the status; returns 0, or 2 after one line on stderr where there is no such directory."""
    parser = Parser(prog="python -m pipelines.status", description=__doc__)
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with the manifest")
    return guarded("status", show, parser, argv)


def show(args: argparse.Namespace) -> None:
    """Prints one line per stage."""
    root = Path(args.artifacts)
    if not root.is_dir():
        raise UserError(f"--artifacts {root}: no such directory: run `make sft` first")
    print("\n".join(status(root, args.verify)) or f"{root}: no runs yet")


if __name__ == "__main__":
    sys.exit(main())
