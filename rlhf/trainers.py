"""What pretrain, sft and reward share: arguments of transformers' Trainer from the recipe, resume, saving."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import DistributedType
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from rlhf.artifacts import write_json
from rlhf.checkpoints import check_environment, environment, newest_whole, seal
from rlhf.data import load_data_recipe, ordered_by_difficulty
from rlhf.errors import UserError
from rlhf.graphs import Graphed, GraphPool, allocate_gradients, attend_without_mask, graph_pool, has_dropout
from rlhf.interrupt import Interrupted, finish_step_first, requested
from rlhf.lengths import LengthSampler
from rlhf.logs import trainer_callback
from rlhf.models import check_saved, check_tensors, compute_dtype, load_model, save_adapter, save_model, save_tokenizer
from rlhf.stage import StageContext
from rlhf.yamlio import nearest

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"  # beside transformers' files in a checkpoint
ITEMS = "num_items_in_batch"

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
    "save_total_limit": 2,
    "max_grad_norm": 1.0,
    "logging_nan_inf_filter": False,  # it waits for the device at every step
    "ddp_find_unused_parameters": False,  # every trained weight takes part in every forward
}
# Limits that the library's config does not hold: it fails once the model is there, or goes on with nonsense.
LIMITS: dict[str, Any] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Field(ge=1)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), Field(ge=1)),
    **dict.fromkeys(("save_steps", "eval_steps", "save_total_limit", "dataloader_num_workers"), Field(ge=0)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), Field(ge=0, allow_inf_nan=False)),
    **dict.fromkeys(("max_grad_norm", "num_train_epochs"), Field(ge=0, allow_inf_nan=False)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
    "logging_steps": Field(gt=0),
    "max_steps": Field(ge=-1),  # -1: num_train_epochs decides
}


def check_trainer(config_cls: type, values: dict[str, Any], ctx: StageContext, without_eval: str | None = None) -> None:
    """Everything about a pass-through section that can be known before a model is loaded.

    Args:
        config_cls: the library's dataclass.
        values: the section.
        ctx: of the stage that asks.
        without_eval: what to do about an evaluation, where the stage has no held-out rows; None = it has.

    Raises:
        UserError: a key, type, value or combination that the library or the stage cannot take.
    """
    where = f"{ctx.stage.name}.trainer"
    check_trainer_args(config_cls, values, where)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" or values.get("deepspeed"):
        return  # its config leaves a mark that changes how models are loaded from then on
    args: Any = trainer_args(config_cls, values, ctx)
    strategy = str(args.eval_strategy.value)
    if without_eval is not None and strategy != "no":
        raise UserError(f"{where}.eval_strategy: {strategy!r} needs held-out rows, and there are none: {without_eval}")
    weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    try:
        get_scheduler(args.lr_scheduler_type, weights, 0, 10, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}.lr_scheduler_kwargs: {args.lr_scheduler_kwargs!r}: {error}") from None
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise UserError(f"{where}.optim: {args.optim.value!r}: {error}") from None
    except ValueError:
        return  # some look at the model, which is not there yet


def check_trainer_args(config_cls: type, values: dict[str, Any], where: str) -> None:
    """Check keys, types and ranges of a pass-through section against the library's own dataclass and `LIMITS`.

    Raises:
        UserError: unknown or reserved key, a value of another type or out of range.
    """
    hints = typing.get_type_hints(config_cls)
    known = {f.name for f in dataclasses.fields(config_cls) if f.init}
    for key, value in values.items():
        if key in RESERVED:
            raise UserError(f"{where}.{key}: not settable here ({value!r}): {RESERVED[key]}")
        if key not in known:
            raise UserError(f"{where}.{key}: {config_cls.__name__} has no such key{nearest(key, known)}")
        wanted: Any = Annotated[hints[key], LIMITS[key]] if key in LIMITS else hints[key]
        try:
            TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            want = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise UserError(f"{where}.{key}: {value!r} is not allowed; {want}") from None


def in_curriculum_order(data: str, values: dict[str, Any]) -> dict[str, Any]:
    """The pass-through section, with shuffling off where the data recipe puts its rows in a curriculum's order."""
    if ordered_by_difficulty(load_data_recipe(data)):
        return {"train_sampling_strategy": "sequential"} | values
    return values


