"""TRL 1.12's PPOTrainer, driven as the benchmarks need it. Runs in TRL's environment and imports nothing of rlhf.

    python benchmarks/trl_side.py time SPEC.json      one update per line "step" on stdin, one JSON line each on stdout

SPEC.json names model folders, prompts as token ids, and hyperparameters by our names; see `build_trainer`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as trl_ppo
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl.experimental.ppo import PPOConfig, PPOTrainer

MARK = "@@ "  # in front of our lines on stdout, where libraries print as well


def say(row: dict[str, Any]) -> None:
    """One JSON line for the process that started this one."""
    print(MARK + json.dumps(row), flush=True)


def load(spec: dict[str, Any], kind: str, name: str) -> Any:
    """A model of SPEC in the dtype that it is trained or read in."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    extra = {} if kind == "causal" else {"num_labels": 1}
    return auto.from_pretrained(spec[name], dtype=getattr(torch, spec["dtype"]), **extra)


def normalise(model: Any, mean: float, std: float) -> Any:
    """A score head that gives (score - mean) / std: TRL knows no such statistics, so the model itself applies them."""
    head = torch.nn.Linear(model.score.in_features, 1, bias=True, dtype=model.score.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score = head
    return model


def config_of(spec: dict[str, Any], output_dir: str) -> PPOConfig:
    """TRL's configuration from our hyperparameters."""
    ppo, micro = spec["ppo"], spec["trl_micro_batch"]
    return PPOConfig(
        output_dir=output_dir,
        total_episodes=ppo["total_episodes"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=ppo["rollout_batch_size"] // micro,
        num_mini_batches=ppo["rollout_batch_size"] // ppo["mini_batch_size"],
        num_ppo_epochs=ppo["num_ppo_epochs"],
        local_rollout_forward_batch_size=spec.get("trl_forward_batch", 64),
        response_length=ppo["response_length"],
        temperature=ppo["temperature"],
        learning_rate=ppo["learning_rate"],
        adam_epsilon=ppo["adam_eps"],
        kl_coef=ppo["kl_coef"],
        gamma=ppo["gamma"],
        lam=ppo["lam"],
        cliprange=ppo["cliprange"],
        cliprange_value=ppo["cliprange_value"],
        vf_coef=ppo["vf_coef"],
        missing_eos_penalty=ppo["missing_eos_penalty"],
        stop_token="eos" if spec["stop_at_eos"] else None,
        lr_scheduler_type="linear",
        seed=spec["seed"],
        use_cpu=spec["device"] == "cpu",
        bf16=False,  # no autocast: the weights' own dtype is the one that is computed in
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def build_trainer(spec: dict[str, Any], callback: TrainerCallback, output_dir: str) -> PPOTrainer:
    """TRL's trainer on SPEC's models and prompts.

    Keys of `spec`: policy, reward (model folders), score_mean, score_std, prompts (lists of token ids), ppo (our
    hyperparameters), trl_micro_batch (episodes of one forward and backward), stop_at_eos, dtype (of all weights),
    device, seed.

    With several mini-batches TRL 1.12 still takes one optimizer step per PPO epoch: `accelerator.accumulate` counts
    the micro-batches of the whole rollout. Counting those of a mini-batch here gives it the steps that were asked for.
    """
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in spec["prompts"]]
    critic = normalise(load(spec, "score", "reward"), 0.0, spec["score_std"])
    critic.score.bias = None
    trainer = PPOTrainer(
        args=config_of(spec, output_dir),
        processing_class=tokenizer,
        model=load(spec, "causal", "policy"),
        ref_model=load(spec, "causal", "policy"),
        reward_model=normalise(load(spec, "score", "reward"), spec["score_mean"], spec["score_std"]),
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: spec["ppo"]["rollout_batch_size"]]),  # it wants one; it is not used
        callbacks=[callback],
    )
    trainer.remove_callback(trl_ppo.PrinterCallback)
    trainer.accelerator.gradient_accumulation_steps = spec["ppo"]["mini_batch_size"] // spec["trl_micro_batch"]
    return trainer


def dtypes_of(trainer: PPOTrainer) -> dict[str, str]:
    """dtypes of trained weights, Adam's state, and the frozen models."""
    state = [value.dtype for entry in trainer.optimizer.state.values() for value in entry.values() if value.numel() > 1]
    names = {
        "weights": {p.dtype for p in trainer.model.parameters()},
        "adam": set(state),
        "frozen": {p.dtype for model in (trainer.ref_model, trainer.reward_model) for p in model.parameters()},
    }
    return {
        name: "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds)) for name, kinds in names.items()
    }


class Clock(TrainerCallback):
    """Waits for "step" on stdin before each update and says what it took, by phase.

    The phases are seen from outside: sampling ends where `batch_generation` returns, scoring where the advantages are
    whitened, which is the last thing before the first training forward.
    """

    def __init__(self, device: str) -> None:
        self.device, self.started = device, 0.0
        self.generated = self.scored = 0.0
        self.trainer: PPOTrainer | None = None
        trl_ppo.batch_generation = self._then("generated", trl_ppo.batch_generation)
        trl_ppo.masked_whiten = self._then("scored", trl_ppo.masked_whiten)

    def now(self) -> float:
        """Seconds, after the device has finished what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _then(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            setattr(self, name, self.now())
            return result

        return timed

    def wait(self) -> None:
        """Until the other process says "step"; the end of its input ends this process."""
        if not sys.stdin.readline():
            os._exit(0)
        self.started = self.now()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Models are loaded: ready for the first update."""
        say({"ready": True})
        self.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One update is done."""
        end = self.now()
        say(
            {
                "seconds": end - self.started,
                "generate": self.generated - self.started,
                "score": self.scored - self.generated,
                "train": end - self.scored,
                "peak_gib": peak_gib(self.device),
                "dtypes": dtypes_of(self.trainer),
            }
        )
        self.wait()


def peak_gib(device: str) -> float:
    """Peak memory of this process in GiB: what torch allocated on the GPU, or resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_updates(spec: dict[str, Any]) -> None:
    """Updates on demand, for benchmarks/ppo_vs_trl.py."""
    clock = Clock(spec["device"])
    with tempfile.TemporaryDirectory() as output_dir:
        clock.trainer = build_trainer(spec, clock, output_dir)
        clock.trainer.train()


def main() -> None:
    """Command line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    command, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    {"time": time_updates}[command](spec)


if __name__ == "__main__":
    main()
