"""metrics.jsonl and samples.jsonl, always; TensorBoard, wandb and trackio by name."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.metrics import check_keys, is_known

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from rlhf.ppo.rollout import Rollout

logger = logging.getLogger(__name__)

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise before anything runs when a tracker's package is missing.

    Raises:
        UserError: naming the tracker and how to get it.
    """
    from importlib.util import find_spec

    for name in names:
        if find_spec(TRACKER_PACKAGES[name]) is None:
            raise UserError(
                f"logging.report_to: {name} is not installed: pip install {name}, or override logging.report_to=[]"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise UserError("logging.report_to: wandb has no API key: run `wandb login`, or set WANDB_MODE=offline")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object and flush it. NaN and infinity become null: JSON has neither."""
    clean = {key: _finite(value) for key, value in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewind_rows(path: Path, key: str, last: int) -> None:
    """Drop rows after step `last`: a resumed run writes them again. A half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    # A line that was cut in the middle of a character is no JSON either; U+2028 within a string ends no line.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row.get(key, 0) <= last:
            kept.append(line)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    tmp.replace(path)


class MetricsWriter:
    """Logs of a PPO run. Only rank 0 writes.

    Args:
        directory: where metrics.jsonl and samples.jsonl go.
        accelerator: with its trackers initialised.
        samples: number of fixed and of random samples each time.
        shown: metric keys of the progress line.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, total_steps: int, samples: int) -> None:
        from tqdm.auto import tqdm

        self.directory, self.accelerator, self.samples = directory, accelerator, samples
        self.bar = tqdm(total=total_steps, desc="ppo", unit="step", disable=not accelerator.is_main_process)

    def write(self, row: dict[str, float]) -> None:
        """One row of metrics.jsonl, and the same to the trackers."""
        check_keys(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "ppo_step"}, step=int(row["ppo_step"]))
        if not self.accelerator.is_main_process:
            return
        append_row(self.directory / "metrics.jsonl", row)
        self.bar.set_postfix_str(
            f"score {row['objective/scores']:+.2f} kl {row['objective/kl']:.1f} "
            f"length {row['rollout/response_length']:.0f} eos {row['rollout/eos_rate']:.0%}",
            refresh=False,
        )
        self.bar.update(int(row["ppo_step"]) - self.bar.n)

    def write_samples(
        self, step: int, rollout: Rollout | None, fixed: Rollout | None, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """Rows of samples.jsonl: the fixed prompts of this step's evaluation, and some of its rollout's."""
        if not self.accelerator.is_main_process:
            return
        for source, kind in ((fixed, "fixed"), (rollout, "random")):
            if source is not None:
                for row in range(min(self.samples, len(source.prompts))):
                    sample = sample_row(source, row, decode)
                    append_row(self.directory / "samples.jsonl", {"step": step, "kind": kind} | sample)

    def rewind(self, step: int) -> None:
        """Forget what was logged after ppo_step `step`."""
        if self.accelerator.is_main_process:
            rewind_rows(self.directory / "metrics.jsonl", "ppo_step", step)
            rewind_rows(self.directory / "samples.jsonl", "step", step)
        self.bar.update(max(step, 0) - self.bar.n)

    def close(self) -> None:
        """Flush the trackers and the progress bar."""
        self.bar.close()
        for tracker in self.accelerator.trackers:  # end_training() would take the process group down, too
            tracker.finish()


def sample_row(rollout: Rollout, row: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """One response as samples.jsonl holds it; ids unpadded, KL in nats per response; lists are per token."""
    keep = rollout.response_mask[row]
    token_kl = (rollout.logprobs[row] - rollout.ref_logprobs[row])[keep]
    ids = rollout.response_ids[row][keep].tolist()
    return {
        "prompt": rollout.prompts[row],
        "prompt_ids": rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist(),
        "response": rollout.responses[row],
        "response_ids": ids,
        "score": round(float(rollout.scores[row]), 4),
        "kl": round(float(token_kl.sum()), 4),
        "length": int(keep.sum()),
        "has_eos": bool(rollout.finished[row]),
        "tokens": token_texts(decode, ids),
        "token_kl": _rounded(token_kl),
        "token_value": _rounded(rollout.values[row][keep]),
        "token_reward": _rounded(rollout.rewards[row][keep]),
    }


def _rounded(x: Tensor) -> list[float]:
    return [round(value, 4) for value in x.tolist()]


def token_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, they are the text.

    A character of several tokens belongs to the last of them, and the others are empty, as special tokens are. Each
    token is decoded after the one before it: tokenizers drop a space at the beginning.
    """
    texts: list[str] = []
    first = done = 0
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[first:done]), decode(ids[first:end])
        whole = len(after) > len(before) and (end == len(ids) or not after.endswith("\ufffd"))
        texts.append(after[len(before) :] if whole else "")
        if whole:
            first, done = done, end
    return texts


def trainer_callback(directory: Path) -> Any:
    """A transformers TrainerCallback that writes metrics.jsonl (imported late: only the trained stages need it)."""
    from transformers import TrainerCallback

    unknown: set[str] = set()  # a library's new key must not end a training; it is left out, and said so once

    class JsonlCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and logs:
                row = {"step": state.global_step} | {name_of(key): value for key, value in logs.items()}
                new = {key for key in row if not is_known(key)} - unknown
                if new:
                    unknown.update(new)
                    logger.warning("metrics.jsonl: left out %s: not in rlhf/metrics.py", ", ".join(sorted(new)))
                append_row(directory / "metrics.jsonl", {key: row[key] for key in row if key not in unknown})

    return JsonlCallback()


def name_of(key: str) -> str:
    """Metric key of a key that transformers' Trainer logs: clock-dependent ones go under `perf/`."""
    clock = ("runtime", "samples_per_second", "steps_per_second", "total_flos")
    return f"perf/{key}" if key.endswith(clock) else key
