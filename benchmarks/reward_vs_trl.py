"""Speed of reward-model training: TRL's RewardTrainer as it comes, and ours; same weights, pairs and steps, in turn.

    python -m benchmarks.reward_vs_trl 135m --device cuda
    python -m benchmarks.reward_vs_trl 135m --device cuda --model /path/of/base --data my_pairs
    python -m benchmarks.reward_vs_trl shrunk --pairs 256

Both train from the same weights with the same number of pairs a step (`--batch`; TRL's default is 8) and the
same learning rate, and are measured on the same held-out pairs. Each round has another seed. Without `--model` weights
are random and pairs are made here: tokens of one kind are more frequent in the chosen response, lengths vary a lot.
Tokens are real ones; padding counts as none. Runs in this project's environment: TRL still has this trainer.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import RewardConfig, RewardTrainer

from benchmarks.ppo_vs_trl import WORKLOADS
from benchmarks.start import provenance, random_model, tokenizer_of
from pipelines.cli import keep_freed_memory
from rlhf.data import Renderer, load_data_recipe, load_rows
from rlhf.models import load_tokenizer, new_reward_model, trunk_of
from rlhf.ppo.perf import matmul_peak
from rlhf.recipe import Recipe
from rlhf.reward import train as reward
from rlhf.sampling import score_sequences
from rlhf.stage import StageContext
from rlhf.trainers import trainer_args
from rlhf.yamlio import validate


def synthetic_pairs(count: int, vocab: int, longest: int, seed: int) -> Dataset:
    """Pairs of token ids: a prompt, and two responses of their own lengths, ended by EOS (2).

    A token of the upper half of the vocabulary is good. 55 to 65 % of the chosen response's are, and 35 to 45 % of the
    rejected one's; lengths say nothing. One pair in ten is labelled the wrong way round.
    """
    draw = random.Random(seed)

    def length(most: int) -> int:
        return min(most, 8 + int(draw.lognormvariate(0, 0.8) * most / 5))

    def response(share: float) -> list[int]:
        size = length(longest * 2 // 3)
        good, bad = (4 + vocab // 2, vocab - 1), (4, 3 + vocab // 2)
        return [draw.randint(*(good if draw.random() < share else bad)) for _ in range(size)] + [2]

    rows = []
    for _ in range(count):
        prompt = [draw.randrange(4, vocab) for _ in range(length(longest // 4))]
        pair = [prompt + response(draw.uniform(0.55, 0.65)), prompt + response(draw.uniform(0.35, 0.45))]
        if draw.random() < 0.1:
            pair.reverse()
        rows.append({"chosen_ids": pair[0], "rejected_ids": pair[1]})
    return Dataset.from_list(rows)


def recipe_pairs(name: str, split: str, count: int, tokenizer: Any, longest: int, chat: bool) -> Dataset:
    """Pairs of a data recipe, rendered as the reward stage does it."""
    rows = load_rows(load_data_recipe(name), split, "preference", limit=count)
    return reward.rendered_pairs(rows, Renderer(tokenizer, chat), longest, split)[0]


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up steps to the end of the training, and of the first step."""

    def __init__(self, device: str, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.begun = self.first = self.started = self.ended = 0.0

    def now(self) -> float:
        """After the device has finished what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Counts the compilation, too."""
        self.begun = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step is done."""
        if state.global_step == 1:
            self.first = self.now() - self.begun
        if state.global_step == self.warmup:
            self.started = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The last one is done."""
        self.ended = self.now()


class Counted:
    """A collator that notes the real and the padded tokens of each batch."""

    def __init__(self, collate: Callable[[list], dict[str, Any]], pad_id: int) -> None:
        self.collate, self.pad_id, self.real, self.padded = collate, pad_id, [], []

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as it is."""
        batch = self.collate(pairs)
        self.real.append(int((batch["input_ids"] != self.pad_id).sum()))
        self.padded.append(batch["input_ids"].numel())
        return batch


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of both; everything else is TRL's default, or ours."""
    return {
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.epochs,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, train: Dataset, root: Path, seed: int) -> Any:
    """TRL's, as it comes: gradient checkpointing, bf16 on a GPU, float32 weights."""
    config = RewardConfig(
        output_dir=str(root),
        report_to=[],
        seed=seed,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        max_length=None,
        **common(args),
    )
    return RewardTrainer(model, args=config, train_dataset=train, processing_class=tokenizer)


def our_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, train: Dataset, root: Path, seed: int) -> Any:
    """The reward stage's."""
    section = {"data": "none", "compile": args.compile, "cuda_graphs": args.graphs}
    data = {"name": "bench", "model": {"base": "none"}, "sft": {"data": "none"}, "reward": section}
    data |= {"hardware": {"device": args.device}, "logging": {"report_to": []}}
    ctx = StageContext(reward.STAGE, validate(Recipe, data, "benchmark"), root, "bench")
    options = {"train_sampling_strategy": "group_by_length"} | common(args)
    config = trainer_args(RewardConfig, options, ctx, max_length=None)
    config.seed = config.data_seed = seed
    return reward.reward_trainer(ctx, model, config, tokenizer, train, train)


SIDES = {"trl": trl_trainer, "ours": our_trainer}


