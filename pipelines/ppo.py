"""Run the ppo stage: `python -m pipelines.ppo --recipe tiny [section.key=value ...]`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main("ppo", "rlhf.ppo.stage"))
