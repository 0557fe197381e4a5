"""Masked statistics: hand-typed numbers, the second implementation, and what padding must never do."""

import math
from math import inf, nan

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf.ppo.masking import affine_fit, check_mask, masked_mean, masked_moments, masked_whiten, merge_moments
from tests.tolerances import assert_close
from tests.unit import reference

F64 = torch.float64
X = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]], dtype=F64)
MASK = torch.tensor([[True, True, False], [True, False, False]])
NOTHING = torch.zeros(2, 3, dtype=torch.bool)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def grid(values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


class TestMaskedMean:
    def test_by_hand(self):
        assert_close(masked_mean(X, MASK), 3.0)
        assert_close(masked_mean(X, MASK, dim=1), [1.5, 6.0])
        assert_close(masked_mean(X, MASK, dim=0), [3.5, 2.0, 0.0])
        assert_close(masked_mean(X, MASK, dim=(0, 1)), 3.0)

    def test_nothing_counts_gives_zero_and_no_gradient(self):
        x = torch.full((2, 3), math.nan, requires_grad=True)
        mean = masked_mean(x, NOTHING)
        mean.backward()
        assert mean.item() == 0.0
        assert_close(x.grad, torch.zeros(2, 3))
        assert_close(masked_mean(X, NOTHING, dim=1), [0.0, 0.0])

    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
    def test_junk_under_the_mask_reaches_neither_value_nor_gradient(self, junk):
        x = torch.where(MASK, X, junk).requires_grad_()
        mean = masked_mean(x, MASK)
        mean.backward()
        assert_close(mean, 3.0)
        assert_close(x.grad, [[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_the_dtype(self, dtype):
        assert masked_mean(X.to(dtype), MASK).dtype is dtype
        assert masked_mean(X.to(dtype), MASK, dim=1).dtype is dtype

    @given(reference.scattered(100.0))
    def test_second_implementation(self, case):
        mask, x = case
        assert_close(masked_mean(grid(x), torch.tensor(mask)), reference.mean(x, mask))
        by_row = [reference.mean([row], [flags]) for row, flags in zip(x, mask, strict=True)]
        assert_close(masked_mean(grid(x), torch.tensor(mask), dim=1), by_row)


class TestMaskedMoments:
    def test_by_hand(self):
        mean, var, count = masked_moments(X, MASK)  # of 1, 2, 6: (4 + 1 + 9) / 3, not / 2
        assert_close(mean, 3.0)
        assert_close(var, 14 / 3)
        assert count.item() == 3
        assert count.dtype is torch.int64

    def test_one_token_has_variance_zero(self):
        mean, var, count = masked_moments(X, torch.tensor([[False, True, False], [False] * 3]))
        assert (mean.item(), var.item(), count.item()) == (2.0, 0.0, 1)

    def test_nothing_counts(self):
        assert [m.item() for m in masked_moments(X, NOTHING)] == [0.0, 0.0, 0]

    def test_large_offset_in_float32(self):
        x = torch.tensor([[10_000.0, 10_001.0, math.nan], [10_002.0, math.inf, math.nan]])
        mean, var, _ = masked_moments(x, MASK)  # E[x^2] - E[x]^2 has no correct digit here
        assert_close(mean, 10_001.0)
        assert_close(var, 2 / 3)

    @pytest.mark.parametrize("value", [0.1, 1000.1, -3e-4])
    def test_constant_data_have_no_spread_at_all(self, value):
        x = torch.full((7, 11), value)
        mask = torch.arange(77).reshape(7, 11) < 61
        assert masked_moments(x, mask)[1].item() == 0.0
        assert masked_whiten(x, mask).abs().max().item() == 0.0  # rounding of the mean, times 1e4, would show

    @given(reference.scattered(100.0))
    def test_second_implementation(self, case):
        mask, x = case
        mean, var, count = masked_moments(grid(x), torch.tensor(mask))
        assert_close(mean, reference.mean(x, mask))
        assert_close(var, reference.variance(x, mask), atol=1e-9)
        assert count.item() == len(reference.cells(mask))

    def test_gradient_by_finite_differences(self):
        x = X.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: masked_moments(x, MASK)[:2], x)


class TestMergeMoments:
    def test_by_hand(self):
        # {1, 3}, {} and {8}: mean 4, var (9 + 1 + 16) / 3
        means, variances = torch.tensor([2.0, 0.0, 8.0], dtype=F64), torch.tensor([1.0, 0.0, 0.0], dtype=F64)
        mean, var, count = merge_moments(means, variances, torch.tensor([2, 0, 1]))
        assert_close(mean, 4.0)
        assert_close(var, 26 / 3)
        assert count.item() == 3

    def test_an_empty_part_may_hold_anything(self):
        means, variances = torch.tensor([math.nan, 5.0]), torch.tensor([math.nan, 4.0])
        mean, var, count = merge_moments(means, variances, torch.tensor([0, 7]))
        assert (mean.item(), var.item(), count.item()) == (5.0, 4.0, 7)

    def test_a_single_entry_keeps_what_it_came_with(self):
        merged = merge_moments(torch.tensor([5.0, 0.0]), torch.tensor([4.0, 0.0]), torch.tensor([1, 0]))
        assert [m.item() for m in merged] == [5.0, 4.0, 1]

    def test_only_empty_parts(self):
        merged = merge_moments(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
        assert [m.item() for m in merged] == [0.0, 0.0, 0]

    def test_equal_parts_merge_without_rounding(self):
        means = torch.full((3,), 1000.1)
        mean, var, _ = merge_moments(means, torch.zeros(3), torch.tensor([3, 5, 11]))
        assert mean.item() == means[0].item()
        assert var.item() == 0.0

    @given(reference.scattered(100.0))
    def test_rows_as_ranks_give_the_moments_of_the_whole(self, case):
        mask, x = case
        parts = [masked_moments(grid(row), torch.tensor(flags)) for row, flags in zip(x, mask, strict=True)]
        mean, var, count = merge_moments(*(torch.stack(part) for part in zip(*parts, strict=True)))
        assert_close(mean, reference.mean(x, mask))
        assert_close(var, reference.variance(x, mask), atol=1e-9)
        assert count.item() == len(reference.cells(mask))


class TestMaskedWhiten:
    def test_by_hand(self):
        # 1, 2, 6: mean 3, standard deviation 2.1602468995
        assert_close(masked_whiten(X, MASK), [[-0.9258200977, -0.4629100489, 0.0], [1.3887301466, 0.0, 0.0]], rtol=1e-8)

    def test_without_shift_the_mean_stays(self):
        expected = [[2.0741799023, 2.5370899511, 0.0], [4.3887301466, 0.0, 0.0]]
        assert_close(masked_whiten(X, MASK, shift_mean=False), expected, rtol=1e-8)

    def test_with_given_moments(self):
        expected = [[-0.5, 0.0, 0.0], [2.0, 0.0, 0.0]]
        assert_close(masked_whiten(X, MASK, moments=(2.0, 4.0)), expected, rtol=1e-8)
        tensors = (torch.tensor(2.0), torch.tensor(4.0))
        assert_close(masked_whiten(X, MASK, moments=tensors), expected, rtol=1e-8)
        kept = [[1.5, 2.0, 0.0], [4.0, 0.0, 0.0]]
        assert_close(masked_whiten(X, MASK, shift_mean=False, moments=tensors), kept, rtol=1e-8)

    def test_epsilon_is_added_to_the_variance(self):
        # var 3e-8: sqrt(3e-8 + 1e-8) = 2e-4
        x = torch.tensor([[1e-4, 0.0]], dtype=F64)
        whitened = masked_whiten(x, torch.ones(1, 2, dtype=torch.bool), moments=(0.0, 3e-8))
        assert_close(whitened, [[0.5, 0.0]])

    def test_one_token_becomes_zero_not_nan(self):
        assert masked_whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).item() == 0.0
        assert masked_whiten(torch.tensor([[5.0]]), torch.tensor([[True]]), shift_mean=False).item() == 5.0

    @pytest.mark.parametrize("shift_mean", [True, False])
    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    def test_junk_under_the_mask_reaches_neither_value_nor_gradient(self, junk, shift_mean):
        clean, dirty = X.clone().requires_grad_(), torch.where(MASK, X, junk).requires_grad_()
        weight = torch.arange(6.0, dtype=F64).reshape(2, 3)
        for x in (clean, dirty):
            (masked_whiten(x, MASK, shift_mean=shift_mean) * weight).sum().backward()
        assert_close(masked_whiten(dirty, MASK, shift_mean=shift_mean), masked_whiten(clean, MASK, shift_mean))
        assert_close(dirty.grad, clean.grad)
        assert dirty.grad[~MASK].tolist() == [0.0, 0.0, 0.0]

    def test_nothing_counts(self):
        assert_close(masked_whiten(X * math.nan, NOTHING), torch.zeros(2, 3, dtype=F64))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_the_dtype(self, dtype):
        x = X.to(dtype)
        assert masked_whiten(x, MASK).dtype is dtype
        moments = (torch.tensor(3.0, dtype=F64), torch.tensor(4.0, dtype=F64))
        assert masked_whiten(x, MASK, moments=moments).dtype is dtype
        assert_close(masked_whiten(x, MASK, moments=moments), [[-1.0, -0.5, 0.0], [1.5, 0.0, 0.0]], rtol=1e-2)

    @given(reference.scattered(100.0), st.booleans())
    def test_second_implementation(self, case, shift_mean):
        mask, x = case
        expected = reference.whiten(x, mask, shift_mean)
        junk = torch.where(torch.tensor(mask), grid(x), math.nan)
        assert_close(masked_whiten(junk, torch.tensor(mask), shift_mean), expected, rtol=1e-6, atol=1e-6)

    @given(reference.scattered(100.0), st.booleans(), reference.floats(10.0), st.floats(0.01, 100.0))
    def test_second_implementation_given_moments(self, case, shift_mean, mean, var):
        mask, x = case
        expected = reference.whiten(x, mask, shift_mean, (mean, var))
        assert_close(masked_whiten(grid(x), torch.tensor(mask), shift_mean, (mean, var)), expected)

    def test_gradient_by_finite_differences(self):
        x = X.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: masked_whiten(x, MASK), x)


class TestAffineFit:
    def test_by_hand(self):
        x, y = grid([[0.0, 1.0, 99.0], [2.0, nan, nan]]), grid([[1.0, 2.0, inf], [6.0, -7.0, nan]])
        mask = torch.tensor([[True, True, False], [True, False, False]])
        # Weights 1/4, 1/4, 1/2: the means are 1.25 and 3.75.
        slope = (1.25 * 2.75 + 0.25 * 1.75 + 2 * 0.75 * 2.25) / (1.25**2 + 0.25**2 + 2 * 0.75**2)
        assert affine_fit(x, y, mask) == pytest.approx((slope, 3.75 - 1.25 * slope))

    def test_a_long_row_counts_as_a_short_one(self):
        x, y = torch.zeros(2, 5), grid([[-4.0] * 5, [2.0, nan, nan, nan, nan]])
        mask = torch.tensor([[True] * 5, [True] + [False] * 4])
        assert affine_fit(x, y, mask) == (0.0, pytest.approx(-1.0))

    def test_a_line_is_found_exactly(self):
        x = grid([[3.0, -1.0, 4.0, 1.0]])
        assert affine_fit(x, 0.3 * x - 7, torch.ones(1, 4, dtype=torch.bool)) == pytest.approx((0.3, -7.0))

    def test_never_upside_down(self):
        x = grid([[1.0, 2.0, 3.0]])
        assert affine_fit(x, -x, torch.ones(1, 3, dtype=torch.bool)) == (0.0, pytest.approx(-2.0))

    @pytest.mark.parametrize("y", [[0.0, 0.0, 0.0], [3.0, 2.0, 1.0], [1.0, 1.2, 1.4]])
    def test_a_scale_is_never_below_the_least_and_the_mean_is_met(self, y):
        x, mask = grid([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
        scale, offset = affine_fit(x, grid([y]), mask, least=0.3)
        assert (scale, 2 * scale + offset) == pytest.approx((0.3, sum(y) / 3))
        assert affine_fit(x, 0.5 * x, mask, least=0.3) == pytest.approx((0.5, 0.0))

    @pytest.mark.parametrize(("x", "y", "counts"), [([5.0, 5.0], [1.0, 2.0], True), ([5.0, 6.0], [1.0, 2.0], False)])
    def test_nothing_to_fit(self, x, y, counts):
        offset = 1.5 if counts else 0.0
        assert affine_fit(grid([x]), grid([y]), torch.full((1, 2), counts)) == (0.0, offset)

    def test_a_constant_of_rows_of_unequal_length(self):
        mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
        y = grid([[1.0, 0, 0], [2.0, 4.0, 0], [3.0, 5.0, 7.0]])
        for x in (0.1, 0.7, 3.3, -1e3):  # their weighted means are off by a bit
            assert affine_fit(grid([[x] * 3] * 3), y, mask) == (0.0, pytest.approx(3.0))

    @pytest.mark.parametrize("broken", [nan, inf])
    def test_not_finite_in_not_finite_out(self, broken):
        mask = torch.ones(1, 3, dtype=torch.bool)
        ok, bad = grid([[1.0, 2.0, 4.0]]), grid([[1.0, broken, 2.0]])
        assert not all(map(math.isfinite, affine_fit(ok, bad, mask)))
        assert not all(map(math.isfinite, affine_fit(bad, ok, mask)))

    def test_float32_far_from_zero(self):
        x = torch.tensor([[10_000.0, 10_000.5, 10_001.0]])
        y = torch.tensor([[20_000.0, 20_000.25, 20_000.5]])
        assert affine_fit(x, y, torch.ones(1, 3, dtype=torch.bool)) == pytest.approx((0.5, 15_000.0))

    def test_checks_its_mask(self):
        x = torch.zeros(1, 2)
        with pytest.raises(ValueError, match="mask has dtype"):
            affine_fit(x, x, torch.ones(1, 2))
        with pytest.raises(ValueError, match="y has shape"):
            affine_fit(x, torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))

    @given(reference.ragged(50, 50, min_length=0), st.sampled_from([0.0, 0.3]))
    def test_second_implementation(self, case, least):
        mask, (x, y) = case
        scale, offset = reference.affine_fit(x, y, mask, least)
        found = affine_fit(grid(x), grid(y), torch.tensor(mask), least)
        spread = reference.variance(x, mask)
        assume(spread == 0 or spread > 1e-6)  # between the two the slope is rounding error
        assert found == pytest.approx((scale, offset), rel=1e-6, abs=1e-6)


class TestCheckMask:
    def test_a_float_mask_has_no_polarity(self):
        with pytest.raises(ValueError, match=r"mask has dtype torch\.float32; pass a bool mask where True"):
            masked_mean(X, MASK.float())

    @pytest.mark.parametrize("function", [masked_mean, masked_moments, masked_whiten])
    def test_a_mask_that_only_broadcasts_is_refused(self, function):
        with pytest.raises(ValueError, match=r"x has shape \[2, 3\] but mask has \[2, 1\]"):
            function(X, MASK[:, :1])

    def test_given_moments_do_not_skip_the_check(self):
        with pytest.raises(ValueError, match="x has shape"):
            masked_whiten(X, MASK[:, :1], moments=(0.0, 1.0))

    def test_names_the_argument(self):
        with pytest.raises(ValueError, match="rewards has shape"):
            check_mask(MASK, values=X, rewards=X[:1])
