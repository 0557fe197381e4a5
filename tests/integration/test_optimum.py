"""PPO reaches the optimum that can be written down; benchmarks/optimum.py has the maths, docs/ppo.md the table."""

import pytest
import torch

from benchmarks.optimum import Exact, destination, distance, gain, kl, optimum, run
from tests.tolerances import assert_close

KL_COEF = 0.5
SHORT = {
    "kl_coef": KL_COEF,
    "rollout_batch_size": 256,
    "mini_batch_size": 256,
    "total_episodes": 256 * 80,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def reached():
    """All responses to one prompt, after 80 steps."""
    return run("full-shared", SHORT, prompts=["a"])


def test_ppo_reaches_the_optimum(reached):
    best = optimum(reached, KL_COEF)
    assert kl(reached.reference.sum(-1), best) > 1  # there was a way to go
    assert gain(reached, KL_COEF) >= 0.97


def test_the_gain_is_one_minus_a_ratio_of_divergences(reached):
    """J(pi*) - J(pi) = kl_coef KL(pi || pi*) for every pi: the same number by another way."""
    best = optimum(reached, KL_COEF)
    left = kl(reached.logprobs.sum(-1), best) / kl(reached.reference.sum(-1), best)
    assert_close(gain(reached, KL_COEF), 1 - left, atol=1e-4)  # log-probabilities were computed in float32


def test_only_the_expected_update_of_k1_leads_to_the_optimum(reached):
    best = optimum(reached, KL_COEF)
    away = {name: distance(destination(reached, KL_COEF, name, steps=500), best) for name in ("k1", "k2", "k3")}
    assert away["k1"] < 1e-3 and away["k2"] > 0.1 and away["k3"] > 0.1, away


def test_measures_by_hand():
    """Two responses, reference 1/2 each, rewards log 3 and 0, kl_coef 1: pi* is 3/4, 1/4 and J(pi*) = log 2."""
    half = torch.full((1, 2, 1), 0.5, dtype=torch.float64).log()
    certain = torch.tensor([[[1.0], [1e-300]]], dtype=torch.float64).log()
    rewards = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    exact = Exact(certain, half, rewards)
    assert_close(optimum(exact, 1.0).exp(), [[0.75, 0.25]])
    # J(ref) = log(3) / 2 = 0.5493, J(pi*) = 0.6931, J(certain) = log 3 - log 2 = 0.4055: as far below as pi* is above
    assert_close(gain(exact, 1.0), -1.0, atol=1e-9)
    assert_close(distance(certain.sum(-1), optimum(exact, 1.0)), 0.25)
    assert_close(kl(certain.sum(-1), half.sum(-1)), 0.6931471805599453)
