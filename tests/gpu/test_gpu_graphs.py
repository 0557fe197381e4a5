"""A run with CUDA graphs is the run without them."""

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf.graphs import Graphed, GraphPool
from rlhf.models import new_reward_model, save_model
from rlhf.reward.train import STAGE, reward_trainer
from rlhf.stage import StageContext
from rlhf.trainers import trainer_args
from tests.builders import build_model, build_recipe, build_tokenizer
from tests.ppo_toys import SHAPES, toy_trainer
from tests.sft_toys import sft_trainer
from tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SIZES = {"rollout_batch_size": 8, "mini_batch_size": 8, "num_ppo_epochs": 2, "total_episodes": 48}


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_change_no_trace(tmp_path, shape, packing):
    runs = []
    for choice in ("off", "on"):
        ppo = SIZES | {"cuda_graphs": choice, "learning_rate": 1e-3, "critic_warmup_steps": 1, "generator": "plain"}
        if choice == "on":
            ppo["packing"] = packing
        trainer = toy_trainer(tmp_path / choice, shape, ppo, hardware={"device": "auto", "precision": "fp32"})
        trace = []
        for _ in range(6):
            trace.append(trainer.step()[0])
            trainer.ppo_step += 1
        runs.append(trace)
        assert bool(trainer.forward_backward.graphs) == bool(trainer.read.graphs) == (choice == "on")
    keys = [key for key in runs[0][0] if not key.startswith("perf/")]
    for plain, graphed in zip(*runs, strict=True):
        assert_close([graphed[key] for key in keys], [plain[key] for key in keys], rtol=1e-3, atol=1e-4)


def test_the_reward_stage_learns_the_same_with_graphs(tmp_path):
    tokenizer, runs = build_tokenizer(), {}
    save_model(build_model(tokenizer, n_layer=2), tokenizer, tmp_path / "sft")
    pairs = [{"chosen_ids": [1, *range(40, 41 + n % 5), 2], "rejected_ids": [1, 50 + n % 3, 2]} for n in range(48)]
    for choice in ("off", "on"):
        root = tmp_path / choice
        root.mkdir()
        hardware = {"device": "auto", "precision": "fp32"}
        ctx = StageContext(STAGE, build_recipe(root, reward={"cuda_graphs": choice}, hardware=hardware), root, "toy")
        ctx.dir.mkdir(parents=True)
        options = {
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_steps": 12,
            "save_strategy": "no",
        }
        args = trainer_args(RewardConfig, options, ctx, max_length=None)
        data = Dataset.from_list(pairs)
        trainer = reward_trainer(ctx, new_reward_model(tmp_path / "sft", 0), args, tokenizer, data, data)
        trainer.earlier, trainer.began = {}, 0.0
        trainer.train()
        runs[choice] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert bool(trainer.graphed and trainer.graphed.graphs) == (choice == "on")
    assert len(runs["on"]) == 12 and runs["on"][-1] < runs["on"][0]
    assert_close(runs["on"], runs["off"], rtol=1e-3, atol=1e-4)


def test_sft_learns_the_same_with_graphs(tmp_path):
    runs = {}
    for choice in ("off", "on"):
        hardware = {"device": "auto", "precision": "fp32"}
        options = {"learning_rate": 1e-3, "max_steps": 12, "per_device_train_batch_size": 2, "save_strategy": "no"}
        trainer = sft_trainer(tmp_path / choice, hardware, **options, gradient_accumulation_steps=2, disable_tqdm=True)
        trainer.graph_steps("sft", choice)
        trainer.earlier, trainer.began = {}, 0.0
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        runs[choice] = [[row[key] for key in ("loss", "grad_norm", "entropy", "num_tokens")] for row in rows]
        assert bool(trainer.graphed and trainer.graphed.graphs) == (choice == "on")
    assert len(runs["on"]) == 12 and runs["on"][-1] < runs["on"][0]
    assert_close(runs["on"], runs["off"], rtol=1e-3, atol=1e-4)


def test_calls_without_a_graph_use_the_memory_of_the_graphs():
    weight = torch.ones(64, 64, device="cuda", dtype=torch.float64, requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def function(rows):
        hidden = rows
        for _ in range(8):
            hidden = (hidden @ weight / 64).sin()  # each is kept for the backward
        loss = hidden.sum()
        loss.backward()
        return loss.detach(), hidden.detach()[0]

    def gradient_of(call, rows):
        weight.grad.zero_()
        return torch.cat([part.flatten() for part in (*call(rows), weight.grad)])

    batches = [torch.randn(2**14 * size, 64, device="cuda", dtype=torch.float64) for size in (16, 14, 12, 10)]
    wanted = [gradient_of(function, rows) for rows in batches]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    function(batches[0])
    alone = torch.cuda.memory_reserved() - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graphed, kept = Graphed(function, GraphPool()), []
    for _ in range(3):  # of each shape the first is called, the second recorded, the rest are replayed
        for number, rows in enumerate(batches):
            kept.append((number, graphed(rows)))
            assert_close(gradient_of(graphed, rows), wanted[number], atol=1e-6)
    assert len(graphed.graphs) == len(batches)
    for number, outputs in kept:
        assert_close(torch.cat([part.flatten() for part in outputs]), wanted[number][:65], atol=1e-6)
    assert torch.cuda.max_memory_reserved() - before < 1.7 * alone  # apart, a graph and a call of the next shape: 1.9
