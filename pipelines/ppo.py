"""Run the ppo stage: `python -m pipelines.ppo --recipe tiny [section.key=value ...]`."""

from pipelines.cli import leave, main

if __name__ == "__main__":
    leave(main("ppo", "rlhf.ppo.stage"))
