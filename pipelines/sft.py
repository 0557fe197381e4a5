"""Run the sft stage: `python -m pipelines.sft --recipe tiny [section.key=value ...]`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main("sft", "rlhf.sft"))
