"""Run the pretrain stage: `python -m pipelines.pretrain --recipe tiny [section.key=value ...]`."""

from pipelines.cli import leave, main

if __name__ == "__main__":
    leave(main("pretrain", "rlhf.pretrain"))
