"""A run with CUDA graphs is the run without them."""

import pytest
import torch

from tests.ppo_toys import SHAPES, toy_trainer
from tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SIZES = {"rollout_batch_size": 8, "mini_batch_size": 8, "num_ppo_epochs": 2, "total_episodes": 48}


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_change_no_trace(tmp_path, shape):
    runs = []
    for choice in ("off", "on"):
        ppo = SIZES | {"cuda_graphs": choice, "learning_rate": 1e-3, "critic_warmup_steps": 1, "generator": "plain"}
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