def trainer_args(config_cls: type, values: dict[str, Any], ctx: StageContext, **fixed: Any) -> TrainingArguments:
    """The library's config from the recipe's pass-through, our defaults and what the stage fixes.

    Raises:
        UserError: the library refuses the combination.
    """
    recipe = ctx.recipe
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(ctx.dir / "tensorboard")  # transformers 5 takes it from here alone
    os.environ.setdefault("WANDB_PROJECT", recipe.logging.project)
    bf16 = compute_dtype(recipe) == torch.bfloat16
    on_gpu = recipe.hardware.device != "cpu" and torch.cuda.is_available()
    copies = {"dataloader_pin_memory": on_gpu, "accelerator_config": {"non_blocking": on_gpu}}
    merged = DEFAULTS | copies | {"warmup_steps": 0} | values | fixed
    try:
        return config_cls(
            output_dir=str(ctx.checkpoints),
            seed=ctx.seed,
            data_seed=ctx.seed,
            use_cpu=not on_gpu,
            bf16=bf16,
            report_to=list(recipe.logging.report_to),
            project=recipe.logging.project,
            run_name=f"{ctx.run}/{ctx.stage.name}",
            **merged,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{ctx.stage.name}.trainer: {config_cls.__name__} refuses it: {error}") from None


def run_trainer(trainer: ExactResume, ctx: StageContext) -> dict[str, float]:
    """Train, from the newest whole checkpoint if there is one; metrics.jsonl on the way.

    Raises:
        UserError: the checkpoint is of another number of processes.
        Interrupted: a signal came; a checkpoint is saved.
    """
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress_bar(ctx.stage.name))
    trainer.add_callback(trainer_callback(ctx.dir))
    trainer.add_callback(trainer.flow())
    checkpoint = newest_whole(checkpoints(ctx.checkpoints))
    if checkpoint:
        logger.info("continuing from %s", checkpoint)
        ctx.continued[:] = check_environment(checkpoint, environment(), ("processes",))
    trainer.prepare_resume(ctx, checkpoint)
    with finish_step_first():
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.stopped_by:
            step, last = trainer.state.global_step, trainer.state.max_steps
            raise Interrupted(trainer.stopped_by, f"step {step} of {last} is done and saved")
    return {key: float(value) for key, value in result.metrics.items() if key == "train_loss"}


def checkpoints(directory: Path) -> list[Path]:
    """transformers' checkpoint folders, oldest first."""
    found = directory.glob("checkpoint-*") if directory.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class ExactResume(Trainer):
    """A Trainer (mixed in front of TRL's) whose resumed run is the uninterrupted one, bit by bit on CPU.

    transformers restores weights, optimizer, schedule, generators and data order. It leaves out what is here: the loss
    summed since the last log row and since the start, TRL's running metrics and token count, log rows after the
    checkpoint, what was due at the end of an epoch; and a run resumed after its last step would take one more.
    Checkpoints are sealed (`rlhf/checkpoints.py`), and older ones go only after that.
    """

    ctx: StageContext
    earlier: dict[str, Any]
    keep: int
    began: float
    stopped_by = 0

    def row_lengths(self) -> list[int]:
        """Tokens of each training row."""
        rows: Any = self.train_dataset
        return [len(ids) for ids in rows["input_ids"]]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthSampler(self.row_lengths(), batch, args.seed, lambda: int(self.state.epoch or 0))

    def prepare_resume(self, ctx: StageContext, checkpoint: Path | None) -> None:
        """Read what `checkpoint` says of the run so far, and drop the log rows that came after it."""
        self.ctx, self.began = ctx, time.time()
        self.earlier = json.loads((checkpoint / STATISTICS).read_text(encoding="utf-8")) if checkpoint else {}
        self.keep, self.args.save_total_limit = self.args.save_total_limit or 0, None
        log = ctx.dir / "metrics.jsonl"
        if self.accelerator.is_main_process and log.is_file():
            os.truncate(log, self.earlier.get("log_bytes", 0))

    def flow(self) -> TrainerCallback:
        """Callback: restores the statistics; moves a save at the end of an epoch behind what else happens there;
        ends the training on a signal."""
        trainer = self

        class Flow(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                trainer._restore_statistics()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                trainer.stopped_by = requested()
                if trainer.stopped_by:
                    control.should_save = control.should_training_stop = True
                self.last = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
                self.later = self.last and control.should_save
                if self.later:
                    control.should_save = False

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if self.later:
                    control.should_save = True
                if not self.last:  # a signal ended it
                    control.should_log = control.should_evaluate = control.should_save = False

        return Flow()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier.get("seconds", 0.0))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        statistics = self._statistics()
        self.accelerator.wait_for_everyone()  # every rank has written its share
        if self.accelerator.is_main_process:
            directory = self.ctx.checkpoints / f"checkpoint-{self.state.global_step}"
            write_json(directory / STATISTICS, statistics)
            seal(directory, environment(), self.ctx.continued)
            self._rotate()
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        best = self.state.best_model_checkpoint
        for old in checkpoints(self.ctx.checkpoints)[: -self.keep] if self.keep else []:
            if best is None or not old.samefile(best):
                shutil.rmtree(old)

    def _statistics(self) -> dict[str, Any]:
        log = self.ctx.dir / "metrics.jsonl"
        return {
            "loss": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),  # each rank has its own
            "total_loss": float(self._total_loss_scalar),
            "last_logged": self._globalstep_last_logged,
            "metrics": {k: [float(x) for x in values] for k, values in self._trl_metrics().items()},
            "tokens": int(getattr(self, "_total_train_tokens", 0)),
            "training": self.model.training,  # TRL names what it logs by it
            "log_bytes": log.stat().st_size if log.is_file() else 0,
            "seconds": self.earlier.get("seconds", 0.0) + time.time() - self.began,
        }

    def _restore_statistics(self) -> None:
        if not self.earlier:
            return
        self._tr_loss.fill_(self.earlier["loss"][self.accelerator.process_index])
        self._total_loss_scalar, self._globalstep_last_logged = self.earlier["total_loss"], self.earlier["last_logged"]
        self._initial_global_step = 0  # train_loss is the mean over the whole run
        self._trl_metrics().update(self.earlier["metrics"])
        self._total_train_tokens = self.earlier["tokens"]
        self.model.train(self.earlier["training"])

    def _trl_metrics(self) -> dict[str, list[float]]:
        return getattr(self, "_metrics", {"train": {}})["train"]


