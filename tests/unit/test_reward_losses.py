"""The Bradley-Terry loss: hand-typed numbers, the second implementation, finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward.losses import pairwise_loss
from tests.tolerances import assert_close
from tests.unit import reference

F64 = torch.float64
PAIRS = st.lists(st.tuples(*[reference.floats(100.0)] * 3), min_size=1, max_size=8)


def test_by_hand():
    # log(1 + e^-1) = 0.3132616875, log(1 + e^2) = 2.1269280110
    chosen, rejected = torch.tensor([3.0, 1.0], dtype=F64), torch.tensor([2.0, 3.0], dtype=F64)
    assert_close(pairwise_loss(chosen, rejected), (0.31326168751822286 + 2.1269280110429727) / 2)


def test_equal_scores_give_log_2():
    assert_close(pairwise_loss(torch.zeros(3), torch.zeros(3)), math.log(2))


def test_margin_by_hand():
    chosen, rejected = torch.tensor([3.0, 1.0], dtype=F64), torch.tensor([2.0, 1.0], dtype=F64)
    # leads 1 - 1 and 0 - (-1)
    expected = (math.log(2) + 0.31326168751822286) / 2
    assert_close(pairwise_loss(chosen, rejected, torch.tensor([1.0, -1.0], dtype=F64)), expected)
    both = (math.log(2) + 1.3132616875182228) / 2
    assert_close(pairwise_loss(chosen, rejected, 1.0), both)
    assert_close(pairwise_loss(chosen, rejected, torch.tensor(1.0)), both)


def test_gradient_by_hand():
    chosen = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    rejected = torch.tensor([1.0, math.log(3)], dtype=F64, requires_grad=True)
    pairwise_loss(chosen, rejected).backward()
    # -sigmoid(-lead) / 2: sigmoid(0) = 1/2, sigmoid(log 3) = 3/4
    assert_close(chosen.grad, [-0.25, -0.375])
    assert_close(rejected.grad, [0.25, 0.375])


@pytest.mark.parametrize("lead", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_leads_stay_finite(lead):
    chosen = torch.tensor([lead], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(1))
    loss.backward()
    assert_close(loss, max(-lead, 0.0))
    assert_close(chosen.grad, [-1.0 if lead < 0 else 0.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(pairs=PAIRS, with_margin=st.booleans())
def test_second_implementation(dtype, pairs, with_margin):
    chosen, rejected, margins = (list(column) for column in zip(*pairs, strict=True))
    loss = pairwise_loss(
        torch.tensor(chosen, dtype=dtype),
        torch.tensor(rejected, dtype=dtype),
        torch.tensor(margins, dtype=dtype) if with_margin else None,
    )
    assert loss.dtype is dtype
    expected = reference.pairwise_loss(chosen, rejected, margins if with_margin else [0.0] * len(pairs))
    # scores up to 100 lose absolute digits when subtracted in float32
    assert_close(loss, expected, atol=1e-12 if dtype is F64 else 5e-5)


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, generator=generator, dtype=F64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(pairwise_loss, tensors)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"chosen_scores has shape \[2\] but rejected_scores has \[2, 1\]"):
        pairwise_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"margin has shape \[2, 1\]; expected one per pair, \[2\]"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"margin has shape \[1\]; expected one per pair, \[2\]"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"^chosen_scores is empty; a mean needs at least one pair$"):
        pairwise_loss(torch.zeros(0), torch.zeros(0))
