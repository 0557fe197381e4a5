"""Training state of PPO on disk: whole or not there.

A checkpoint is written beside its place and renamed; the newest whole one is loaded. Accelerate saves models, optimiser
and the generators of every rank, in DDP as in FSDP; counters and controllers are JSON. The best policy so far is a
file of its own, named by its step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.artifacts import write_json

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

logger = logging.getLogger(__name__)

STATE = "trainer.json"


def trainable_state(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole trained tensors by name (with LoRA: adapters and heads only), on rank 0. This gathers sharded weights."""
    names = {name for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
    state = accelerator.get_state_dict(model)
    return {name: tensor.detach().cpu() for name, tensor in state.items() if name in names}


class Checkpointer:
    """Saves and loads below `directory`."""

    def __init__(self, directory: Path, accelerator: Accelerator, keep: int = 1) -> None:
        self.directory, self.accelerator, self.keep = directory, accelerator, keep

    def save(self, trainer: PPOTrainer) -> None:
        """Write a checkpoint of this ppo_step and drop the ones before it."""
        final = self.directory / f"step_{trainer.ppo_step:06d}"
        tmp = final.with_name(final.name + ".tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(tmp))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(tmp / STATE, trainer.state_dict())
            os.replace(tmp, final)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(old)
            self._prune_best(trainer)
        self.accelerator.wait_for_everyone()

    def steps(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.directory.glob("step_*") if self.directory.is_dir() else []
        return sorted(path for path in found if path.suffix != ".tmp")

    def load(self, trainer: PPOTrainer) -> dict[str, Any] | None:
        """Restore weights, optimiser and generators of the newest checkpoint; returns the trainer's own state."""
        steps = self.steps()
        if not steps:
            return None
        logger.info("loading checkpoint %s", steps[-1])
        self.accelerator.load_state(str(steps[-1]))
        return json.loads((steps[-1] / STATE).read_text(encoding="utf-8"))

    def save_best(self, trainer: PPOTrainer) -> None:
        """Write the trained weights of this step; the one that the last checkpoint names is kept beside it."""
        state = trainable_state(trainer.model, self.accelerator)
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self._best(trainer.ppo_step)
            tmp = path.with_suffix(".tmp")
            torch.save(state, tmp)
            os.replace(tmp, path)
            if not self.steps():
                self._prune_best(trainer)
        self.accelerator.wait_for_everyone()

    def best_state(self, trainer: PPOTrainer) -> dict[str, Tensor]:
        """Trained tensors of the step to publish, on rank 0: the best one, or the last where none is tracked."""
        if trainer.best is None:
            return trainable_state(trainer.model, self.accelerator)
        return torch.load(self._best(trainer.best[1]), map_location="cpu", weights_only=True)

    def _best(self, step: int) -> Path:
        return self.directory / f"best_{step:06d}.pt"

    def _prune_best(self, trainer: PPOTrainer) -> None:
        current = self._best(trainer.best[1]) if trainer.best else None
        for path in self.directory.glob("best_*.pt"):
            if path != current:
                path.unlink()
