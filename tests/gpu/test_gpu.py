"""PPO on a GPU in bf16 (`make test-gpu`): float32 masters move, frozen models are bf16, the published policy loads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.artifacts import Artifact
from tests.integration.conftest import run_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_the_ci_recipe_runs_in_bf16_on_a_gpu(tmp_path):
    overrides = ("hardware.device=cuda", "hardware.precision=bf16")
    for stage in ("pretrain", "sft", "reward", "ppo"):
        run_stage(stage, tmp_path, *overrides)
    metrics = Artifact.load(tmp_path / "ci" / "ppo").metrics()
    assert abs(metrics["objective/kl"].iloc[0]) < 0.05  # bf16 reference against float32 masters in autocast
    assert metrics["objective/scores"].tail(3).mean() > metrics["objective/scores"].head(3).mean()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ci" / "ppo" / "model")
    assert policy.dtype == torch.float32
