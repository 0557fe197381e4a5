"""Run the sft stage: `python -m pipelines.sft --recipe tiny [section.key=value ...]`."""

from pipelines.cli import leave, main

if __name__ == "__main__":
    leave(main("sft", "rlhf.sft"))
