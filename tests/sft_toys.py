"""A small SFT trainer."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from rlhf.sft import STAGE, ExactSFTTrainer
from rlhf.stage import StageContext
from rlhf.trainers import trainer_args
from tests.builders import build_model, build_recipe, build_tokenizer
from tests.ppo_toys import lively


def sft_trainer(root: Path, hardware: dict[str, str] | None = None, **options: Any) -> ExactSFTTrainer:
    """On four rows of four to seven tokens of completion."""
    root.mkdir(exist_ok=True)
    tokenizer = build_tokenizer()
    ctx = StageContext(STAGE, build_recipe(root, hardware=hardware or {}), root, "toy")
    ctx.dir.mkdir(parents=True)
    rows = {
        "input_ids": [[1, *range(40, 44 + n), 2] for n in range(4)],
        "completion_mask": [[0, 0, *[1] * (4 + n)] for n in range(4)],
    }
    args = trainer_args(SFTConfig, {"logging_steps": 1} | options, ctx, max_length=None, completion_only_loss=True)
    model = lively(build_model(tokenizer, n_layer=2))
    return ExactSFTTrainer(model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