class GraphedTrainer(ExactResume):
    """A Trainer whose steps can be CUDA graphs, and whose metrics stay on the device until they are logged.

    TRL's own waits for the device several times a step. `compute_loss` leaves what metrics are made of in `measured`.
    """

    graphed: Graphed | None = None
    measured: Tensor
    model: Any
    _metrics: Any

    def ungraphable(self) -> str | None:
        """What of this trainer cannot be part of a graph; None where nothing."""
        if self.args.torch_compile:
            return "trainer.torch_compile"
        return "dropout" if has_dropout(self.model) else None

    def graph_steps(self, section: str, choice: str) -> None:
        """Begin with CUDA graphs where they can be.

        Args:
            section: of the recipe, for the message.
            choice: its `cuda_graphs`.

        Raises:
            UserError: `on` where they cannot.
        """
        pool = graph_pool(choice, section, [self.model], self.accelerator, bool(self.args.gradient_checkpointing))
        reason = self.ungraphable() if pool is not None else None
        if reason is not None and choice == "on":
            raise UserError(f"{section}.cuda_graphs: on, but {reason} cannot be part of a graph: set it to auto or off")
        if pool is not None and reason is None:
            self.use_graphs(pool)

    def use_graphs(self, pool: GraphPool | None) -> None:
        """Replay a step's forward and backward as CUDA graphs: batches must come in few shapes, padded on the right."""
        attend_without_mask(self.model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def zero_grad() -> None:  # transformers would set gradients to None, and a graph adds to them where they are
            allocate_gradients(parameters)
            torch._foreach_zero_([parameter.grad for parameter in parameters if parameter.grad is not None])

        self.model.zero_grad = zero_grad
        self.graphed = Graphed(self._forward_backward, pool, prepare=lambda: allocate_gradients(parameters))

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch; returns its loss."""
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:
            inputs = inputs | {ITEMS: num_items_in_batch}
        parts = self.current_gradient_accumulation_steps  # the loss is divided by it
        loss, self.measured = self.graphed(*inputs.values(), names=tuple(inputs), parts=parts)
        return loss

    def _forward_backward(self, *tensors: Tensor, names: tuple[str, ...], parts: int) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(names, tensors, strict=True))
        items = inputs.pop(ITEMS, None)
        loss = super().training_step(self.model_wrapped, inputs, items)
        return loss, self.measured

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The only place where metrics leave the device."""
        kept = self._metrics["train" if self.model.training else "eval"]
        device = self.accelerator.device
        for key, values in kept.items():  # those of before a resume are plain numbers
            kept[key] = torch.stack([torch.as_tensor(value, device=device).double() for value in values]).tolist()
        super().log(logs, start_time)


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
        save_adapter(model, ctx.dir / "adapter", state_dict=state)
        model = merged(base, ctx.dir / "adapter", kind)
        save_model(model, tokenizer, ctx.dir / "model")
    else:
        model.save_pretrained(ctx.dir / "model", state_dict=dict(state))  # transformers empties the dict it is given
        save_tokenizer(tokenizer, ctx.dir / "model", kind)
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
