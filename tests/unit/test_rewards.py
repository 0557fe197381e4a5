"""From sources to the score that PPO maximises."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import UserError
from rlhf.ppo.rewards import FunctionScore, ModelScore, RunningMoments, aggregate, shape_scores
from rlhf.recipe import RewardSource, source_names
from tests.tolerances import assert_close
from tests.unit.test_rollout import rank, rollout_of

SCORES = torch.tensor([2.0, -1.0, 0.5])
FINISHED = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [1.0, 1.0, 7.0]),
        ("mean", [0.5, 0.5, 3.5]),
        ("min", [-1.0, -2.0, 1.0]),
        ("penalised", [0.5 - 2 * 1.5, 0.5 - 2 * 2.5, 3.5 - 2 * 2.5]),  # std of the two: half their distance
    ],
)
def test_weighted_aggregation(how, expected):
    first, second = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, -6.0, -12.0])
    assert_close(aggregate([first, second], [2.0, -0.5], how, 2.0), expected)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["reward", "../other/reward", "a.b:rule", "c:rule"], ["reward", "reward_1", "rule", "rule_3"]),
        (["reward_2", "x/reward", "y/reward", "reward"], ["reward_2", "reward", "reward_3", "reward_4"]),
        (["r", "a/r_2", "b/r"], ["r", "r_2", "r_3"]),  # the number of those before it is a name already
    ],
)
def test_every_source_has_its_own_name(given, names):
    kind = {True: "function", False: "artifact"}
    assert source_names([RewardSource(**{kind[":" in text]: text}) for text in given]) == names


@pytest.mark.parametrize(
    ("penalty", "mode", "expected"),
    [(None, "replace", [2.0, -1.0, 0.5]), (1.5, "replace", [2.0, -1.5, 0.5]), (1.5, "subtract", [2.0, -2.5, 0.5])],
)
def test_missing_eos(penalty, mode, expected):
    assert_close(shape_scores(SCORES, FINISHED, None, None, penalty, mode), expected)


def test_clipping_comes_before_the_missing_eos_rule():
    assert_close(shape_scores(SCORES, FINISHED, None, 0.75, 3.0, "replace"), [0.75, -3.0, 0.5])
    assert_close(shape_scores(SCORES, FINISHED, None, 0.75, 3.0, "subtract"), [0.75, -3.75, 0.5])


def test_running_std_divides_before_clipping():
    running = RunningMoments()
    running.update(torch.tensor([1.0, 5.0]))  # std 2
    assert_close(shape_scores(SCORES, FINISHED, running, 0.75, None, "replace"), [0.75, -0.5, 0.25])


def test_running_moments_are_those_of_all_scores():
    running = RunningMoments()
    for part in ([1.0, 2.0, 6.0], [4.0], [-3.0, 2.0]):
        running.update(torch.tensor(part))
    # mean of 1 2 6 4 -3 2 is 2; squared deviations 1 0 16 4 25 0 sum to 46
    assert (running.count, running.mean) == (6, pytest.approx(2.0))
    assert running.var == pytest.approx(46 / 6)
    again = RunningMoments()
    again.load_state_dict(running.state_dict())
    assert again.state_dict() == running.state_dict()


def test_constant_scores_do_not_divide_by_zero():
    running = RunningMoments()
    running.update(torch.full((4,), 3.0))
    assert running.std == 1e-6


def test_model_scores_are_read_at_the_last_response_token_and_normalised():
    rollout = rollout_of([[1, 5], [1, 5, 6], [1]], [2, 3, 6])
    source = ModelScore("rm", 1.0, lambda batch: batch.input_ids.float(), mean=1.0, std=2.0)
    for budget in (1, 100):  # ids of the last response tokens are 11, 12 and 15
        assert source.score(rollout, budget, rank()).tolist() == [5.0, 5.5, 7.0]


def test_a_function_gets_texts_and_the_columns_that_it_names():
    seen = {}

    def rule(prompts, responses, answer):
        seen.update(prompts=prompts, responses=responses, answer=answer)
        return [1, 2.5]

    rollout = SimpleNamespace(
        prompts=["p", "q"],
        responses=["a", "b"],
        columns={"answer": [7, 8], "other": [0, 0]},
        response_mask=torch.ones(2, 1),
    )
    assert FunctionScore("rule", 1.0, rule).score(rollout, 10, rank()).tolist() == [1.0, 2.5]
    assert seen == {"prompts": ["p", "q"], "responses": ["a", "b"], "answer": [7, 8]}


def test_each_rank_scores_its_share():
    rollout = SimpleNamespace(prompts=list("pqr"), responses=list("abc"), columns={}, response_mask=torch.ones(3, 1))
    called = []

    def rule(prompts, responses):
        called.append(responses)
        return [float(ord(text)) for text in responses]

    for index in range(2):
        FunctionScore("rule", 1.0, rule).score(rollout, 10, rank(index, 2))
    assert called == [["a", "b"], ["c", "c"]]


def test_a_function_that_returns_nan_is_refused():
    rollout = SimpleNamespace(prompts=["p"], responses=["a"], columns={}, response_mask=torch.ones(1, 1))
    with pytest.raises(UserError, match="finite"):
        FunctionScore("rule", 1.0, lambda prompts, responses: [float("nan")]).score(rollout, 10, rank())
