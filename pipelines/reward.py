"""Run the reward stage: `python -m pipelines.reward --recipe tiny [section.key=value ...]`."""

from pipelines.cli import leave, main

if __name__ == "__main__":
    leave(main("reward", "rlhf.reward.train"))
