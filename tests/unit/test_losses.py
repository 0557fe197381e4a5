"""The two PPO losses: hand-typed numbers, the second implementation with its own gradients, finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ppo.losses import policy_loss, value_loss
from tests.tolerances import assert_close
from tests.unit import reference

F64 = torch.float64
DTYPES = [torch.float64, torch.float32]
LOG2 = math.log(2)
ALL = torch.ones(1, 4, dtype=torch.bool)


def grid(values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def junk_outside(mask, *tensors, junk=math.nan):
    return [torch.where(mask, x, junk) for x in tensors]


class TestPolicyLoss:
    # ratios 2, 2, 1/2, 1/2 under advantages 1, -1, 3, -4
    NEW = grid([[LOG2 - 1, LOG2 - 1, -LOG2 - 1, -LOG2 - 1]])
    OLD = grid([[-1.0, -1.0, -1.0, -1.0]])
    ADVANTAGES = grid([[1.0, -1.0, 3.0, -4.0]])

    def test_by_hand(self):
        new = self.NEW.clone().requires_grad_()
        loss, clipfrac, approxkl = policy_loss(new, self.OLD, self.ADVANTAGES, ALL, 0.25)
        loss.backward()
        # -1.25 (clipped), +2 (not), -1.5 (not), +3 (clipped): 2.25 / 4
        assert_close(loss, 0.5625)
        assert_close(clipfrac, 0.5)
        assert_close(approxkl, LOG2**2 / 2)
        # -A * ratio / 4 where it is not clipped
        assert_close(new.grad, [[0.0, 0.5, -0.375, 0.0]])

    def test_first_step_is_the_policy_gradient(self):
        new = self.OLD.clone().requires_grad_()
        loss, clipfrac, approxkl = policy_loss(new, self.OLD, self.ADVANTAGES, ALL, 0.2)
        loss.backward()
        assert_close(loss, 0.25)  # minus the mean advantage
        assert_close(new.grad, [[-0.25, 0.25, -0.75, 1.0]])
        assert clipfrac.item() == 0.0 and approxkl.item() == 0.0

    def test_statistics_carry_no_gradient(self):
        loss, clipfrac, approxkl = policy_loss(self.NEW.clone().requires_grad_(), self.OLD, self.ADVANTAGES, ALL, 0.2)
        assert loss.requires_grad and not clipfrac.requires_grad and not approxkl.requires_grad

    def test_mask_and_denominator(self):
        mask = torch.tensor([[True, True, False, False]])
        loss, clipfrac, approxkl = policy_loss(self.NEW, self.OLD, self.ADVANTAGES, mask, 0.25)
        assert_close(torch.stack([loss, clipfrac, approxkl]), [0.375, 0.5, LOG2**2 / 2])
        for denominator in (8, 8.0, torch.tensor(8)):
            results = policy_loss(self.NEW, self.OLD, self.ADVANTAGES, mask, 0.25, denominator)
            assert_close(torch.stack(results), [0.09375, 0.125, LOG2**2 / 8])

    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
    def test_junk_under_the_mask_reaches_neither_loss_nor_gradient(self, junk):
        mask = torch.tensor([[True, False, True, False]])
        new, old, advantages = junk_outside(mask, self.NEW, self.OLD, self.ADVANTAGES, junk=junk)
        new.requires_grad_()
        loss, clipfrac, approxkl = policy_loss(new, old, advantages, mask, 0.25)
        loss.backward()
        assert_close(torch.stack([loss, clipfrac, approxkl]), [-1.375, 0.5, LOG2**2 / 2])
        assert_close(new.grad, [[0.0, 0.0, -0.75, 0.0]])

    def test_all_padding_gives_zero(self):
        new = torch.full((2, 3), math.nan, requires_grad=True)
        results = policy_loss(new, new.detach(), new.detach(), torch.zeros(2, 3, dtype=torch.bool), 0.2)
        results[0].backward()
        assert [r.item() for r in results] == [0.0, 0.0, 0.0]
        assert_close(new.grad, torch.zeros(2, 3))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("log_ratio", [-1000.0, -50.0, 50.0, 1000.0])
    @pytest.mark.parametrize("advantage", [2.0, 0.0])
    def test_extreme_log_ratios_stay_finite_where_the_objective_is_clipped(self, log_ratio, advantage, dtype):
        new = grid([[log_ratio]], dtype).requires_grad_()
        loss, clipfrac, approxkl = policy_loss(new, grid([[0.0]], dtype), grid([[advantage]], dtype), ALL[:, :1], 0.2)
        loss.backward()
        ratio_side = 1.2 if log_ratio > 0 else math.exp(log_ratio)
        assert_close(loss, -advantage * ratio_side)
        assert_close(new.grad, [[0.0 if log_ratio > 0 else -advantage * math.exp(log_ratio)]])
        assert clipfrac.item() == float(log_ratio > 0 and advantage > 0)
        assert_close(approxkl, log_ratio**2 / 2)

    def test_a_likely_token_with_negative_advantage_is_not_capped(self):
        for log_ratio in (50.0, 85.0):
            new = grid([[log_ratio]], torch.float32).requires_grad_()
            loss, clipfrac, _ = policy_loss(new, torch.zeros(1, 1), torch.full((1, 1), -1.0), ALL[:, :1], 0.2)
            loss.backward()
            assert_close(loss, math.exp(log_ratio))
            assert_close(new.grad, [[math.exp(log_ratio)]])
            assert clipfrac.item() == 0.0
        diverged = policy_loss(torch.full((1, 1), 99.0), torch.zeros(1, 1), -torch.ones(1, 1), ALL[:, :1], 0.2)[0]
        assert diverged.item() == math.inf  # the trainer has to see it

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(
        case=reference.ragged(50.0, 50.0, 5.0, min_length=0),
        cliprange=st.floats(0.01, 0.9),
        scale=st.sampled_from([0.002, 0.02, 0.5]),
        denominator=st.one_of(st.none(), st.integers(1, 100)),
    )
    def test_second_implementation(self, dtype, case, cliprange, scale, denominator):
        mask, (new, old, advantages) = case
        # from log-ratios inside the clip range to +-50; in the dtype under test, so that both see the same numbers
        new, old = ((grid(x, dtype) * scale) for x in (new, old))
        expected = reference.policy_loss(new.tolist(), old.tolist(), advantages, mask, cliprange, denominator)
        flags = torch.tensor(mask)
        dirty_new, dirty_old, dirty_advantages = junk_outside(flags, new, old, grid(advantages, dtype))
        dirty_new.requires_grad_()
        loss, clipfrac, approxkl = policy_loss(dirty_new, dirty_old, dirty_advantages, flags, cliprange, denominator)
        loss.backward()
        assert loss.dtype is clipfrac.dtype is approxkl.dtype is dtype
        spread = sum(abs(g) for row in expected.gradient for g in row)  # terms of both signs may cancel in the sum
        eps = torch.finfo(dtype).eps
        assert_close(loss, expected.loss, atol=1000 * eps * (1 + spread))
        assert_close(dirty_new.grad, expected.gradient, rtol=1e-10 if dtype is F64 else 1e-4)
        assert_close(clipfrac, expected.clipfrac)
        assert_close(approxkl, expected.approxkl, rtol=1e-10 if dtype is F64 else 1e-4)

    @given(reference.ragged(2.0, 2.0, 5.0), st.integers(0, 3))
    def test_micro_batches_add_up_to_the_mini_batch(self, case, cut):
        flags, tensors = torch.tensor(case[0]), [grid(x) for x in case[1]]
        whole = policy_loss(*tensors, flags, 0.2)
        tokens = int(flags.sum())
        halves = [
            policy_loss(*(x[rows] for x in tensors), flags[rows], 0.2, tokens)
            for rows in (slice(0, cut), slice(cut, None))
        ]
        for total, *parts in zip(whole, *halves, strict=True):
            assert_close(sum(parts), total)

    @pytest.mark.parametrize("seed", range(3))
    def test_gradient_by_finite_differences(self, seed):
        generator = torch.Generator().manual_seed(seed)
        old = torch.randn(3, 5, generator=generator, dtype=F64)
        # a finite difference must not straddle the kinks at 0.8 and 1.2
        steps = torch.tensor([-0.9, -0.4, -0.1, 0.1, 0.3, 0.9], dtype=F64)
        new = old + steps[torch.randint(6, (3, 5), generator=generator)]
        advantages = torch.randn(3, 5, generator=generator, dtype=F64)
        mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
        assert torch.autograd.gradcheck(
            lambda new: policy_loss(new, old, advantages, mask, 0.2)[0], new.requires_grad_()
        )
        assert torch.autograd.gradcheck(lambda new: policy_loss(new, old, advantages, mask, 0.2, 50)[0], new)

    def test_wrong_input(self):
        ok = torch.zeros(1, 4)
        for position, name in enumerate(("new_logprobs", "logprobs", "advantages")):
            arguments = [ok, ok, ok]
            arguments[position] = torch.zeros(1, 1)
            with pytest.raises(ValueError, match=rf"^{name} has shape \[1, 1\] but mask has \[1, 4\]"):
                policy_loss(*arguments, ALL, 0.2)
        with pytest.raises(ValueError, match="bool mask"):
            policy_loss(ok, ok, ok, ALL.float(), 0.2)
        for denominator in (0, -3, math.nan):
            with pytest.raises(ValueError, match=f"denominator is {denominator}; pass the token count"):
                policy_loss(ok, ok, ok, ALL, 0.2, denominator)


class TestValueLoss:
    # errors 1, -1, 2, 0.5 in four situations around old values and a range of 0.5
    NEW = grid([[1.0, 1.0, 3.0, 0.25]])
    OLD = grid([[0.0, 0.0, 0.0, 0.0]])
    RETURNS = grid([[0.0, 2.0, 1.0, -0.25]])

    def test_by_hand(self):
        new = self.NEW.clone().requires_grad_()
        loss, clipfrac = value_loss(new, self.OLD, self.RETURNS, ALL, 0.5)
        loss.backward()
        # max(1, 0.25), max(1, 2.25) clipped, max(4, 0.25), 0.25 both: (1 + 2.25 + 4 + 0.25) / 2 / 4
        assert_close(loss, 0.9375)
        assert_close(clipfrac, 0.25)
        assert_close(new.grad, [[0.25, 0.0, 0.5, 0.125]])

    def test_downward_clip_by_hand(self):
        new = grid([[-1.0, -1.0]]).requires_grad_()
        loss, clipfrac = value_loss(new, grid([[1.0, 1.0]]), grid([[-2.0, 0.0]]), ALL[:, :2], 0.5)
        loss.backward()
        # bounded at 0.5: max(1, 6.25) clipped, max(1, 0.25): 7.25 / 2 / 2
        assert_close(loss, 1.8125)
        assert_close(clipfrac, 0.5)
        assert_close(new.grad, [[0.0, -0.5]])

    def test_no_clipping(self):
        new = self.NEW.clone().requires_grad_()
        loss, clipfrac = value_loss(new, self.OLD, self.RETURNS, ALL, None)
        loss.backward()
        assert_close(loss, 0.78125)  # (1 + 1 + 4 + 0.25) / 8
        assert_close(clipfrac, 0.0)
        assert_close(new.grad, [[0.25, -0.25, 0.5, 0.125]])
        assert_close(value_loss(self.NEW, self.OLD, self.RETURNS, ALL, None, 25)[0], 0.125)

    def test_rounding_alone_is_not_clipping(self):
        old = torch.linspace(-3, 3, 101)[None]
        new = old + 0.1  # inside; old + clamp(new - old) would differ from new in the last bit
        mask = torch.ones(1, 101, dtype=torch.bool)
        assert value_loss(new, old, torch.zeros(1, 101), mask, 0.2)[1].item() == 0.0

    def test_statistics_carry_no_gradient(self):
        for cliprange_value in (0.2, None):
            loss, clipfrac = value_loss(self.NEW.clone().requires_grad_(), self.OLD, self.RETURNS, ALL, cliprange_value)
            assert loss.requires_grad and not clipfrac.requires_grad

    def test_mask_and_denominator(self):
        mask = torch.tensor([[True, True, False, False]])
        assert_close(torch.stack(value_loss(self.NEW, self.OLD, self.RETURNS, mask, 0.5)), [0.8125, 0.5])
        for denominator in (8, 8.0, torch.tensor(8)):
            results = value_loss(self.NEW, self.OLD, self.RETURNS, mask, 0.5, denominator)
            assert_close(torch.stack(results), [0.203125, 0.125])

    @pytest.mark.parametrize("cliprange_value", [0.5, None])
    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
    def test_junk_under_the_mask_reaches_neither_loss_nor_gradient(self, junk, cliprange_value):
        mask = torch.tensor([[True, False, True, False]])
        new, old, returns = junk_outside(mask, self.NEW, self.OLD, self.RETURNS, junk=junk)
        new.requires_grad_()
        loss, clipfrac = value_loss(new, old, returns, mask, cliprange_value)
        loss.backward()
        assert_close(torch.stack([loss, clipfrac]), [1.25, 0.0])
        assert_close(new.grad, [[0.5, 0.0, 1.0, 0.0]])

    @pytest.mark.parametrize("cliprange_value", [0.2, None])
    def test_all_padding_gives_zero(self, cliprange_value):
        new = torch.full((2, 3), math.nan, requires_grad=True)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        results = value_loss(new, new.detach(), new.detach(), mask, cliprange_value)
        results[0].backward()
        assert [r.item() for r in results] == [0.0, 0.0]
        assert_close(new.grad, torch.zeros(2, 3))

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(
        case=reference.ragged(4.0, 4.0, 4.0, min_length=0),
        cliprange_value=st.one_of(st.none(), st.sampled_from([0.125, 0.5, 2.0])),
        denominator=st.one_of(st.none(), st.integers(1, 100)),
    )
    def test_second_implementation(self, dtype, case, cliprange_value, denominator):
        mask, case = case
        # multiples of 1/64 have no rounding error in any of the sums, so both sides agree on which case applies
        new, old, returns = ((grid(x) * 64).round() / 64 for x in case)
        expected = reference.value_loss(
            new.tolist(), old.tolist(), returns.tolist(), mask, cliprange_value, denominator
        )
        flags = torch.tensor(mask)
        dirty_new, dirty_old, dirty_returns = junk_outside(flags, *(x.to(dtype) for x in (new, old, returns)))
        dirty_new.requires_grad_()
        loss, clipfrac = value_loss(dirty_new, dirty_old, dirty_returns, flags, cliprange_value, denominator)
        loss.backward()
        assert loss.dtype is clipfrac.dtype is dtype
        assert_close(loss, expected.loss)
        assert_close(clipfrac, expected.clipfrac)
        # Where value and bound lie mirrored about the return, the loss has a kink and any subgradient is right.
        reach = math.inf if cliprange_value is None else cliprange_value
        bound = torch.minimum(torch.maximum(new, old - reach), old + reach)
        smooth = ((bound - returns).abs() != (new - returns).abs()) | (bound == new)
        assert_close(dirty_new.grad[smooth], grid(expected.gradient)[smooth])

    @given(reference.ragged(2.0, 2.0, 2.0), st.integers(0, 3))
    def test_micro_batches_add_up_to_the_mini_batch(self, case, cut):
        flags, tensors = torch.tensor(case[0]), [grid(x) for x in case[1]]
        whole = value_loss(*tensors, flags, 0.2)
        tokens = int(flags.sum())
        halves = [
            value_loss(*(x[rows] for x in tensors), flags[rows], 0.2, tokens)
            for rows in (slice(0, cut), slice(cut, None))
        ]
        for total, *parts in zip(whole, *halves, strict=True):
            assert_close(sum(parts), total)

    @pytest.mark.parametrize("cliprange_value", [0.2, None])
    @pytest.mark.parametrize("seed", range(3))
    def test_gradient_by_finite_differences(self, seed, cliprange_value):
        generator = torch.Generator().manual_seed(seed)
        old, new, returns = (torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(3))
        mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
        for denominator in (None, 50):
            assert torch.autograd.gradcheck(
                lambda new, d=denominator: value_loss(new, old, returns, mask, cliprange_value, d)[0],
                new.requires_grad_(),
            )

    def test_wrong_input(self):
        ok = torch.zeros(1, 4)
        for position, name in enumerate(("new_values", "values", "returns")):
            arguments = [ok, ok, ok]
            arguments[position] = torch.zeros(1, 1)
            with pytest.raises(ValueError, match=rf"^{name} has shape \[1, 1\] but mask has \[1, 4\]"):
                value_loss(*arguments, ALL, 0.2)
        with pytest.raises(ValueError, match="denominator is 0; pass the token count"):
            value_loss(ok, ok, ok, ALL, None, 0)
