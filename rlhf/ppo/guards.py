"""Updates with NaN or infinity: not applied, kept for inspection, and after a set number of them the end of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rlhf.artifacts import write_json
from rlhf.ppo.rollout import Rollout

logger = logging.getLogger(__name__)

BAD_BATCHES = "bad_batches"
# Of an update's statistics, what it must not be applied with. `val/ratio` may overflow where the objective is clipped.
DECISIVE = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/grad_norm")


def not_finite(values: Mapping[str, float | Tensor]) -> dict[str, int]:
    """How many entries of each number or tensor are NaN or infinite; names with none are left out."""
    counts = {name: int((~torch.isfinite(torch.as_tensor(value))).sum()) for name, value in values.items()}
    return {name: count for name, count in counts.items() if count}


def bad_rollout(rollout: Rollout) -> dict[str, int]:
    """What of a filled-in rollout cannot be trained on. Every rank holds the whole rollout and so finds the same."""
    parts = {name: getattr(rollout, name) for name in ("scores", "logprobs", "ref_logprobs", "values")}
    return not_finite(parts)


def bad_update(statistics: Mapping[str, float]) -> dict[str, int]:
    """What of an update's statistics forbids it. They are sums over all ranks, so every rank finds the same."""
    return not_finite({name: statistics[name] for name in DECISIVE})


class BadUpdates:
    """Counts the updates that were not applied, and keeps the batch of each.

    Args:
        directory: the stage's folder; batches go to `bad_batches/` in it.
        limit: how many may be skipped; one more ends the run (`ppo.max_bad_updates`).
        accelerator: rank 0 writes.
    """

    def __init__(self, directory: Path, limit: int, accelerator: Accelerator) -> None:
        self.directory, self.limit, self.accelerator = directory / BAD_BATCHES, limit, accelerator
        self.count = 0
        self.last_step = 0  # ppo_step of the latest one

    @property
    def too_many(self) -> bool:
        """Whether the run has to stop."""
        return self.count > self.limit

    def record(
        self, ppo_step: int, found: dict[str, int], rollout: Rollout, rows: Sequence[int], extra: dict[str, Tensor]
    ) -> None:
        """Take note of an update that was not applied.

        Args:
            ppo_step: from 1.
            found: what was not finite, with the number of entries.
            rollout: the whole one; of it, `rows` are written.
            rows: the mini-batch.
            extra: more tensors [B,R] of the rollout, by name.
        """
        self.count += 1
        self.last_step = ppo_step
        names = ", ".join(found)
        path = self.directory / f"step_{ppo_step:06d}_{self.count:02d}.safetensors"
        if self.accelerator.is_main_process:
            write_batch(path, {"ppo_step": ppo_step, "not_finite": found}, rollout, rows, extra)
        logger.warning(
            "ppo_step %d: an update was not applied, NaN or infinity in %s (%d so far, more than %d end the run); the "
            "batch is in %s",
            *(ppo_step, names, self.count, self.limit, path),
        )

    def advice(self) -> str:
        """Why the run stops and what to do, in one line."""
        return (
            f"ppo_step {self.last_step}: {self.count} updates had NaN or infinity, ppo.max_bad_updates is "
            f"{self.limit}: none was applied and the checkpoint before them stays; look at {self.directory}, lower "
            "ppo.learning_rate, or set ppo.score_clip where scores are very large"
        )


def write_batch(
    path: Path, facts: dict[str, Any], rollout: Rollout, rows: Sequence[int], extra: dict[str, Tensor]
) -> None:
    """Rows of a rollout as safetensors (no pickle), and beside it a JSON file for people.

    Args:
        path: ends in .safetensors; the JSON file has the same stem.
        facts: go into the JSON file, with prompts, responses and for each tensor the rows that are not finite.
        rollout, rows: what is written.
        extra: more tensors [B,R].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = torch.tensor(list(rows))
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor) and len(value)}
    tensors |= {f"scores/{name}": value for name, value in rollout.raw_scores.items()} | extra
    chosen = {name: value.detach().cpu()[index].contiguous() for name, value in tensors.items()}
    save_file(chosen, path)
    bad = {name: ~torch.isfinite(value) for name, value in chosen.items()}
    where = {name: torch.nonzero(value.reshape(len(rows), -1).any(1)).flatten().tolist() for name, value in bad.items()}
    texts = [{"prompt": rollout.prompts[row], "response": rollout.responses[row]} for row in rows]
    facts = facts | {"rows_not_finite": {name: found for name, found in where.items() if found}, "texts": texts}
    write_json(path.with_suffix(".json"), facts)
