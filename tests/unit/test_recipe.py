"""The typed recipe: strict, ranged, frozen; overrides and names resolve as written."""

import pytest
from pydantic import ValidationError

from rlhf.errors import UserError
from rlhf.recipe import (
    Architecture,
    JudgeSource,
    PeftSection,
    PPOSection,
    Recipe,
    RewardSource,
    apply_override,
    find_recipe,
    load_recipe,
    recipe_names,
)

SMALL = {"name": "x", "model": {"base": "gpt2"}, "sft": {"data": "a"}}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(SMALL | changes)


def test_sections_are_strict_and_frozen():
    with pytest.raises(ValidationError, match="Extra inputs"):
        PPOSection(data="p", kl_coeff=0.1)
    for bad in ({"num_ppo_epochs": "4"}, {"num_ppo_epochs": 4.0}, {"whiten_rewards": 1}, {"kl_coef": True}):
        with pytest.raises(ValidationError, match="Input should be a valid"):
            PPOSection(data="p", **bad)
    section = PPOSection(data="p", kl_coef=1)  # a whole number is a float
    with pytest.raises(ValidationError, match="frozen"):
        section.kl_coef = 0.2


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("gamma", [0.001, 1], [0, 1.001]),
        ("lam", [0, 1], [-0.001, 1.001]),
        ("kl_coef", [0], [-0.1]),
        ("temperature", [0.01, 2.0], [0, -1.0]),
        ("top_p", [0.01, 1], [0, 1.01]),
        ("learning_rate", [1e-9], [0, -1e-6]),
        ("warmup_ratio", [0, 0.99], [1, -0.1]),
        ("cliprange", [0.01], [0]),
        ("cliprange_value", [0.01, None], [0]),
        ("max_grad_norm", [0.5, None], [0]),
        ("missing_eos_penalty", [0.5, None], [0, -1]),
        ("score_clip", [1, None], [0]),
        ("kl_target", [6, None], [0]),
        ("target_kl", [0.1, None], [0]),
        ("max_kl", [25, None], [0]),
        ("vf_coef", [0], [-0.1]),
        ("num_ppo_epochs", [1], [0]),
        ("response_length", [1], [0]),
        ("critic_warmup_steps", [0], [-1]),
        ("eval_every", [1, None], [0]),
        ("checkpoint_every", [1, None], [0]),
        ("seed", [0, None], [-1]),
        ("kl_estimator", ["k1", "k2", "k3"], ["k4"]),
        ("missing_eos_mode", ["replace", "subtract"], ["add"]),
        ("critic", ["separate", "shared"], ["both"]),
        ("critic_init", ["reward", "sft"], ["random"]),
        ("reward_aggregation", ["sum", "mean", "min"], ["max"]),
    ],
)
def test_ranges(field, inside, outside):
    for value in inside:
        assert getattr(PPOSection(data="p", **{field: value}), field) == value
    for value in [*outside, *([float("nan"), float("inf")] if isinstance(inside[0], float) else [])]:
        with pytest.raises(ValidationError):
            PPOSection(data="p", **{field: value})


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"rollout_batch_size": 4, "mini_batch_size": 8, "total_episodes": 8}, "mini_batch_size 8 is above"),
        ({"rollout_batch_size": 8, "mini_batch_size": 3}, "does not divide by mini_batch_size 3"),
        ({"total_episodes": 63}, "total_episodes 63 is below rollout_batch_size 64"),
    ],
)
def test_sizes_that_do_not_fit(sizes, says):
    with pytest.raises(ValidationError, match=says):
        PPOSection(data="p", **sizes)


@pytest.mark.parametrize(("episodes", "steps"), [(64, 1), (127, 1), (128, 2), (10_000, 156)])
def test_a_last_partial_rollout_is_not_run(episodes, steps):
    assert PPOSection(data="p", total_episodes=episodes).total_steps == steps


def test_reward_source_is_one_thing():
    assert RewardSource(artifact="reward").weight == 1.0
    for bad in ({}, {"artifact": "a", "function": "b:c"}, {"function": "b.c"}):
        with pytest.raises(ValidationError):
            RewardSource(**bad)


def test_critic_starts_from_sft_where_there_is_no_reward_model():
    rules = [{"function": "a:b"}]
    assert PPOSection(data="p", rewards=rules).critic_init == "sft"
    assert PPOSection(data="p", rewards=[*rules, {"artifact": "reward"}]).critic_init == "reward"
    assert PPOSection(data="p").critic_init == "reward"
    with pytest.raises(ValidationError, match="critic_init 'reward' needs a reward artifact"):
        PPOSection(data="p", rewards=rules, critic_init="reward")


