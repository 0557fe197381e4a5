"""What pretrain, sft and reward share: arguments of transformers' Trainer from the recipe, resume, saving."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from rlhf.errors import UserError
from rlhf.logs import trainer_callback
from rlhf.models import check_saved, check_tensors, compute_dtype, load_model, save_model
from rlhf.stage import StageContext
from rlhf.yamlio import nearest

logger = logging.getLogger(__name__)

# Set from elsewhere in the recipe, or the contract of the artifact directory would not hold.
RESERVED = {
    "output_dir": "the artifact directory decides it",
    "seed": "set the stage's seed",
    "data_seed": "set the stage's seed",
    "use_cpu": "set hardware.device",
    "bf16": "set hardware.precision",
    "fp16": "set hardware.precision",
    "report_to": "set logging.report_to",
    "run_name": "set --run",
    "completion_only_loss": "the loss is always on completions",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "push_to_hub": "push the published model/ folder yourself",
    "max_length": "set the stage's max_length",
    "chat_template_path": "set model.chat_template",
    "eos_token": "set model.eos_token",
    "pad_token": "set model.pad_token",
    "model_init_kwargs": "set the model section",
}
DEFAULTS: dict[str, Any] = {
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 1,
    "max_grad_norm": 1.0,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,  # every trained weight takes part in every forward
}


def check_trainer_args(config_cls: type, values: dict[str, Any], where: str) -> None:
    """Check keys and types of a pass-through section against the library's own dataclass.

    Raises:
        UserError: unknown or reserved key, or a value of another type.
    """
    hints = typing.get_type_hints(config_cls)
    known = {f.name for f in dataclasses.fields(config_cls) if f.init}
    for key, value in values.items():
        if key in RESERVED:
            raise UserError(f"{where}.{key}: not settable here ({value!r}): {RESERVED[key]}")
        if key not in known:
            raise UserError(f"{where}.{key}: {config_cls.__name__} has no such key{nearest(key, known)}")
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            want = error.errors()[0]["msg"]
            raise UserError(f"{where}.{key}: {value!r} has the wrong type: {want}") from None


def trainer_args(config_cls: type, values: dict[str, Any], ctx: StageContext, **fixed: Any) -> TrainingArguments:
    """The library's config from the recipe's pass-through, our defaults and what the stage fixes.

    Raises:
        UserError: the library refuses the combination.
    """
    recipe = ctx.recipe
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(ctx.dir / "tensorboard")  # transformers 5 takes it from here alone
    os.environ.setdefault("WANDB_PROJECT", recipe.logging.project)
    bf16 = compute_dtype(recipe) == torch.bfloat16
    merged = DEFAULTS | {"warmup_steps": 0} | values | fixed
    try:
        return config_cls(
            output_dir=str(ctx.checkpoints),
            seed=ctx.seed,
            data_seed=ctx.seed,
            use_cpu=recipe.hardware.device == "cpu" or not torch.cuda.is_available(),
            bf16=bf16,
            report_to=list(recipe.logging.report_to),
            project=recipe.logging.project,
            run_name=f"{ctx.run}/{ctx.stage.name}",
            **merged,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{ctx.stage.name}.trainer: {config_cls.__name__} refuses it: {error}") from None


def run_trainer(trainer: Trainer, ctx: StageContext) -> dict[str, float]:
    """Train, from the newest whole checkpoint if there is one; metrics.jsonl on the way."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress_bar(ctx.stage.name))
    trainer.add_callback(trainer_callback(ctx.dir))
    trainer.add_callback(whole_checkpoints())
    checkpoint = newest_checkpoint(ctx.checkpoints)
    if checkpoint:
        logger.info("continuing from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return {key: float(value) for key, value in result.metrics.items() if key == "train_loss"}


def progress_bar(stage: str) -> Any:
    """transformers' progress bar with the numbers beside it instead of one line each."""
    from transformers import ProgressCallback

    class Bar(ProgressCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description(stage)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown = [f"{key} {logs[key]:.3g}" for key in ("loss", "accuracy", "eval_loss") if key in (logs or {})]
            if self.training_bar is not None and shown:
                self.training_bar.set_postfix_str(", ".join(shown))

    return Bar()


WHOLE = "whole"  # marker file: transformers writes a checkpoint's files one by one


def whole_checkpoints() -> Any:
    """Callback that marks a checkpoint once all its files are there."""
    from transformers import TrainerCallback

    class MarkWhole(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    return MarkWhole()


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path for path in directory.glob("checkpoint-*") if (path / WHOLE).is_file()] if directory.is_dir() else []
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def save_trained(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    ctx: StageContext,
    base: str | Path | PreTrainedModel,
    kind: Literal["causal", "score"],
) -> None:
    """Write `model/` (and `adapter/` with LoRA) on rank 0 and check what was written.

    Sharded weights are gathered here. With LoRA the adapter is written in PEFT's layout and merged into a fresh copy of
    the base, which is what the next stage builds on.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    # Without accelerate's mixed-precision wrapper: what is saved is compared in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if hasattr(model, "peft_config"):
        model.save_pretrained(ctx.dir / "adapter", state_dict=state)
        model = merged(base, ctx.dir / "adapter", kind)
        save_model(model, tokenizer, ctx.dir / "model")
    else:
        model.save_pretrained(ctx.dir / "model", state_dict=dict(state))  # transformers empties the dict it is given
        tokenizer.save_pretrained(ctx.dir / "model")
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED) and "adapter" not in {
        path.name for path in ctx.dir.iterdir()
    }:
        check_tensors(state, ctx.dir / "model", kind)  # a forward of sharded weights would need every rank
    else:
        check_saved(model, ctx.dir / "model", kind)


def merged(base: str | Path | PreTrainedModel, adapter: Path, kind: Literal["causal", "score"]) -> PreTrainedModel:
    """A float32 copy of the base on CPU with the adapter folded into its weights."""
    from peft import PeftModel

    model = base if isinstance(base, PreTrainedModel) else load_model(base, kind)
    return PeftModel.from_pretrained(model.float().cpu(), str(adapter)).merge_and_unload()
