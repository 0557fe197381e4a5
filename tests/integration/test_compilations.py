"""Lengths differ from step to step; the compiled blocks must not be compiled for each of them."""

import torch
from torch import nn

from rlhf import models
from rlhf.ppo.perf import compilations
from tests.ppo_toys import toy_trainer


def test_blocks_are_compiled_in_the_first_steps_and_never_again(tmp_path, monkeypatch):
    # Without a C++ compiler: it is dynamo that decides what is compiled again.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend="eager", **kwargs))
    head = torch.compile(models._head_logprobs, dynamic=True, backend="eager")
    monkeypatch.setattr(models, "_fused_head_logprobs", head)
    torch._dynamo.reset()
    before = compilations()
    sizes = {"total_episodes": 40, "max_tokens_per_micro_batch": 64, "compile": "on"}
    trainer = toy_trainer(tmp_path, ppo=sizes)
    counts, widths = [], set()
    for trainer.ppo_step in range(5):
        row, rollout = trainer.step()
        widths.add(int(rollout.response_mask.sum(1).max()))
        counts.append(row["perf/compilations"] - before)
    assert len(widths) > 2  # the shapes did change
    # Policy and reference, critic, reward model and head; with and without gradient; one row or several.
    assert counts[0] > 0 and counts[1] <= 14
    assert counts[1:] == [counts[1]] * 4