def run(side: str, args: argparse.Namespace, start: Any, tokenizer: Any, pairs: dict[str, Dataset], seed: int) -> dict:
    """Train from `start` and measure it."""
    model = copy.deepcopy(start).to(args.device)
    clock = Clock(args.device, args.warmup)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SIDES[side](args, model, tokenizer, pairs["train"], Path(directory), seed)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        trainer.add_callback(clock)
        counted = trainer.data_collator = Counted(trainer.data_collator, tokenizer.pad_token_id)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train_plain(trainer)
    seconds = clock.ended - clock.started
    tokens = sum(counted.real[args.warmup : trainer.state.global_step])
    return {
        "side": side,
        "seed": seed,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "first_step": clock.first,
        "padding": 1 - sum(counted.real) / sum(counted.padded),
        "operations_per_second": operations(model, pairs["train"]) * tokens / sum(counted.real) / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if args.device == "cuda" else None,
        "accuracy": accuracy(model, pairs["test"], tokenizer.pad_token_id),
        "steps": trainer.state.global_step,
    }


def train_plain(trainer: Any) -> None:
    """`Trainer.train`, which for ours expects that the stage has prepared a resume."""
    if isinstance(trainer, reward.ExactRewardTrainer):
        trainer.earlier, trainer.began = {}, time.time()
    trainer.train()


def operations(model: PreTrainedModel, pairs: Dataset) -> float:
    """6 per weight and real token, attention beside it; recomputation (gradient checkpointing) is no useful work."""
    trunk = trunk_of(model)
    embeddings = {id(m.weight) for m in trunk.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(p.numel() for p in trunk.parameters() if p.dim() == 2 and id(p) not in embeddings)
    config = model.config.get_text_config()
    lengths = [len(ids) for side in ("chosen_ids", "rejected_ids") for ids in pairs[side]]
    attention = 4 * config.num_hidden_layers * config.hidden_size / 2
    return 3 * sum(2 * weights * length + attention * length**2 for length in lengths)


def accuracy(model: PreTrainedModel, pairs: Dataset, pad_id: int) -> float:
    """Share of held-out pairs with chosen above rejected."""
    model = model.float().eval()
    with torch.compiler.set_stance("force_eager"):
        scores = [score_sequences(model, pairs[side], pad_id) for side in ("chosen_ids", "rejected_ids")]
    return sum(chosen > rejected for chosen, rejected in zip(*scores, strict=True)) / len(pairs)


def table(rows: list[dict[str, Any]], peak: float) -> str:
    """Markdown: medians over the rounds."""
    lines = [
        "| side | tokens/s | MFU | padding | held-out accuracy (each round) | first step, s | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    speed = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        mine = [row for row in rows if row["side"] == side]
        mid = {k: median(row[k] for row in mine) for k in ("tokens_per_second", "operations_per_second", "padding")}
        speed[side] = mid["tokens_per_second"]
        accuracies = ", ".join(f"{row['accuracy']:.3f}" for row in mine)
        memory = f"{max(row['peak_gib'] for row in mine):.1f}" if mine[0]["peak_gib"] else ""
        lines.append(
            f"| {side} | {speed[side]:,.0f} | {mid['operations_per_second'] / peak:.1%} | {mid['padding']:.0%} | "
            f"{accuracies} | {max(row['first_step'] for row in mine):.1f} | {memory} |"
        )
    if len(speed) == 2:
        lines += ["", f"Ours trains {speed['ours'] / speed['trl']:.2f} times as many tokens a second as TRL's default."]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS, help="shape of the model with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder of a base model, instead of random weights")
    parser.add_argument("--data", help="data recipe of preference pairs, with --model")
    parser.add_argument("--chat", action="store_true", help="render with the model's chat template")
    parser.add_argument("--pairs", type=int, default=2400, help="that are trained on")
    parser.add_argument("--test-pairs", type=int, default=400)
    parser.add_argument("--longest", type=int, default=768, help="tokens of prompt and response")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step, both sides")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--compile", choices=("on", "off"), help="of ours; default: on a GPU")
    parser.add_argument("--graphs", choices=("on", "off"), help="CUDA graphs of ours; default: on a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=10, help="steps at the start that do not count")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", help="JSON file for the rows")
    args = parser.parse_args()
    args.compile = args.compile or ("on" if args.device == "cuda" else "off")
    args.graphs = args.graphs or ("on" if args.device == "cuda" else "off")
    return args


def prepare(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """Weights on the CPU, tokenizer, and train and test pairs."""
    if args.model:
        tokenizer = load_tokenizer(args.model)
        make = {"train": args.pairs, "test": args.test_pairs}
        pairs = {
            split: recipe_pairs(args.data, split, count, tokenizer, args.longest, args.chat)
            for split, count in make.items()
        }
        return new_reward_model(args.model, 0), tokenizer, pairs
    shape = WORKLOADS[args.workload].shape
    pairs = {
        "train": synthetic_pairs(args.pairs, shape.vocab, args.longest, 0),
        "test": synthetic_pairs(args.test_pairs, shape.vocab, args.longest, 1),
    }
    return random_model(shape, "score", 0, torch.float32, args.device), tokenizer_of(shape), pairs


def main() -> None:
    """Measure, print, write."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    keep_freed_memory()
    args = parse()
    start, tokenizer, pairs = prepare(args)
    rows = []
    for seed in range(args.rounds):
        for side in args.sides:
            rows.append(run(side, args, start, tokenizer, pairs, seed))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    peak = matmul_peak(torch.device(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32)
    print(table(rows, peak))
    if args.out:
        about = vars(args) | provenance() | {"peak": peak}
        Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
