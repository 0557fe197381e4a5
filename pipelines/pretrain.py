"""Run the pretrain stage: `python -m pipelines.pretrain --recipe tiny [section.key=value ...]`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main("pretrain", "rlhf.pretrain"))
