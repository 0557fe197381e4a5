"""One update does not depend on how its rows are padded, packed or ordered. docs/ppo.md lists all invariances."""

import dataclasses

import pytest
import torch

from rlhf.ppo.packing import Packed, packed_shapes
from rlhf.ppo.rollout import lengths_of
from rlhf.ppo.trainer import Targets
from tests.ppo_toys import SHAPES, first_rollout, toy_trainer
from tests.tolerances import assert_close

SIZES = {"rollout_batch_size": 8, "mini_batch_size": 8, "total_episodes": 8, "max_tokens_per_micro_batch": 4096}


def gradient_of(trainer, rollout, targets, rows):
    """Gradients and statistics of one optimizer step, which is not taken."""
    gradients = []
    clip = trainer._clip_gradients
    trainer._clip_gradients = lambda: gradients.extend(p.grad.clone() for p in trainer.parameters) or clip()
    trainer.optimizer.step = lambda: None
    statistics = trainer._optimizer_step(rollout, targets, rows)
    trainer._clip_gradients = clip
    return gradients, statistics


def widened(x, left, right):
    """Junk where nobody may look."""
    junk = 7 if x.dtype == torch.int64 else 1e6
    return torch.nn.functional.pad(x, (left, right), value=junk)


def padded(rollout, targets, left=3, right=2):
    """The same episodes with more padding on both sides, of another token than the pad token."""
    pad = torch.nn.functional.pad
    made = {"prompt_mask": pad(rollout.prompt_mask, (left, 0)), "prompt_ids": widened(rollout.prompt_ids, left, 0)}
    made["response_mask"] = pad(rollout.response_mask, (0, right))
    for name in ("response_ids", "logprobs", "ref_logprobs", "values"):
        made[name] = widened(getattr(rollout, name), 0, right)
    wide = Targets(widened(targets.advantages, 0, right), widened(targets.returns, 0, right))
    return dataclasses.replace(rollout, **made), wide


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_packing_and_order_change_no_gradient(tmp_path, shape):
    trainer = toy_trainer(tmp_path, shape, SIZES)
    rollout = first_rollout(trainer)
    assert (
        len({sum(pair) for pair in zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)}) > 2
    )  # else there is nothing to pad, pack or order
    draw = torch.Generator().manual_seed(0)
    rollout.logprobs = rollout.logprobs + 0.2 * torch.randn(rollout.logprobs.shape, generator=draw)  # ratios beside 1
    targets = Targets(*torch.randn(2, *rollout.values.shape, generator=draw))
    rows = list(range(8))
    expected = gradient_of(trainer, rollout, targets, rows)
    assert max(float(gradient.abs().max()) for gradient in expected[0]) > 1e-2
    wide, wide_targets = padded(rollout, targets)
    longest = max(lengths_of(rollout, rows))
    cases = {
        "padding": (wide, wide_targets, rows),
        "order": (rollout, targets, rows[::-1]),
        "side by side": (
            dataclasses.replace(wide, packed=packed_shapes(4096, longest, graphs=True, asked_for=True)),
            wide_targets,
            rows,
        ),
        "in two": (dataclasses.replace(rollout, packed=Packed(3 * longest)), targets, rows[::-1]),
        "packing": (rollout, targets, rows),
    }
    for name, case in cases.items():
        if name in ("in two", "packing"):  # every row alone
            trainer.config = trainer.config.model_copy(update={"max_tokens_per_micro_batch": 1})
        gradients, statistics = gradient_of(trainer, *case)
        for gradient, wanted in zip(gradients, expected[0], strict=True):
            assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
        assert_close(list(statistics.values()), list(expected[1].values()), rtol=1e-4, atol=1e-5)
