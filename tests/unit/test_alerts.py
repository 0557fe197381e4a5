"""Alerts are silent on a healthy run and fire on each kind of collapse, with cause and knob."""

import json
import logging
import math
import re

import pytest

from rlhf.metrics import PPO
from rlhf.ppo.alerts import CAUSES, NAMES, Alerts
from rlhf.recipe import AlertsSection, PPOSection, RewardSource
from rlhf.yamlio import validate

KEYS = (
    *("objective/scores", "objective/kl", "rollout/response_length", "rollout/eos_rate"),
    *("objective/entropy", "rollout/distinct_2"),
)
# Every third step of a run of the recipe `tiny` (seed 0): `python -m pipelines.ppo --recipe tiny`, its metrics.jsonl.
TINY = (
    (-0.0247, 0, 14.2, 1, 51.7, 0.715),
    (0.112, 1.42, 12.2, 1, 44, 0.749),
    (0.61, 2.76, 11, 0.992, 37.4, 0.751),
    (0.888, 4.27, 13.2, 1, 44.4, 0.673),
    (1.29, 4.63, 11.2, 1, 34.5, 0.619),
    (1.46, 5.7, 11.2, 1, 32.3, 0.598),
    (1.75, 6.5, 10.1, 1, 29.5, 0.596),
    (1.96, 8.17, 10.4, 1, 28.4, 0.526),
    (2.15, 9.32, 10.2, 1, 27.4, 0.5),
    (2.09, 8.48, 10.3, 1, 28.5, 0.527),
    (2.15, 8.61, 10.8, 1, 30.3, 0.549),
    (2.41, 9.38, 10.3, 1, 28.4, 0.499),
    (2.11, 8.5, 10.3, 1, 28.9, 0.547),
    (2.25, 9.52, 10.1, 1, 28.4, 0.547),
)
NO_REFUSALS = {"rollout/refusal_rate": 0.0}
HEALTHY = dict(zip(KEYS, TINY[0], strict=True)) | NO_REFUSALS


def config(**changes):
    return PPOSection(data="d", max_kl=None, **changes)


def rows(*values):
    """Rows of metrics.jsonl from tuples in the order of KEYS."""
    return [dict(zip(KEYS, row, strict=True)) | NO_REFUSALS | {"ppo_step": i + 1} for i, row in enumerate(values)]


def after(steps, judges=None, section=None, **changes):
    """The last row's alerts of a run that is healthy at step 1 and has `changes` from then on."""
    alerts = Alerts(section or config())
    healthy = dict.fromkeys(judges or {}, (0.5, 0.2))
    alerts.check(HEALTHY | {"ppo_step": 1}, healthy)
    changed = HEALTHY | {key.replace("__", "/"): value for key, value in changes.items()}
    row = {}
    for step in range(2, steps + 2):
        row = alerts.check(changed | {"ppo_step": step}, judges or {})
    return {name for name in NAMES if row[f"alerts/{name}"]}, alerts


def test_a_healthy_run_raises_no_alert():
    alerts = Alerts(config())
    fired = [alerts.check(row, {}) for row in rows(*TINY)]
    assert all(set(row.values()) == {0} for row in fired) and alerts.begun == {}
    assert set(fired[0]) == {key for key in PPO if key.startswith("alerts/")}


COLLAPSES = [
    ("eos_rate", {"rollout__eos_rate": 0.1}, r"eos_rate was 1 at step 1 .* ppo.missing_eos_penalty"),
    ("entropy", {"objective__entropy": 2.0}, r"entropy was 3.64 at step 1 .* nats per token: .* ppo.kl_coef"),
    ("length", {"rollout__response_length": 60.0, "objective__entropy": 200.0}, r"length was 14.2 .* pay for length"),
    ("length", {"rollout__response_length": 2.0, "objective__entropy": 7.0}, r"length was 14.2 .*: lower ppo.kl_coef"),
    ("refusals", {"rollout__refusal_rate": 0.3}, r"refusals was 0 at step 1 and is 0.2\d+ of .* reward.mismatched"),
    ("repetition", {"objective__scores": 2.0, "rollout__distinct_2": 0.05}, r"distinct_2 was 0.715 .* samples.jsonl"),
]


@pytest.mark.parametrize(("name", "changes", "line"), COLLAPSES)
def test_each_collapse_fires_its_alert_and_names_the_knob(caplog, name, changes, line):
    with caplog.at_level(logging.WARNING):
        assert after(20, **changes)[0] == {name}
    (message,) = [record.getMessage() for record in caplog.records]  # when it begins, not at every step
    assert message.startswith(f"alerts/{name} at ppo_step ") and re.search(line, message), message


