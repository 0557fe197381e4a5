"""Select pairs for annotators: `python -m pipelines.label_select --data my_pairs.yaml --count 200`."""

import argparse
import logging
import sys
from pathlib import Path

from pipelines.cli import Parser, guarded
from rlhf.data import load_data_recipe
from rlhf.labels.choose import WORDS, Choice, choose
from rlhf.labels.records import LABELS_FILE, PAIRS_FILE, label_folder
from rlhf.labels.selection import METHODS
from rlhf.recipe import load_recipe

logger = logging.getLogger("rlhf")


def main(argv: list[str] | None = None) -> int:
    """Adds to ARTIFACTS/labels/NAME/selected.jsonl; returns 0, or 2 after one line on stderr."""
    parser = Parser(prog="python -m pipelines.label_select", description=__doc__)
    parser.add_argument("--data", required=True, metavar="NAME-OR-PATH", help="data recipe of the pairs")
    parser.add_argument("--split", default="train", help="of the data recipe (train)")
    parser.add_argument("--count", type=int, default=Choice.count, metavar="N", help=f"pairs ({Choice.count})")
    parser.add_argument("--method", default=Choice.method, help=f"{', '.join(METHODS)} ({Choice.method})")
    parser.add_argument(
        "--features",
        default=WORDS,
        metavar="WHAT",
        help="words; the folder of a sentence-transformers model; or a stage of the run, such as sft (words)",
    )
    parser.add_argument("--reward", nargs="*", default=[], metavar="NAME", help="reward models of the run to ask")
    parser.add_argument("--recipe", default="tiny", metavar="NAME-OR-PATH", help="of the run, for its stages (tiny)")
    parser.add_argument("--run", metavar="NAME", help="folder of the run (the recipe's name)")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=Choice.max_length, help="tokens that a stage's model reads")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="selected.jsonl to extend")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels so far (labels.jsonl beside the pairs)")
    return guarded("label-select", select, parser, argv)


def select(args: argparse.Namespace) -> None:
    """Resolves the run's folders, selects, and says what to do next."""
    artifacts = Path(args.artifacts)
    recipe = load_recipe(args.recipe)
    run = artifacts / (args.run or recipe.name)
    stage = run / args.features
    choice = Choice(
        load_data_recipe(args.data),
        args.split,
        args.count,
        args.method,
        args.seed,
        str(stage) if args.features != WORDS and stage.is_dir() else args.features,
        tuple(run / name for name in args.reward),
        recipe.model.chat,
        args.max_length,
    )
    pairs = args.pairs or label_folder(artifacts, args.data) / PAIRS_FILE
    choose(choice, artifacts, pairs, args.labels or pairs.with_name(LABELS_FILE))
    logger.info("next: make label DATA=%s", args.data)


if __name__ == "__main__":
    sys.exit(main())
