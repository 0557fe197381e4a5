"""The coefficient of the KL penalty: fixed, or steered towards a target.

A controller holds `kl_coef`, is told the measured KL after each PPO step, and is part of the checkpoint: its state is
plain JSON. Target and horizon are not in the state, they belong to the recipe.
"""

import math
from typing import Protocol

ERROR_CLIP = 0.2  # Ziegler et al. 2019: bounds the reaction to one noisy batch


class KLController(Protocol):
    """What the trainer uses of a controller."""

    kl_coef: float

    def update(self, kl: float, n_episodes: int) -> float: ...

    def state_dict(self) -> dict[str, str | float]: ...

    def load_state_dict(self, state: dict[str, str | float]) -> None: ...


class FixedKL:
    """A coefficient that never changes.

    Args:
        kl_coef: weight of the KL penalty, score units per nat; >= 0.

    Raises:
        ValueError: the coefficient is negative or not finite.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = _checked("kl_coef", kl_coef, zero_allowed=True)

    def update(self, kl: float, n_episodes: int) -> float:
        """Does nothing: there is no target. Returns the coefficient."""
        return self.kl_coef

    def state_dict(self) -> dict[str, str | float]:
        return {"kind": "fixed", "kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, str | float]) -> None:
        """Raises ValueError if the state is that of another kind of controller."""
        self.kl_coef = _restored(state, kind="fixed", zero_allowed=True)


class AdaptiveKL:
    """A coefficient steered so that the measured KL approaches a target (a proportional controller in log space).

        e       = clip((KL - target) / target, -0.2, 0.2)
        kl_coef = kl_coef * (1 + e * n_episodes / horizon)

    Args:
        kl_coef: first coefficient, score units per nat; > 0 (a product never leaves 0).
        kl_target: nats per response (summed over a response, averaged over responses); > 0.
        kl_horizon: episodes after which a KL that stays far too high has raised the coefficient by about 20 %; > 0.

    Raises:
        ValueError: a number that is not finite and positive.

    Source:
        Ziegler et al. 2019, *Fine-Tuning Language Models from Human Preferences*, section 2.2, and its code.
    """

    def __init__(self, kl_coef: float, kl_target: float, kl_horizon: float) -> None:
        self.kl_coef = _checked("kl_coef", kl_coef)
        self.kl_target = _checked("kl_target", kl_target)
        self.kl_horizon = _checked("kl_horizon", kl_horizon)

    def update(self, kl: float, n_episodes: int) -> float:
        """Moves the coefficient after a PPO step and returns it.

        Args:
            kl: measured KL of the step, nats per response, over all ranks (each rank must see the same number).
            n_episodes: global number of episodes of the step.

        Raises:
            ValueError: the KL is NaN (it would poison the coefficient for good), or the step is so long against the
                horizon that the coefficient could reach 0.
        """
        if math.isnan(kl):
            raise ValueError("kl is NaN; leave this batch out before updating the KL coefficient")
        if ERROR_CLIP * n_episodes >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon is {self.kl_horizon:g} episodes but one step has {n_episodes}: a low KL could drive the "
                f"coefficient to 0; raise ppo.kl_horizon to {n_episodes} or more"
            )
        error = min(max((kl - self.kl_target) / self.kl_target, -ERROR_CLIP), ERROR_CLIP)  # e_t, clipped
        self.kl_coef *= 1 + error * n_episodes / self.kl_horizon  # beta_{t+1} = beta_t (1 + K e_t), K = n / horizon
        return self.kl_coef

    def state_dict(self) -> dict[str, str | float]:
        return {"kind": "adaptive", "kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, str | float]) -> None:
        """Raises ValueError if the state is that of another kind of controller."""
        self.kl_coef = _restored(state, kind="adaptive")


def _checked(name: str, value: float, zero_allowed: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name} is {value}; it must be finite and {'not negative' if zero_allowed else 'above 0'}")
    return float(value)


def _restored(state: dict[str, str | float], kind: str, zero_allowed: bool = False) -> float:
    if state.get("kind") != kind:
        raise ValueError(
            f"the checkpoint holds a {state.get('kind')!r} KL controller, the recipe asks for a {kind!r} one; "
            "resume with the recipe that the checkpoint was written by"
        )
    return _checked("kl_coef", float(state["kl_coef"]), zero_allowed)
