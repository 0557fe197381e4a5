"""The KL controllers: hand-typed trajectories, and a state that survives JSON."""

import json
import math

import pytest

from rlhf.ppo.kl_control import AdaptiveKL, FixedKL
from tests.tolerances import assert_close


class TestFixedKL:
    def test_never_moves(self):
        controller = FixedKL(0.05)
        assert controller.update(1000.0, 64) == 0.05
        assert controller.update(math.nan, 64) == 0.05
        assert controller.kl_coef == 0.05

    def test_zero_switches_the_penalty_off(self):
        assert FixedKL(0).kl_coef == 0.0

    def test_state(self):
        restored = FixedKL(0.3)
        restored.load_state_dict(json.loads(json.dumps(FixedKL(0.05).state_dict())))
        assert restored.kl_coef == 0.05
        restored.load_state_dict(FixedKL(0.0).state_dict())
        assert restored.kl_coef == 0.0

    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
    def test_bad_coefficient(self, value):
        with pytest.raises(ValueError, match=f"kl_coef is {value}; it must be finite and not negative"):
            FixedKL(value)


class TestAdaptiveKL:
    @pytest.mark.parametrize(
        ("kl", "expected"),
        [
            (6.0, 0.1),  # on target
            (6.6, 0.1 * 1.01),  # error +0.1, times 1000 / 10000
            (5.4, 0.1 * 0.99),
            (7.2, 0.1 * 1.02),  # +0.2: just at the clip
            (60.0, 0.1 * 1.02),
            (math.inf, 0.1 * 1.02),
            (0.0, 0.1 * 0.98),
            (-5.0, 0.1 * 0.98),  # a measured k1 may be negative
        ],
    )
    def test_by_hand(self, kl, expected):
        controller = AdaptiveKL(kl_coef=0.1, kl_target=6.0, kl_horizon=10_000)
        assert_close(controller.update(kl, n_episodes=1000), expected)
        assert_close(controller.kl_coef, expected)

    def test_updates_compound(self):
        controller = AdaptiveKL(0.5, 10.0, 1000)
        controller.update(12.0, 500)  # 1 + 0.2 * 0.5
        controller.update(9.0, 100)  # 1 - 0.1 * 0.1
        assert_close(controller.kl_coef, 0.5 * 1.1 * 0.99)

    def test_finds_the_coefficient_that_meets_the_target(self):
        controller = AdaptiveKL(1.0, 6.0, 100)
        for _ in range(300):
            controller.update(3.0 / controller.kl_coef, 20)  # a KL that falls as the penalty rises
        assert_close(controller.kl_coef, 0.5, rtol=1e-3)

    def test_resumed_run_continues_the_trace(self):
        whole, first = AdaptiveKL(0.1, 6.0, 10_000), AdaptiveKL(0.1, 6.0, 10_000)
        for kl in (3.1, 7.7):
            whole.update(kl, 64)
            first.update(kl, 64)
        resumed = AdaptiveKL(0.1, 6.0, 10_000)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert resumed.update(6.3, 64) == whole.update(6.3, 64)

    def test_state_of_another_kind_is_refused(self):
        with pytest.raises(ValueError, match=r"resume with the recipe that the checkpoint was written by$"):
            AdaptiveKL(0.1, 6.0, 100).load_state_dict(FixedKL(0.1).state_dict())
        with pytest.raises(ValueError, match="holds a 'adaptive' KL controller, the recipe asks for a 'fixed' one"):
            FixedKL(0.1).load_state_dict(AdaptiveKL(0.1, 6.0, 100).state_dict())
        with pytest.raises(ValueError, match=r"kl_coef is 0\.0; it must be finite and above 0"):
            AdaptiveKL(0.1, 6.0, 100).load_state_dict({"kind": "adaptive", "kl_coef": 0.0})

    def test_nan_does_not_poison_the_coefficient(self):
        controller = AdaptiveKL(0.1, 6.0, 100)
        with pytest.raises(ValueError, match=r"^kl is NaN; leave this batch out before updating the KL coefficient$"):
            controller.update(math.nan, 64)
        assert controller.kl_coef == 0.1

    def test_the_coefficient_cannot_reach_zero(self):
        assert AdaptiveKL(0.1, 6.0, 100).update(0.0, 499) > 0
        with pytest.raises(
            ValueError, match=r"kl_horizon is 100 episodes but one step has 500: .* raise ppo.kl_horizon"
        ):
            AdaptiveKL(0.1, 6.0, 100).update(0.0, 500)

    @pytest.mark.parametrize("name", ["kl_coef", "kl_target", "kl_horizon"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_bad_numbers(self, name, value):
        numbers = {"kl_coef": 0.1, "kl_target": 6.0, "kl_horizon": 10_000.0} | {name: value}
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be finite and above 0"):
            AdaptiveKL(**numbers)
