"""Run the reward stage: `python -m pipelines.reward --recipe tiny [section.key=value ...]`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main("reward", "rlhf.reward.train"))
