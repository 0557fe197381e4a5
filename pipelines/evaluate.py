"""Run the evaluate stage: `python -m pipelines.evaluate --recipe tiny [section.key=value ...]`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main("evaluate", "rlhf.evaluation.stage"))
