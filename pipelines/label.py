"""Label pairs in the browser: `python -m pipelines.label --data NAME`, or `--pairs selected.jsonl`."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from pipelines.cli import Parser, guarded
from rlhf.errors import UserError
from rlhf.labels.agreement import agreement
from rlhf.labels.records import LABELS_FILE, PAIRS_FILE, label_folder, read_labels
from rlhf.labels.server import Server, Session
from rlhf.locks import locked

logger = logging.getLogger("rlhf")


def main(argv: list[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns 0, or 2 after one line on stderr."""
    parser = Parser(prog="python -m pipelines.label", description=__doc__)
    parser.add_argument("--data", metavar="NAME-OR-PATH", help="data recipe that `make label-select` chose from")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="instead of --data: another selected.jsonl")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="where labels go (labels.jsonl beside the pairs)")
    parser.add_argument("--port", type=int, default=8765, help="0 = any free one (8765)")
    parser.add_argument("--agreement", action="store_true", help="only say how far the annotators agree")
    return guarded("label", label, parser, argv)


def label(args: argparse.Namespace) -> None:
    """Serves the page, or says how far the annotators agree."""
    if not (args.pairs or args.data):
        raise UserError("label: which pairs? give --data NAME (make label DATA=NAME), or --pairs FILE")
    pairs = args.pairs or label_folder(Path(args.artifacts), args.data) / PAIRS_FILE
    labels = args.labels or pairs.with_name(LABELS_FILE)
    if not args.agreement:
        serve(pairs, labels, args.port)
    elif labels.is_file():
        logger.info(described(agreement(read_labels(labels))))
    else:
        raise UserError(f"label: no labels in {labels} yet: run make label first, or name another folder")


def serve(pairs: Path, labels: Path, port: int) -> None:
    """Serves the page until it is interrupted; one server at a time per file of labels."""
    with locked(labels.with_name(f"{labels.name}.lock")):
        session = Session(pairs, labels)
        with Server(session, port) as server:
            logger.info("%d pairs from %s, %d decisions in %s", len(session.pairs), pairs, len(session.labels), labels)
            logger.info("open %s in a browser on this machine; Ctrl-C ends, labels are on disk at once", server.url)
            sys.stdout.flush()
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                logger.info(described(agreement(session.labels)))


def described(found: dict[str, Any]) -> str:
    """Agreement in a few lines."""
    names = ", ".join(f"{name} {count}" for name, count in found["annotators"].items()) or "none yet"
    given = ", ".join(f"{label} {count}" for label, count in found["labels"].items())
    lines = [f"votes by annotator: {names}", f"votes: {given}", f"pairs with several annotators: {found['overlap']}"]
    for key, title in (("percent", "agreement"), ("kappa", "Cohen's kappa"), ("alpha", "Krippendorff's alpha")):
        if found[key] is not None:
            lines.append(f"{title}: {found[key]:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
