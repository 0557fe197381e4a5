"""Alerts: signs that a run goes wrong, each with its likely cause and the knob to turn.

A sign is compared with its value at step 1, whose responses are the SFT model's. It is averaged over about five steps
first, so that one odd batch is no alarm. Imports no torch.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from rlhf.recipe import PPOSection

logger = logging.getLogger(__name__)

STEPS = 5  # of the running mean
ENDS = 0.7  # share of the first responses that should end by themselves
NAMES = ("kl", "eos_rate", "entropy", "length", "repetition", "refusals", "judge")
CAUSES = {
    "kl": "the policy runs away from the SFT model: raise ppo.kl_coef, set ppo.kl_target, or lower ppo.learning_rate",
    "eos_rate": "responses no longer end by themselves, the score outweighs the missing-EOS rule: raise "
    "ppo.missing_eos_penalty, use ppo.missing_eos_mode=replace, or raise ppo.kl_coef",
    "entropy": "the policy has become certain and stops exploring: raise ppo.kl_coef, lower ppo.learning_rate or "
    "ppo.num_ppo_epochs",
    "longer": "the reward may pay for length: compare accuracy_length_only in the reward manifest, raise ppo.kl_coef, "
    "or add a function of the length to ppo.rewards",
    "shorter": "each token costs KL and the reward does not pay for it, or it prefers short answers: lower "
    "ppo.kl_coef, compare accuracy_length_only in the reward manifest",
    "repetition": "the score rises while responses become alike, the reward overpays certain phrases: raise "
    "ppo.kl_coef, set ppo.kl_target, read samples.jsonl",
    "refusals": "a refusal may be paid for whatever the prompt: see the answers to other prompts in the reward report, "
    "set reward.mismatched or raise ppo.kl_coef, read samples.jsonl",
    "judge": "the score rises while the judge (a source of weight 0) falls, the policy exploits the reward: raise "
    "ppo.kl_coef, run fewer episodes, or train a better reward model",
}


def signs_of(row: dict[str, float], judges: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The watched numbers of one metrics row; those that are not finite are left out.

    Args:
        row: of metrics.jsonl.
        judges: mean and standard deviation of every source of weight 0, by name.
    """
    signs = {
        "score": row["objective/scores"],
        "eos_rate": row["rollout/eos_rate"],
        "length": row["rollout/response_length"],
        "entropy": row["objective/entropy"] / row["rollout/response_length"],
        "distinct_2": row["rollout/distinct_2"],
        "refusals": row["rollout/refusal_rate"],
    }
    for name, (mean, std) in judges.items():
        signs |= {f"judge/{name}": mean, f"std/{name}": std}
    return {name: value for name, value in signs.items() if math.isfinite(value)}


def warn_cut(eos_rate: float, length: int) -> None:
    """Say so where many responses of the SFT model are cut: PPO is paid for ending them, whatever the reward says."""
    if eos_rate < ENDS:
        logger.warning(
            "only %.0f %% of the SFT model's responses to ppo.data end within ppo.response_length %d: with the "
            "missing-EOS rule PPO gains most by ending sooner, whatever the reward is worth: raise the length, or "
            "train SFT on shorter answers to such prompts",
            100 * eos_rate,
            length,
        )


class Alerts:
    """Watches the rows of a run.

    Args:
        config: the recipe's `ppo` section; thresholds are in `ppo.alerts`.
    """

    def __init__(self, config: PPOSection) -> None:
        self.limits = config.alerts
        self.max_kl = config.alerts.kl if config.alerts.kl is not None else config.max_kl
        self.penalised, self.length = config.missing_eos_penalty is not None, config.response_length
        self.first: dict[str, float] = {}
        self.mean: dict[str, float] = {}
        self.begun: dict[str, int] = {}  # the step at which each kind first fired

    def check(self, row: dict[str, float], judges: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Take in a row; returns `alerts/*`, 1 = fires. Each kind is logged when it begins, once in a run."""
        if not self.first and self.penalised:
            warn_cut(row["rollout/eos_rate"], self.length)
        for name, value in signs_of(row, judges).items():
            self.first.setdefault(name, value)
            mean = self.mean.setdefault(name, value)
            self.mean[name] = mean + (value - mean) / STEPS
        fired = self._fired(row["objective/kl"])
        for name, (what, cause) in fired.items():
            if name not in self.begun:
                self.begun[name] = int(row["ppo_step"])
                logger.warning("alerts/%s at ppo_step %d: %s: %s", name, row["ppo_step"], what, CAUSES[cause])
        return {f"alerts/{name}": int(name in fired) for name in NAMES}

    def stop(self, row: dict[str, float]) -> str:
        """Why the run should end now, by `ppo.alerts.stop`; empty = go on."""
        named = [name for name in self.limits.stop if row[f"alerts/{name}"]]
        return f"alerts/{named[0]} fired, which ppo.alerts.stop names" if named else ""

    def _fired(self, kl: float) -> dict[str, tuple[str, str]]:
        """Name -> (what was seen, key of CAUSES)."""
        limits, fired = self.limits, {}
        if self.max_kl is not None and kl > self.max_kl:
            fired["kl"] = f"objective/kl is {kl:.2f}, the limit {self.max_kl:g} nats per response", "kl"
        for name, limit in (("eos_rate", limits.eos_rate), ("entropy", limits.entropy)):
            if limit is not None and self._share(name) < limit:
                fired[name] = self._moved(name, {"entropy": "nats per token"}.get(name, "")), name
        share = self._share("length")
        if limits.length is not None and not 1 / limits.length <= share <= limits.length:
            fired["length"] = self._moved("length", "tokens"), "longer" if share > 1 else "shorter"
        better = self.mean.get("score", 0) > self.first.get("score", 0)
        if limits.repetition is not None and better and self._share("distinct_2") < limits.repetition:
            fired["repetition"] = self._moved("distinct_2", ""), "repetition"
        if limits.refusals is not None and self._rise("refusals") > limits.refusals:
            fired["refusals"] = self._moved("refusals", "of the responses"), "refusals"
        worse = [name for name in self.mean if name.startswith("judge/") and self._fell(name)]
        if worse and better:
            fired["judge"] = self._moved(worse[0], ""), "judge"
        return fired

    def _share(self, name: str) -> float:
        """Running mean by the value at step 1; 1 where there is nothing to compare."""
        return self.mean[name] / self.first[name] if self.first.get(name) else 1.0

    def _rise(self, name: str) -> float:
        return self.mean.get(name, 0.0) - self.first.get(name, 0.0)

    def _fell(self, name: str) -> bool:
        spread = self.first.get(name.replace("judge/", "std/"), 0.0)
        return self.limits.judge is not None and self.mean[name] < self.first[name] - self.limits.judge * spread

    def _moved(self, name: str, unit: str) -> str:
        return f"{name} was {self.first[name]:.3g} at step 1 and is {self.mean[name]:.3g} {unit}".rstrip()

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"first": self.first, "mean": self.mean, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.first, self.mean, self.begun = state["first"], state["mean"], state["begun"]