@pytest.mark.parametrize(("name", "changes", "line"), COLLAPSES)
def test_one_odd_batch_is_no_alarm(name, changes, line):
    assert after(1, **changes)[0] == set()


@pytest.mark.parametrize(("name", "changes", "line"), COLLAPSES)
def test_null_switches_an_alert_off(name, changes, line):
    assert after(20, section=config(alerts=AlertsSection(**{name: None})), **changes)[0] == set()


def test_the_running_mean_takes_a_fifth_of_each_step():
    # EOS rate 1, then 0: 0.8, 0.64, 0.512, 0.4096 of step 1's; the limit is 0.5
    assert [bool(after(steps, rollout__eos_rate=0.0)[0]) for steps in (3, 4)] == [False, True]


def test_repetition_needs_a_better_score():
    assert after(20, objective__scores=-1.0, rollout__distinct_2=0.05)[0] == set()


def test_kl_fires_at_once_above_its_own_limit_or_max_kl():
    limited = PPOSection(data="d", max_kl=20.0)
    assert after(1, section=limited, objective__kl=20.1)[0] == {"kl"}
    assert after(1, section=limited, objective__kl=19.9)[0] == set()
    own = PPOSection(data="d", max_kl=20.0, alerts=AlertsSection(kl=5.0))
    assert after(1, section=own, objective__kl=5.1)[0] == {"kl"}
    assert after(1, objective__kl=1e6)[0] == set()  # neither is set


@pytest.mark.parametrize(("score", "judge", "fires"), [(2.0, 0.3, True), (2.0, 0.45, False), (-2.0, 0.3, False)])
def test_the_judge_disagrees(caplog, score, judge, fires):
    """It was 0.5 with std 0.2: the limit of half a std is 0.4."""
    fired, _ = after(30, {"nice": (judge, 0.1)}, objective__scores=score)
    assert fired == ({"judge"} if fires else set())
    assert not fires or "judge/nice was 0.5 at step 1 and is 0.3" in caplog.text


def test_stop():
    section = config(alerts=AlertsSection(stop=["length", "eos_rate"]))
    alerts = Alerts(section)
    row = {f"alerts/{name}": 0 for name in NAMES}
    assert alerts.stop(row) == alerts.stop(row | {"alerts/entropy": 1}) == ""
    assert alerts.stop(row | {"alerts/eos_rate": 1}) == "alerts/eos_rate fired, which ppo.alerts.stop names"


def test_numbers_that_are_not_finite_are_passed_over():
    alerts = Alerts(config())
    alerts.check(HEALTHY | {"ppo_step": 1}, {})
    alerts.check(HEALTHY | {"ppo_step": 2, "objective/scores": math.nan, "objective/kl": math.nan}, {})
    assert alerts.mean["score"] == HEALTHY["objective/scores"]


def test_a_resumed_run_goes_on_and_says_nothing_twice(caplog):
    fired, first = after(4, rollout__eos_rate=0.0)
    assert fired == {"eos_rate"} and first.begun == {"eos_rate": 5}
    again = Alerts(config())
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    row = HEALTHY | {"rollout/eos_rate": 0.0, "ppo_step": 6}
    assert again.check(row, {}) == first.check(row, {}) and again.state_dict() == first.state_dict()
    assert caplog.text.count("alerts/eos_rate") == 1


def test_responses_that_are_cut_before_the_first_update_are_said_once(caplog):
    cut = HEALTHY | {"rollout/eos_rate": 0.48, "ppo_step": 1}
    first = Alerts(config(response_length=192))
    first.check(cut, {})
    assert "only 48 % of the SFT model's responses to ppo.data end within ppo.response_length 192" in caplog.text
    again = Alerts(config())
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for alerts in (first, again, Alerts(config(missing_eos_penalty=None))):
        alerts.check(cut | {"ppo_step": 2}, {})
    Alerts(config()).check(HEALTHY | {"rollout/eos_rate": 0.7, "ppo_step": 1}, {})
    assert caplog.text.count("SFT model's responses") == 1


def test_every_alert_has_a_threshold_a_metric_and_a_cause():
    fields = set(AlertsSection.model_fields) - {"stop"}
    assert fields == set(NAMES) == {key.removeprefix("alerts/") for key in PPO if key.startswith("alerts/")}
    assert set(CAUSES) == (set(NAMES) - {"length"}) | {"longer", "shorter"}
    assert all("ppo." in text for text in CAUSES.values())


def test_only_judges_are_nothing_to_maximise():
    judge = {"function": "a:b", "weight": 0.0}
    with pytest.raises(ValueError, match="every weight is 0"):
        validate(PPOSection, {"data": "d", "rewards": [judge]}, "ppo")
    assert PPOSection(data="d", rewards=[RewardSource(artifact="reward"), RewardSource(**judge)]).rewards[1].weight == 0
