"""TRL 1.12's PPOTrainer, driven as the benchmarks need it. Runs in TRL's environment and imports nothing of rlhf.

    python benchmarks/trl_side.py time SPEC.json      one update per line "step" on stdin, one JSON line each on stdout
    python benchmarks/trl_side.py learn SPEC.json     a whole run; the policy is saved every few updates
    python benchmarks/trl_side.py record SPEC.json    one update; every tensor of it is saved

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as trl_ppo
from accelerate.state import GradientState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl.experimental.ppo import PPOConfig, PPOTrainer

MARK = "@@ "  # in front of our lines on stdout, where libraries print as well


def say(row: dict[str, Any]) -> None:
    """One JSON line for the process that started this one."""
    print(MARK + json.dumps(row), flush=True)


def load(spec: dict[str, Any], kind: str, name: str, frozen: bool = False) -> Any:
    """A model of SPEC in the dtype that it is trained or, `frozen`, read in."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    extra = {} if kind == "causal" else {"num_labels": 1}
    dtype = "bfloat16" if frozen and spec.get("autocast") else spec["dtype"]
    return auto.from_pretrained(spec[name], dtype=getattr(torch, dtype), **extra)


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
        whiten_rewards=ppo["whiten_rewards"],
        kl_estimator=ppo["kl_estimator"],
        missing_eos_penalty=ppo["missing_eos_penalty"],
        stop_token="eos" if spec["stop_at_eos"] else None,
        lr_scheduler_type="linear",
        seed=spec["seed"],
        use_cpu=spec["device"] == "cpu",
        bf16=spec.get("autocast", False),  # without, the weights' own dtype is the one that is computed in
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def build_trainer(spec: dict[str, Any], callback: TrainerCallback, output_dir: str) -> PPOTrainer:
    """TRL's trainer on SPEC's models and prompts.

    Keys of `spec`: policy, reference, reward (model folders), score_mean, score_std, prompts (lists of token ids),
    ppo (our hyperparameters), trl_micro_batch (episodes of one forward and backward), stop_at_eos, dtype (of all
    weights), autocast (bf16 over these, frozen models in bf16), device, seed, all_steps (below), peft (LoRA of the
    policy), value_mean (what the critic subtracts from the reward model's raw scores; default: nothing).

    TRL 1.12 does not count its optimizer steps as its settings say. With several mini-batches it takes one step per PPO
    epoch all the same, because `accelerator.accumulate` counts the micro-batches of the whole rollout; and on the last
    batch of each pass over the prompts it takes one per micro-batch, because Accelerate takes that for the end. With
    `all_steps` (the default) it gets the steps that were asked for.
    """
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in spec["prompts"][: spec.get("prompts_used")]]
    lora = LoraConfig(task_type="CAUSAL_LM", **adapter) if (adapter := _adapter(spec)) else None
    critic = normalise(load(spec, "score", "reward"), spec.get("value_mean", 0.0), spec["score_std"])
    if not spec.get("value_mean"):
        critic.score.bias = None
    trainer = PPOTrainer(
        args=config_of(spec, output_dir),
        processing_class=tokenizer,
        model=load(spec, "causal", "policy"),
        ref_model=None if lora else load(spec, "causal", "reference", frozen=True),
        reward_model=normalise(load(spec, "score", "reward", frozen=True), spec["score_mean"], spec["score_std"]),
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: spec["ppo"]["rollout_batch_size"]]),  # it wants one; it is not used
        callbacks=[callback],
        peft_config=lora,
    )
    trainer.remove_callback(trl_ppo.PrinterCallback)
    if spec.get("all_steps", True):
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        trainer.accelerator.gradient_accumulation_steps = spec["ppo"]["mini_batch_size"] // spec["trl_micro_batch"]
    return trainer


def _adapter(spec: dict[str, Any]) -> dict[str, Any]:
    """LoRA of the policy, where SPEC has `peft`; TRL trains the value model in full."""
    keys = ("r", "lora_alpha", "target_modules")
    return {key: spec["peft"][key] for key in keys} if spec.get("peft") else {}


def dtypes_of(trainer: PPOTrainer) -> dict[str, str]:
    """dtypes of trained weights, Adam's state, and the frozen models."""
    state = [value.dtype for entry in trainer.optimizer.state.values() for value in entry.values() if value.numel() > 1]
    names = {
        "weights": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
        "adam": set(state),
        "frozen": {p.dtype for p in trainer.reward_model.parameters()},
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
        say({"ready": True, "packages": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}})
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


