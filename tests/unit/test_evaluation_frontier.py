"""Best-of-n and over-optimisation: against enumeration of subsets, and with typed numbers."""

import itertools
import math

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.evaluation import frontier, frontier_report
from tests.tolerances import assert_close


def by_enumeration(chosen_by, measured, n):
    """Mean over all subsets of n samples of the measured score of the best; the best of equals counts as their mean."""
    means = []
    for subset in itertools.combinations(range(len(chosen_by)), n):
        top = max(chosen_by[index] for index in subset)
        means.append(np.mean([measured[index] for index in subset if chosen_by[index] == top]))
    return np.mean(means)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    random = np.random.default_rng(n)
    chosen_by, measured = random.normal(size=(4, 6)), random.normal(size=(4, 6))
    expected = [by_enumeration(a, b, n) for a, b in zip(chosen_by, measured, strict=True)]
    assert_close(frontier.best_of_n(chosen_by, measured, n), expected, atol=1e-12)


def test_typed_expectations():
    # The best of two out of 1, 2, 3: (2 + 3 + 3) / 3. With two equal ones on top, either is taken.
    assert frontier.best_of_n([[3.0, 1.0, 2.0]], [[3.0, 1.0, 2.0]], 2)[0] == pytest.approx(8 / 3)
    assert frontier.best_of_n([[1.0, 5.0, 5.0]], [[0.0, 10.0, 20.0]], 3)[0] == pytest.approx(15.0)
    assert frontier.best_of_n([[1.0, 5.0]], [[7.0, 9.0]], 1)[0] == pytest.approx(8.0)


def test_weights_of_64_samples_stay_exact():
    scores = np.arange(64.0)[None]
    # The mean of the largest of n out of 0..N-1 is n (N + 1) / (n + 1) - 1.
    for n in (1, 2, 16, 63, 64):
        assert_close(frontier.best_of_n(scores, scores, n)[0], n * 65 / (n + 1) - 1, atol=1e-10)


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_kl_bound(n, kl):
    assert frontier.best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)


def test_ladder():
    assert frontier.ladder(1) == [1]
    assert frontier.ladder(16) == [1, 2, 4, 8, 16]
    assert frontier.ladder(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize(("n", "seen"), [(0, "n is 0"), (4, "take 1 to 3")])
def test_n_out_of_range(n, seen):
    with pytest.raises(UserError, match=seen):
        frontier.best_of_n([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], n)


def test_shapes_that_differ():
    with pytest.raises(UserError, match=r"shapes \(1, 2\) and \(2, 1\)"):
        frontier.best_of_n([[1.0, 2.0]], [[1.0], [2.0]], 1)


def points(gold):
    """Steps 10, 20, 30 with a rising reward and the given held-back means, on 40 prompts."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    return [
        frontier.policy_point(step, [kl] * 40, {"reward": noise + kl, "gold": noise + mean}, num_resamples=200, seed=0)
        for step, kl, mean in zip((10, 20, 30), (1.0, 4.0, 9.0), gold, strict=True)
    ]


def base(gold_of_best):
    """Best-of-2 of samples of which the preferred one has `gold_of_best` by the held-back score, the other 0."""
    trained = np.tile([1.0, 0.0], (40, 1))
    return frontier.frontier(trained, {"reward": trained, "gold": trained * gold_of_best}, num_resamples=200, seed=0)


def test_a_policy_that_walked_too_far_is_named():
    found = frontier.findings(base(0.0), points([0.5, 1.0, 0.2]), 30, ["gold"], num_resamples=200)
    assert [(item["kind"], item["score"]) for item in found] == [("over_optimised", "gold")]
    assert "gold of step 20 is 0.800 [0.800, 0.800] above that of the published step 30" in found[0]["text"]
    assert frontier.best_step(points([0.5, 1.0, 0.2]), "gold") == 20
    assert frontier.best_step(points([0.5, 1.0, 0.2]), "reward") == 30


def test_a_policy_below_best_of_n_is_named():
    found = frontier.findings(base(0.9), points([0.1, 0.2, 0.3]), 30, ["gold"], num_resamples=200)
    assert [(item["kind"], item["score"]) for item in found] == [("beaten_by_best_of_n", "gold")]
    assert "best-of-2 of the SFT model" in found[0]["text"] and "0.19 nats instead of 9.00" in found[0]["text"]


def test_a_policy_that_still_gains_is_not():
    assert frontier.findings(base(0.3), points([0.5, 1.0, 1.2]), 30, ["gold"], num_resamples=200) == []


def test_best_of_n_that_pays_more_is_no_reproach():
    rows = [{**row, "kl": math.inf} for row in base(5.0)]
    assert frontier.findings(rows, points([0.1, 0.2, 0.3]), 30, ["gold"], num_resamples=200) == []


def curve_of(gold, unseen=("gold",), gold_of_best=0.0):
    """What the evaluate stage stores of a policy whose held-back score went as `gold` says."""
    rows, steps = base(gold_of_best), points(gold)
    scores = ["reward", "gold"]
    return {
        "prompts": 40, "samples": 2, "scores": scores, "trained": "reward", "unseen": list(unseen), "best_of_n": rows,
        "steps": steps, "published": 30, "best_steps": {name: frontier.best_step(steps, name) for name in scores},
        "findings": frontier.findings(rows, steps, 30, list(unseen), num_resamples=200), "sft_std": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (curve_of([0.5, 1.0, 0.2]), ("fail", "over_optimised")),
        (curve_of([0.1, 0.2, 0.3], gold_of_best=0.9), ("warn", "beaten_by_best_of_n")),
        (curve_of([0.5, 1.0, 1.2]), ("pass", "")),
        (curve_of([0.5, 1.0, 0.2], unseen=()), ("warn", "held-back score")),
        (curve_of([0.5, 1.0, 1.2]) | {"steps": []}, None),
        (None, None),
    ],
)
def test_the_gate_of_the_policy_names_what_it_finds(curve, expected):
    assert frontier_report.outcome(curve) == expected
    if curve and expected:
        said = "\n".join(frontier_report.sentences(curve))
        assert f"Gate of the policy: {expected[0].upper()}." in said
        assert expected[0] == "pass" or f"{expected[0].upper()} {expected[1]}: " in said