def test_judge_is_one_thing():
    assert JudgeSource(vader=True).name == "judge"
    for bad in ({}, {"vader": True, "sentiment": "x"}, {"function": "a:b", "sentiment": "x"}):
        with pytest.raises(ValidationError, match="exactly one"):
            JudgeSource(**bad)
    assert JudgeSource(pairs="x", split="half_b").name == "judge"
    with pytest.raises(ValidationError, match="needs `pairs`"):
        JudgeSource(vader=True, split="half_b")


def test_heads_divide_the_width():
    assert Architecture(n_embd=12, n_head=3).n_head == 3
    with pytest.raises(ValidationError, match="n_embd 12 does not divide by n_head 5"):
        Architecture(n_embd=12, n_head=5)


def test_base_or_architecture():
    scratch = {"data": ["a"], "architecture": {}}
    assert recipe(model={}, pretrain=scratch).model.base is None
    assert recipe(pretrain={"data": ["a"]}).pretrain.architecture is None  # continued pre-training
    for bad in ({"model": {}}, {"pretrain": scratch}, {"model": {}, "pretrain": {"data": ["a"]}}):
        with pytest.raises(ValidationError, match="exactly one of"):
            recipe(**bad)


def test_evaluate_needs_ppo():
    assert recipe(ppo={"data": "p"}, evaluate={}).evaluate.prompts == 256
    with pytest.raises(ValidationError, match="add a `ppo` section"):
        recipe(evaluate={})


def test_seeds_and_sections():
    made = recipe(seed=5, ppo={"data": "p", "seed": 0})
    assert (made.stage_seed("sft"), made.stage_seed("ppo")) == (5, 0)
    assert made.section("ppo").data == "p"
    with pytest.raises(UserError, match="no section `reward`"):
        made.section("reward")


def test_peft_by_stage():
    assert not recipe().uses_peft("sft")
    made = recipe(peft={"stages": ["reward", "ppo"]})
    assert [made.uses_peft(stage) for stage in ("pretrain", "sft", "reward", "ppo", "evaluate")] == [
        *(False, False, True, True, False),
    ]
    assert PeftSection().stages == ["sft", "reward", "ppo"]
    with pytest.raises(ValidationError):
        PeftSection(stages=["pretrain"])


# -------------------------------------------------------------------------------------------------- files and overrides
def test_names_and_paths(tmp_path, monkeypatch):
    assert {"ci", "tiny"} <= set(recipe_names())
    assert find_recipe("tiny").name == "tiny.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("model: {base: gpt2}\nsft: {data: a}\n")
    assert load_recipe("tiny.yaml").name == "tiny"  # a path, not the shipped one
    assert load_recipe("tiny").model.base is None
    for wrong, says in (("tinny", "did you mean 'tiny'"), ("zzz", "shipped are"), ("a/b", "no such file")):
        with pytest.raises(UserError, match=says):
            find_recipe(wrong)


def test_name_defaults_to_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {base: gpt2}\nsft: {data: a}\n")
    assert load_recipe(str(path)).name == "mine"
    path.write_text("name: other\nmodel: {base: gpt2}\nsft: {data: a}\n")
    assert load_recipe(str(path)).name == "other"
    assert load_recipe(str(path), ["name=third"]).name == "third"


@pytest.mark.parametrize(
    ("before", "override", "after"),
    [
        ({}, "a.b=1", {"a": {"b": 1}}),
        ({"a": None}, "a.b=1", {"a": {"b": 1}}),
        ({"a": {"b": 1, "c": 2}}, "a.b=x", {"a": {"b": "x", "c": 2}}),
        ({"a": 1}, "a=null", {"a": None}),
        ({"a": 1}, "a=", {"a": None}),
        ({"a": [1, 2]}, "a.1=3", {"a": [1, 3]}),
        ({"a": [{"b": 1}]}, "a.0.b=1e-5", {"a": [{"b": 0.00001}]}),
        ({}, "a=[x, 2]", {"a": ["x", 2]}),
        ({}, "a={b: true}", {"a": {"b": True}}),
        ({}, "a=b=c", {"a": "b=c"}),
        ({}, "a='1'", {"a": "1"}),
    ],
)
def test_override(before, override, after):
    apply_override(before, override)
    assert before == after


@pytest.mark.parametrize(
    ("before", "override", "says"),
    [
        ({}, "a", "section.key=value"),
        ({}, "=1", "section.key=value"),
        ({"a": 1}, "a.b=1", "`a` is 1, which has no keys"),
        ({"a": 1}, "a.b.c=1", "`a` is 1, which has no keys"),
        ({"a": [1]}, "a.1=2", "'1' is no index of a list of 1: use 0..0"),
        ({"a": [1]}, "a.x=2", "'x' is no index"),
        ({"a": [1]}, "a.-1=2", "'-1' is no index"),
        ({"a": [1]}, "a.5.b=2", "'5' is no index"),
        ({}, "a=[1", "not|expected"),
    ],
)
def test_bad_override(before, override, says):
    with pytest.raises(UserError, match=says):
        apply_override(before, override)
