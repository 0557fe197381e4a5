"""Training state of PPO on disk: whole or not there.

A checkpoint holds, per rank, one file that `torch.load(weights_only=True)` reads: trained weights and Adam's moments as
that rank holds them (where they are not sharded, in rank 0's file alone) and the global random generators. Counters and
controllers are JSON. It is written beside its place, sealed (`rlhf/checkpoints.py`) and renamed. The best policy so far
is a folder of its own, named by its step, and so are those that `ppo.keep_policies_every` keeps.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.artifacts import write_json
from rlhf.checkpoints import (
    check_environment,
    damage,
    environment,
    newest_whole,
    random_state,
    replace_dir,
    restore_random_state,
    seal,
)
from rlhf.models import of_critic

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

logger = logging.getLogger(__name__)

STATE, WEIGHTS, POLICY = "trainer.json", "weights.pt", "policy_"


def trainable_state(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole trained tensors by name (with LoRA: adapters and heads only), on rank 0. This gathers sharded weights."""
    names = {name for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
    state = accelerator.get_state_dict(model)
    return {name: tensor.detach().cpu() for name, tensor in state.items() if name in names}


class Checkpointer:
    """Saves and loads below `directory`.

    Args:
        directory: `checkpoints/` of the stage.
        accelerator: of the trainer.
        keep: number of checkpoints that stay.
        continued: filled with the changes of the environment that a resumed run went through.
    """

    def __init__(
        self, directory: Path, accelerator: Accelerator, keep: int = 2, continued: list[str] | None = None
    ) -> None:
        self.directory, self.accelerator, self.keep = directory, accelerator, keep
        self.continued = [] if continued is None else continued

    def save(self, trainer: PPOTrainer) -> None:
        """Write a checkpoint of this ppo_step and drop old ones. Every rank calls this."""
        final = self.directory / f"step_{trainer.ppo_step:06d}"
        tmp = self._new(final)
        state = {"random": random_state()}
        if self.accelerator.is_main_process or _sharded(trainer):
            state |= {"weights": _weights(trainer), "optimizer": _moments(trainer)}
        torch.save(state, tmp / _rank_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(tmp / STATE, trainer.state_dict())
            seal(tmp, environment(sharded=_sharded(trainer)), self.continued)
            replace_dir(tmp, final)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(old)
            self._prune_best(trainer)
        self.accelerator.wait_for_everyone()

    def steps(self) -> list[Path]:
        """Checkpoints, oldest first."""
        found = self.directory.glob("step_*") if self.directory.is_dir() else []
        return sorted(path for path in found if path.suffix != ".tmp")

    def load(self, trainer: PPOTrainer) -> dict[str, Any] | None:
        """Restore weights, optimizer and generators of the newest whole checkpoint; returns the trainer's own state.

        Raises:
            UserError: it was written by another number of processes, and its weights are sharded.
        """
        path = newest_whole(self.steps(), self._damage)
        if path is None:
            return None
        logger.info("loading checkpoint %s", path)
        sharded = _sharded(trainer)
        now = environment(sharded=sharded)
        self.continued[:] = check_environment(path, now, ("sharded", "processes") if sharded else ("sharded",))
        own = path / _rank_file(self.accelerator.process_index)
        state = torch.load(own if sharded else path / _rank_file(0), map_location="cpu", weights_only=True, mmap=True)
        _restore(trainer, state["weights"], state["optimizer"])
        if own.is_file():  # not for a rank that there was none of
            restore_random_state(torch.load(own, map_location="cpu", weights_only=True, mmap=True)["random"])
        return json.loads((path / STATE).read_text(encoding="utf-8"))

    def save_best(self, trainer: PPOTrainer) -> None:
        """Write the trained weights of this step; those that a checkpoint names are kept beside them."""
        self._save_weights(self._best(trainer.ppo_step), trainable_state(trainer.model, self.accelerator))
        if self.accelerator.is_main_process:
            self._prune_best(trainer)
        self.accelerator.wait_for_everyone()

    def save_policy(self, trainer: PPOTrainer) -> None:
        """Write the trained weights of this step's policy, without the critic's; they stay until it is published."""
        state = trainable_state(trainer.model, self.accelerator)
        own = {name: value for name, value in state.items() if name.startswith("policy.") and ".critic." not in name}
        self._save_weights(self.directory / f"{POLICY}{trainer.ppo_step:06d}", own)

    def policies(self) -> dict[int, dict[str, Tensor]]:
        """Trained tensors of the policies that were kept, by step; read where they are used."""
        paths = sorted(path for path in self.directory.glob(f"{POLICY}*") if path.suffix != ".tmp")
        return {
            int(path.name.removeprefix(POLICY)): torch.load(
                path / WEIGHTS, map_location="cpu", weights_only=True, mmap=True
            )
            for path in paths
        }

    def best_state(self, trainer: PPOTrainer) -> dict[str, Tensor]:
        """Trained tensors of the step to publish, on rank 0: the best one, or the last where none is tracked."""
        if trainer.best is None:
            return trainable_state(trainer.model, self.accelerator)
        return torch.load(self._best(trainer.best[1]) / WEIGHTS, map_location="cpu", weights_only=True)

    def _save_weights(self, final: Path, state: dict[str, Tensor]) -> None:
        """Every rank calls this; rank 0 writes what it holds."""
        tmp = self._new(final)
        if self.accelerator.is_main_process:
            torch.save(state, tmp / WEIGHTS)
            seal(tmp, environment())
            replace_dir(tmp, final)
        self.accelerator.wait_for_everyone()

    def _new(self, final: Path) -> Path:
        """An empty folder beside `final`, on every rank."""
        tmp = final.with_name(final.name + ".tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        return tmp

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or with the best weights that it names."""
        wrong = damage(checkpoint)
        if wrong is not None:
            return wrong
        best = self._best_of(checkpoint)
        wrong = damage(best) if best else None
        return f"its best step, {best}: {wrong}" if wrong else None

    def _best(self, step: int) -> Path:
        return self.directory / f"best_{step:06d}"

    def _best_of(self, checkpoint: Path) -> Path | None:
        best = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best"]
        return self._best(best[1]) if best else None

    def _prune_best(self, trainer: PPOTrainer) -> None:
        needed = [self._best_of(path) for path in self.steps()]
        needed += [self._best(trainer.best[1])] if trainer.best else []
        for path in self.directory.glob("best_*"):
            if path not in needed:
                shutil.rmtree(path)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _sharded(trainer: PPOTrainer) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in trainer.parameters)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _names(trainer: PPOTrainer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    names = [name for name, parameter in named if parameter.requires_grad]
    return names if len(trainer.optimizer.param_groups) == 1 else sorted(names, key=of_critic)


def _weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: _local(p.detach()) for name, p in zip(_names(trainer), trainer.parameters, strict=True)}


def _moments(trainer: PPOTrainer) -> dict[str, dict[str, Tensor]]:
    """Adam's state by parameter; a parameter that was never updated has none."""
    state = trainer.optimizer.state
    return {
        name: {key: _local(value) for key, value in state[parameter].items()}
        for name, parameter in zip(_names(trainer), trainer.parameters, strict=True)
        if parameter in state
    }


@torch.no_grad()
def _restore(trainer: PPOTrainer, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> None:
    """Copy weights in place and hand Adam its state."""
    names, state = _names(trainer), {}
    for index, (name, parameter) in enumerate(zip(names, trainer.parameters, strict=True)):
        _local(parameter).copy_(weights[name])
        if name in moments:
            state[index] = {key: _like(parameter, value) for key, value in moments[name].items()}
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A moment, sharded as its parameter is. The step count has no dimension and stays as it is."""
    if local.ndim == 0 or not isinstance(parameter, DTensor):
        return local.clone()  # not a window into the file
    moment = torch.zeros_like(parameter)
    _local(moment).copy_(local)
    return moment
