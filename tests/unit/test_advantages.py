"""KL estimators, token rewards and GAE: hand-typed numbers and the second implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ppo.advantages import gae, kl_penalty, token_rewards
from tests.tolerances import assert_close
from tests.unit import reference

F64 = torch.float64
DTYPES = [torch.float64, torch.float32]


def grid(values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


class TestKLPenalty:
    def test_by_hand(self):
        logprobs, ref = grid([[-1.0, -2.0]]), grid([[-1.5, -1.0]])  # log(policy / ref) = 0.5, -1
        assert_close(kl_penalty(logprobs, ref), [[0.5, -1.0]])
        assert_close(kl_penalty(logprobs, ref, "k1"), [[0.5, -1.0]])
        assert_close(kl_penalty(logprobs, ref, "k2"), [[0.125, 0.5]])
        # e^-0.5 - 1 + 0.5 and e^1 - 1 - 1
        assert_close(kl_penalty(logprobs, ref, "k3"), [[0.10653065971263342, 0.7182818284590452]])

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_expectation_is_the_kl_divergence(self, estimator):
        policy, ref = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]
        divergence = 0.7 * math.log(1.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4)
        penalty = kl_penalty(grid([policy]).log(), grid([ref]).log(), estimator)
        assert_close((grid([policy]) * penalty).sum(), divergence)

    def test_k2_is_the_kl_divergence_to_second_order(self):
        policy, ref = grid([[0.5, 0.5]]), grid([[0.501, 0.499]])
        exact = (policy * (policy / ref).log()).sum()
        assert_close((policy * kl_penalty(policy.log(), ref.log(), "k2")).sum(), exact, rtol=1e-5, atol=0)

    def test_k3_keeps_its_digits_where_the_models_agree(self):
        penalty = kl_penalty(
            torch.tensor([[1e-3]]), torch.tensor([[0.0]]), "k3"
        )  # float32; exp(r) - 1 - r gives 4.8e-7
        assert_close(penalty, [[4.9983338e-7]], rtol=1e-3, atol=0)

    @given(reference.ragged(50.0, 50.0))
    def test_second_implementation(self, case):
        _, (logprobs, ref) = case
        for estimator in ("k1", "k2", "k3"):
            expected = reference.kl_penalty(logprobs, ref, estimator)
            # k3 cancels near r = 1, in the reference: 1 - 1 + tiny
            assert_close(kl_penalty(grid(logprobs), grid(ref), estimator), expected, atol=1e-12)

    @given(reference.ragged(50.0, 50.0))
    def test_k2_and_k3_are_never_negative(self, case):
        _, (logprobs, ref) = case
        for estimator in ("k2", "k3"):
            assert bool((kl_penalty(grid(logprobs), grid(ref), estimator) >= 0).all())

    def test_unknown_estimator(self):
        with pytest.raises(ValueError, match=r"kl_estimator is 'k4'; choose one of k1, k2, k3"):
            kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4")

    def test_shapes_must_agree(self):
        with pytest.raises(
            ValueError, match=r"\[2, 3\] but ref_logprobs has \[2, 1\]; score the same response tokens with"
        ):
            kl_penalty(torch.zeros(2, 3), torch.zeros(2, 1))


class TestTokenRewards:
    MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])

    def test_by_hand(self):
        kl = grid([[1.0, -2.0, 3.0], [4.0, 9.0, 9.0], [0.0, 5.0, 9.0]])
        rewards = token_rewards(grid([10.0, -20.0, 30.0]), kl, self.MASK, 0.1)
        assert_close(rewards, [[-0.1, 0.2, 9.7], [-20.4, 0.0, 0.0], [0.0, 29.5, 0.0]])

    def test_a_row_without_tokens_gets_no_score(self):
        rewards = token_rewards(grid([7.0, 8.0]), grid([[1.0], [1.0]]), torch.tensor([[False], [True]]), 0.5)
        assert_close(rewards, [[0.0], [7.5]])

    def test_junk_under_the_mask(self):
        kl = torch.where(self.MASK, 1.0, math.nan)
        expected = [[-0.5, -0.5, 0.5], [1.5, 0.0, 0.0], [-0.5, 2.5, 0.0]]
        assert_close(token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, self.MASK, 0.5), expected)

    def test_coefficient_may_be_a_tensor(self):
        rewards = token_rewards(grid([1.0]), grid([[2.0]]), torch.tensor([[True]]), torch.tensor(0.25))
        assert_close(rewards, [[0.5]])

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(case=reference.ragged(20.0, 20.0, min_length=0), kl_coef=st.floats(0, 2))
    def test_second_implementation(self, dtype, case, kl_coef):
        mask, (kl, scores) = case
        scores = [row[0] for row in scores]
        rewards = token_rewards(grid(scores, dtype), grid(kl, dtype), torch.tensor(mask), kl_coef)
        assert rewards.dtype is dtype
        assert_close(rewards, reference.token_rewards(scores, kl, mask, kl_coef))

    def test_wrong_shapes(self):
        with pytest.raises(ValueError, match=r"scores has shape \[2, 1\]; expected one per response, \[2\]"):
            token_rewards(torch.zeros(2, 1), torch.zeros(2, 3), self.MASK[:2], 0.1)
        with pytest.raises(ValueError, match="kl has shape"):
            token_rewards(torch.zeros(3), torch.zeros(3, 1), self.MASK, 0.1)


class TestGAE:
    REWARDS = grid([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    VALUES = grid([[0.5, 1.5, 2.5], [1.0, 0.0, 0.0]])
    MASK = torch.tensor([[True, True, True], [True, False, False]])

    def test_by_hand(self):
        # gamma 0.5, lam 0.8 (product 0.4)
        # deltas: 1 + 0.75 - 0.5 = 1.25; 2 + 1.25 - 1.5 = 1.75; 3 - 2.5 = 0.5; 4 - 1 = 3
        advantages, returns = gae(self.REWARDS, self.VALUES, self.MASK, gamma=0.5, lam=0.8)
        # A: 0.5; 1.75 + 0.2 = 1.95; 1.25 + 0.78 = 2.03
        assert_close(advantages, [[2.03, 1.95, 0.5], [3.0, 0.0, 0.0]])
        assert_close(returns, [[2.53, 3.45, 3.0], [4.0, 0.0, 0.0]])

    def test_defaults_are_gamma_1_and_lam_095(self):
        # deltas 2, 3, 0.5: A = 0.5; 3 + 0.475 = 3.475; 2 + 3.30125 = 5.30125
        advantages, _ = gae(self.REWARDS, self.VALUES, self.MASK)
        assert_close(advantages, [[5.30125, 3.475, 0.5], [3.0, 0.0, 0.0]])

    def test_lam_1_is_the_monte_carlo_return(self):
        advantages, returns = gae(self.REWARDS, self.VALUES, self.MASK, gamma=1.0, lam=1.0)
        assert_close(returns, [[6.0, 5.0, 3.0], [4.0, 0.0, 0.0]])
        assert_close(advantages, [[5.5, 3.5, 0.5], [3.0, 0.0, 0.0]])

    def test_lam_0_is_the_td_error(self):
        advantages, returns = gae(self.REWARDS, self.VALUES, self.MASK, gamma=1.0, lam=0.0)
        assert_close(advantages, [[2.0, 3.0, 0.5], [3.0, 0.0, 0.0]])
        assert_close(returns, [[2.5, 4.5, 3.0], [4.0, 0.0, 0.0]])

    def test_a_perfect_critic_leaves_no_advantage(self):
        rewards, values = grid([[1.0, 2.0, 3.0]]), grid([[6.0, 5.0, 3.0]])
        advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))
        assert_close(advantages, [[0.0, 0.0, 0.0]])
        assert_close(returns, [[6.0, 5.0, 3.0]])

    @pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
    def test_padding_is_ignored(self, junk):
        # The value right after the last token is the one that leaks in other code.
        rewards, values = (torch.where(self.MASK, x, junk) for x in (self.REWARDS, self.VALUES))
        for dirty, clean in zip(
            gae(rewards, values, self.MASK), gae(self.REWARDS, self.VALUES, self.MASK), strict=True
        ):
            assert_close(dirty, clean)

    def test_an_empty_row_is_zero(self):
        mask = torch.tensor([[False, False, False], [True, True, False]])
        advantages, returns = gae(self.REWARDS, self.VALUES + 1, mask, gamma=1.0, lam=1.0)
        assert_close(advantages, [[0.0, 0.0, 0.0], [2.0, -1.0, 0.0]])
        assert_close(returns, [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(case=reference.ragged(5.0, 5.0, min_length=0), gamma=st.floats(0, 1), lam=st.floats(0, 1))
    def test_second_implementation(self, dtype, case, gamma, lam):
        mask, (rewards, values) = case
        actual = gae(grid(rewards, dtype), grid(values, dtype), torch.tensor(mask), gamma, lam)
        expected = reference.gae(rewards, values, mask, gamma, lam)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype is dtype
            # sums of up to 7 terms of size 5: absolute error counts
            assert_close(a, e, atol=1e-11 if dtype is F64 else 2e-5)

    @given(reference.ragged(5.0, 5.0), st.integers(1, 4))
    def test_amount_of_padding_changes_nothing(self, case, extra):
        mask, (rewards, values) = (torch.tensor(case[0]), [grid(x) for x in case[1]])
        wide = [torch.nn.functional.pad(x, (0, extra), value=3.0) for x in (rewards, values)]
        wide_mask = torch.nn.functional.pad(mask, (0, extra), value=False)
        for narrow, padded in zip(gae(rewards, values, mask), gae(*wide, wide_mask), strict=True):
            assert torch.equal(torch.nn.functional.pad(narrow, (0, extra)), padded)

    def test_left_padding_and_holes_are_refused(self):
        for mask in ([[False, True, True]], [[True, False, True]]):
            with pytest.raises(ValueError, match=r"^mask has padding .* right-pad the responses$"):
                gae(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor(mask))

    def test_wrong_shapes(self):
        with pytest.raises(ValueError, match="values has shape"):
            gae(self.REWARDS, self.VALUES[:, :1], self.MASK)
        with pytest.raises(ValueError, match="rewards has shape"):
            gae(self.REWARDS[:1], self.VALUES, self.MASK)
        with pytest.raises(ValueError, match="bool mask"):
            gae(self.REWARDS, self.VALUES, self.MASK.long())
