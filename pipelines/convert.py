"""Write a recipe's base model as a plain folder, checked: `python -m pipelines.convert --recipe smollm2 --out DIR`."""

import argparse
import logging
import sys
from pathlib import Path

from pipelines.cli import Parser, guarded
from rlhf.recipe import load_recipe

logger = logging.getLogger("rlhf")


def main(argv: list[str] | None = None) -> int:
    """Writes the folder; returns 0, or 2 after one line on stderr."""
    parser = Parser(prog="python -m pipelines.convert", description=__doc__)
    parser.add_argument("--recipe", default="smollm2", metavar="NAME-OR-PATH", help="recipe with the base (smollm2)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, for model.base")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.base=/my/model")
    return guarded("convert", run, parser, argv)


def run(args: argparse.Namespace) -> None:
    """Converts, and says what the folder holds."""
    recipe = load_recipe(args.recipe, args.overrides)
    from rlhf.convert import convert  # torch only after the recipe has been read

    facts = convert(recipe, args.out)
    ids = facts["tokenizer"]
    logger.info(
        "%s: pad %d, eos %d, %d tokens; %d probes give the same tokens, logits and greedy answers as the original",
        *(args.out, ids["pad_id"], ids["eos_id"], ids["vocab_size"], len(facts["probes"])),
    )
    for probe in facts["probes"]:
        logger.info("  %r -> %r", probe["text"], probe["greedy"])


if __name__ == "__main__":
    sys.exit(main())
