"""The Bradley-Terry loss: hand-typed numbers, the second implementation, finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward.losses import (
    language_model_loss,
    length_correlation,
    noisy_pairwise_loss,
    pairwise_loss,
)
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


# -------------------------------------------------------------------------------------------------------- noisy labels
def test_noisy_losses_by_hand():
    # l(1) = 0.3132616875, l(-1) = 1.3132616875
    chosen, rejected = torch.tensor([3.0], dtype=F64), torch.tensor([2.0], dtype=F64)
    right, wrong = 0.31326168751822286, 1.3132616875182228
    assert_close(noisy_pairwise_loss(chosen, rejected, 0.2, robust=False), 0.8 * right + 0.2 * wrong)
    assert_close(noisy_pairwise_loss(chosen, rejected, 0.2, robust=True), (0.8 * right - 0.2 * wrong) / 0.6)
    for robust in (False, True):
        assert_close(noisy_pairwise_loss(chosen, rejected, 0.0, robust), right)
    # a margin of 2: the lead is -1, and 1 for the flipped label
    assert_close(noisy_pairwise_loss(chosen, rejected, 0.2, False, margin=2.0), 0.8 * wrong + 0.2 * right)


def test_the_robust_loss_of_flipped_labels_is_the_loss_of_clean_ones_in_the_mean():
    # 3 of 10 labels are flipped, all with the same scores: 7 l'(m) + 3 l'(-m) = 10 l(m)
    chosen, rejected = torch.tensor([0.7] * 7 + [-0.4] * 3, dtype=F64), torch.tensor([-0.4] * 7 + [0.7] * 3, dtype=F64)
    clean = pairwise_loss(chosen[:7], rejected[:7])
    assert_close(noisy_pairwise_loss(chosen, rejected, 0.3, robust=True), clean)


def test_the_smoothed_loss_is_smallest_where_the_model_says_the_flip_rate():
    lead = torch.tensor([math.log(0.9 / 0.1)], dtype=F64, requires_grad=True)
    noisy_pairwise_loss(lead, torch.zeros(1, dtype=F64), 0.1, robust=False).backward()
    assert_close(lead.grad, [0.0])


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.7])
def test_a_flip_rate_that_means_nothing_is_refused(flip_rate):
    with pytest.raises(ValueError, match="flip_rate"):
        noisy_pairwise_loss(torch.ones(1), torch.zeros(1), flip_rate, robust=False)


# -------------------------------------------------------------------------------------------------------------- length
def test_length_correlation_by_hand():
    # margins 1 2 3, lengths 2 0 4: deviations -1 0 1 and 0 -2 2: cov 2, spreads 2 and 8: 4 / 16
    chosen, rejected = torch.tensor([1.0, 3.0, 5.0], dtype=F64), torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    assert_close(length_correlation(chosen, rejected, torch.tensor([2, 0, 4])), 0.25)
    assert_close(length_correlation(chosen, rejected, torch.tensor([7, 9, 11])), 1.0)
    assert_close(length_correlation(-chosen, -rejected, torch.tensor([7, 9, 11])), 1.0)


@pytest.mark.parametrize(("scores", "lengths"), [([1.0, 1.0], [3, 5]), ([1.0, 2.0], [3, 3])])
def test_no_spread_no_correlation(scores, lengths):
    chosen = torch.tensor(scores, requires_grad=True)
    penalty = length_correlation(chosen, torch.zeros(2), torch.tensor(lengths))
    penalty.backward()
    assert_close(penalty, 0.0)
    assert_close(chosen.grad, [0.0, 0.0])


# ------------------------------------------------------------------------------------------------------ language model
def test_language_model_loss_is_cross_entropy_over_the_counted_tokens():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(3, 5, bias=False), torch.randn(2, 4, 3, requires_grad=True)
    ids, mask = torch.randint(5, (2, 4)), torch.tensor([[True, True, True, False], [False, False, True, True]])
    loss = language_model_loss(head, hidden, ids, mask)
    logprobs = head(hidden).log_softmax(-1)
    counted = [(0, 1), (0, 2), (1, 2), (1, 3)]  # the first token has nothing before it
    expected = -sum(logprobs[row, place - 1, ids[row, place]] for row, place in counted) / 4
    assert_close(loss, expected.item())
    (gradient,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(expected, hidden)
    assert_close(gradient, wanted)
    assert_close(language_model_loss(head, hidden, ids, torch.zeros_like(mask)), 0.0)