class SavePolicy(TrainerCallback):
    """Writes `OUT/step_<n>/` every few updates and after the last; seconds and TRL's own metrics go to OUT."""

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every, self.trainer, self.started = out, every, None, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Models are loaded: the clock starts."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One update is done."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.trainer.accelerator.unwrap_model(self.trainer.model).policy.save_pretrained(
                self.out / f"step_{state.global_step:04d}"
            )
        row = {"ppo_step": state.global_step, "seconds": time.perf_counter() - self.started, **self.metrics}
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def watch(self, trainer: PPOTrainer) -> None:
        """Keep what the trainer would have logged."""
        self.trainer, self.metrics = trainer, {}
        trainer.log = lambda metrics, *args, **kwargs: self.metrics.update(metrics)


def learn(spec: dict[str, Any]) -> None:
    """A whole run, for benchmarks/trl_learning.py."""
    callback = SavePolicy(Path(spec["out"]), spec["every"])
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(spec, callback, output_dir)
        callback.watch(trainer)
        trainer.train()


LOCALS = """
query_responses logprobs ref_logprobs kl scores values rewards advantages returns padding_mask padding_mask_p1
pg_loss_stats vf_loss_stats pg_clipfrac_stats vf_clipfrac_stats approxkl_stats
"""


class Tap(TrainerCallback):
    """Keeps what TRL computes in one update, as float32 tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.new_logprobs: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []  # of the batch, in each micro-batch
        self.steps = 0
        self.originals = trl_ppo.selective_log_softmax, trl_ppo.forward

    def watch(self, trainer: PPOTrainer) -> None:
        """Look over the trainer's shoulder."""
        self.trainer = trainer
        softmax, forward = self.originals
        adam = trainer.optimizer.optimizer
        step = adam.step

        def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            result = softmax(logits, index)
            self.new_logprobs.append(result.detach().clone())
            return result

        def forward_(model: Any, query_responses: torch.Tensor, pad_token_id: int) -> Any:
            result = forward(model, query_responses, pad_token_id)
            if type(result) is tuple:  # policy and critic; the reference's is a ModelOutput
                self.new_values.append(result[1].detach().clone().squeeze(-1))
                self.rows.append(torch.as_tensor(sys._getframe(1).f_locals["micro_batch_inds"]))
            return result

        def step_(*args: Any, **kwargs: Any) -> Any:
            if self.steps == 0:
                self.tensors |= {f"gradient.{name}": p.grad.clone() for name, p in self._parameters()}
            self.steps += 1
            return step(*args, **kwargs)

        trl_ppo.selective_log_softmax, trl_ppo.forward, adam.step = selective_log_softmax, forward_, step_

    def _parameters(self) -> list[tuple[str, Any]]:
        return list(self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The update's variables are still there, in the frame of `train`."""
        frame = sys._getframe()
        while frame.f_code.co_name != "train":
            frame = frame.f_back
        found = {name: torch.as_tensor(frame.f_locals[name]).clone() for name in LOCALS.split()}
        start = frame.f_locals["context_length"]
        found["context_length"] = torch.tensor(start)
        found["optimizer_steps"] = torch.tensor(self.steps)
        found["rows"] = torch.stack(self.rows)
        found["new_logprobs"] = torch.stack(self.new_logprobs[2:])  # the first two are of the rollout
        found["new_values"] = torch.stack(self.new_values)[:, :, start - 1 : -1]
        found |= {f"after.{name}": p.detach().clone() for name, p in self._parameters()}
        self.tensors |= found


def record(spec: dict[str, Any]) -> None:
    """One update for each of `runs` (name -> changes of SPEC), for benchmarks/trl_parity.py; tensors go to OUT."""
    tensors = {}
    for name, changes in spec["runs"].items():
        GradientState._reset_state()  # it is shared by all trainers of a process
        tap, run = Tap(), spec | changes | {"ppo": spec["ppo"] | changes.get("ppo", {})}
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = build_trainer(run, tap, output_dir)
            tap.watch(trainer)
            trainer.train()
        trl_ppo.selective_log_softmax, trl_ppo.forward = tap.originals
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in tap.tensors.items()}
    save_file(tensors, spec["out"])


def main() -> None:
    """Command line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    command, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    {"time": time_updates, "learn": learn, "record": record}[command](spec)


if __name__ == "__main__":
    main()
