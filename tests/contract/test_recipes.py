"""Every shipped YAML loads, every field is read by some code, and names and defaults are DESIGN.md's."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, create_model

from rlhf import metrics
from rlhf.data import DataRecipe, load_data_recipe
from rlhf.data.filters import NORMALIZERS
from rlhf.data.formats import FormatOptions
from rlhf.data.load import parts_of
from rlhf.errors import UserError
from rlhf.recipe import PPOSection, Recipe, load_recipe
from rlhf.yamlio import read_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
DATA_RECIPES = sorted((ROOT / "data_recipes").glob("*.yaml"))
ACCELERATE = sorted((ROOT / "pipelines" / "accelerate").glob("*.yaml"))


# ------------------------------------------------------------------------------------------------------- shipped files
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_by_name(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.description, "a recipe says what it is for"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_names_data_and_splits_that_exist(path):
    recipe = load_recipe(path.stem)
    used = [(recipe.sft.data, recipe.sft.split), (recipe.sft.data, recipe.sft.eval_split)]
    if recipe.pretrain:
        used += [(name, recipe.pretrain.split) for name in recipe.pretrain.data]
    if recipe.reward:
        used += [(recipe.reward.data, recipe.reward.split), (recipe.reward.data, recipe.reward.eval_split)]
    if recipe.ppo:
        used += [(recipe.ppo.data, recipe.ppo.split), (recipe.ppo.data, recipe.ppo.eval_split)]
    if recipe.evaluate:
        used += [(recipe.evaluate.data or recipe.ppo.data, recipe.evaluate.split)]
        used += [(judge.sentiment, "judge") for judge in recipe.evaluate.judges if judge.sentiment]
        used += [(judge.pairs, judge.split or "train") for judge in recipe.evaluate.judges if judge.pairs]
    for name, split in used:
        for part in parts_of(load_data_recipe(name)):
            assert split is None or split in part.split.names, (part.name, split)


def test_the_recipes_of_the_issue_are_shipped():
    assert {"tiny", "ci"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", DATA_RECIPES, ids=lambda path: path.stem)
def test_shipped_data_recipe_loads(path):
    recipe = load_data_recipe(path.stem)
    assert recipe.name == path.stem
    assert all(part.licence and part.homepage for part in parts_of(recipe))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_shipped_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED", "MULTI_CPU", "NO"), config.distributed_type
    unknown = set(read_yaml(path)) - {field.name for field in dataclasses.fields(config)}
    assert not unknown


def test_packaged_data_covers_every_yaml():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for package in ("pipelines.recipes", "pipelines.accelerate", "data_recipes"):
        assert re.search(rf'"?{re.escape(package)}"? = \["\*\.yaml"\]', text), package


# ------------------------------------------------------------------------------------------------ every field is read
def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """`model` and every model that its fields hold."""
    found, queue = [], [model]
    while queue:
        current = queue.pop()
        if current in found:
            continue
        found.append(current)
        for info in current.model_fields.values():
            queue += sorted(_models(info.annotation), key=lambda model: model.__name__)
    return found


def _models(annotation: object) -> set[type]:
    parts = {annotation} | {model for arg in getattr(annotation, "__args__", ()) for model in _models(arg)}
    return {part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)}


def names_read(sources: dict[str, str]) -> set[str]:
    """Attribute names that code loads, and strings given to getattr. Validators only check: they use nothing."""
    found = set()
    for source in sources.values():
        tree = ast.parse(source)
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and _is_validator(n)]
        skipped = {id(inner) for check in checks for inner in ast.walk(check)}
        loops = {  # for key in ("a", "b"): ... getattr(config, key)
            node.target.id: {e.value for e in node.iter.elts if isinstance(e, ast.Constant)}
            for node in ast.walk(tree)
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and isinstance(node.target, ast.Name)
        }
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                found |= _getattr_names(node.args[1], loops)
    return found


def _is_validator(node: ast.FunctionDef) -> bool:
    return any("validator" in ast.dump(decorator) for decorator in node.decorator_list)


def _getattr_names(argument: ast.expr, loops: dict[str, set[str]]) -> set[str]:
    if isinstance(argument, ast.Constant):
        return {argument.value}
    if isinstance(argument, ast.Name):
        return loops.get(argument.id, set())
    if isinstance(argument, ast.JoinedStr):  # f"{role}_token" in a loop over roles
        texts = {""}
        for part in argument.values:
            values = {part.value} if isinstance(part, ast.Constant) else loops.get(getattr(part.value, "id", ""), set())
            texts = {text + value for text in texts for value in values}
        return texts
    return set()


def unread_fields(model: type[BaseModel], sources: dict[str, str]) -> list[str]:
    read = names_read(sources)
    return [f"{m.__name__}.{name}" for m in sections(model) for name in m.model_fields if name not in read]


def library_sources() -> dict[str, str]:
    files = [*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    return {str(path): path.read_text("utf-8") for path in files}


def test_every_recipe_section_is_scanned():
    names = {section.__name__ for section in sections(Recipe)}
    assert names >= {
        *("Recipe", "ModelSection", "PeftSection", "Architecture", "PretrainSection", "SftSection", "RewardSection"),
        *("PPOSection", "RewardSource", "EvaluateSection", "JudgeSource", "HardwareSection", "LoggingSection"),
    }


def test_every_field_is_read_by_some_code():
    documentation = {"Recipe.description"}  # for people
    assert set(unread_fields(Recipe, library_sources())) <= documentation


def test_a_dead_field_is_found():
    with_dead = create_model("PPOSection", __base__=PPOSection, frobnication_rate=(float, 0.5))
    assert unread_fields(with_dead, library_sources()) == ["PPOSection.frobnication_rate"]


def test_a_field_that_only_a_validator_reads_is_dead():
    source = "class S:\n    @model_validator(mode='after')\n    def _check(self):\n        return self.kl_coef\n"
    assert "kl_coef" not in names_read({"recipe": source})
    assert "kl_coef" in names_read({"recipe": "x = config.kl_coef"})
    assert {"bos_token", "eos_token"} <= names_read(
        {"models": "for role in ('bos', 'eos'):\n    getattr(model, f'{role}_token')"}
    )


def test_every_data_recipe_field_is_read_by_some_code():
    options = {field.name for field in dataclasses.fields(FormatOptions)}  # pipeline._options copies these by name
    options |= set(NORMALIZERS)  # pipeline._prepare looks these up by name
    dead = {name.split(".")[1] for name in unread_fields(DataRecipe, library_sources())} - options
    assert dead <= {"licence", "homepage"}


def test_every_field_is_described():
    bare = [
        f"{section.__name__}.{name}"
        for section in sections(Recipe)
        for name, info in section.model_fields.items()
        if not info.description and not _models(info.annotation)
    ]
    assert bare == []


# --------------------------------------------------------------------------------------------------- DESIGN.md, 4 and 5
def words(text: str) -> list[str]:
    return text.split()


DEFAULTS = {
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "kl_target": None,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "missing_eos_penalty": 1.0,
    "missing_eos_mode": "replace",
    "temperature": 0.7,
    "top_p": 1.0,
    "stop_strings": [],
    "learning_rate": 3e-6,
    "adam_eps": 1e-5,
    "target_kl": None,
    "max_kl": None,
    "critic": "separate",
    "critic_init": "reward",
    "critic_warmup_steps": 0,
    "normalize_scores": False,
    "score_clip": None,
    "reward_aggregation": "sum",
    "gradient_checkpointing": False,
}
NAMES = words("""kl_coef kl_estimator kl_target kl_horizon gamma lam cliprange cliprange_value vf_coef num_ppo_epochs
whiten_rewards missing_eos_penalty missing_eos_mode temperature response_length max_grad_norm target_kl max_kl
learning_rate warmup_ratio adam_eps total_episodes top_p stop_strings
critic critic_init critic_warmup_steps normalize_scores score_clip
reward_aggregation checkpoint_every eval_every gradient_checkpointing seed rewards rollout_batch_size mini_batch_size
max_tokens_per_micro_batch""")
SIGNATURES = {
    "rlhf.ppo.masking:masked_mean": ("x", "mask", ("dim", None)),
    "rlhf.ppo.masking:masked_whiten": ("x", "mask", ("shift_mean", True), ("moments", None)),
    "rlhf.ppo.advantages:kl_penalty": ("logprobs", "ref_logprobs", ("estimator", "k1")),
    "rlhf.ppo.advantages:token_rewards": ("scores", "kl", "mask", "kl_coef"),
    "rlhf.ppo.advantages:gae": ("rewards", "values", "mask", ("gamma", 1.0), ("lam", 0.95)),
    "rlhf.ppo.losses:policy_loss": (
        *("new_logprobs", "logprobs", "advantages", "mask", "cliprange"),
        ("denominator", None),
    ),
    "rlhf.ppo.losses:value_loss": (
        *("new_values", "values", "returns", "mask", "cliprange_value"),
        ("denominator", None),
    ),
    "rlhf.reward.losses:pairwise_loss": ("chosen_scores", "rejected_scores", ("margin", None)),
}
METRICS = words("""objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/explained_variance
rollout/response_length rollout/eos_rate rollout/logprob_drift perf/episodes_per_second perf/generate_seconds
perf/train_seconds perf/peak_memory_gib episode ppo_step optimizer_step""")


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items(), ids=list(DEFAULTS))
def test_ppo_default_is_the_papers(name, value):
    default = getattr(PPOSection(data="prompts"), name)
    assert default == value and type(default) is type(value)


def test_one_mini_batch_by_default():
    section = PPOSection(data="prompts")
    assert section.mini_batch_size == section.rollout_batch_size
    assert [(s.artifact, s.function, s.weight) for s in section.rewards] == [("reward", None, 1.0)]


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameter_exists(name):
    assert name in PPOSection.model_fields


@pytest.mark.parametrize("target", SIGNATURES)
def test_public_function_has_its_signature(target):
    module, name = target.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    seen = tuple(p.name if p.default is p.empty else (p.name, p.default) for p in parameters)
    assert seen == SIGNATURES[target]


@pytest.mark.parametrize("key", METRICS)
def test_metric_exists(key):
    assert key in metrics.PPO


def test_artifact_and_rollout_have_their_names():
    from rlhf.artifacts import Artifact
    from rlhf.ppo.rollout import Rollout

    assert {"load", "model_dir", "metrics", "verify"} <= set(dir(Artifact))
    assert {field.name for field in dataclasses.fields(Artifact)} >= {"path", "manifest"}
    assert {field.name for field in dataclasses.fields(Rollout)} >= {
        *("prompt_ids", "response_ids", "response_mask", "logprobs", "ref_logprobs", "values", "scores"),
    }


# ------------------------------------------------------------------------------------------------------------ overrides
@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("ppo.kl_coef=0.1", lambda r: r.ppo.kl_coef, 0.1),
        ("ppo.seed=1", lambda r: (r.stage_seed("ppo"), r.stage_seed("sft")), (1, 0)),
        ("sft.trainer.learning_rate=1e-4", lambda r: r.sft.trainer["learning_rate"], 0.0001),
        ("sft.trainer.new_key=1", lambda r: (r.sft.trainer["new_key"], "learning_rate" in r.sft.trainer), (1, True)),
        ("evaluate.judges.1.name=mood", lambda r: [j.name for j in r.evaluate.judges], ["judge", "mood"]),
        ("pretrain.data.0=movie_reviews_imdb_text", lambda r: r.pretrain.data, ["movie_reviews_imdb_text"]),
        ("ppo.missing_eos_penalty=null", lambda r: r.ppo.missing_eos_penalty, None),
        ("ppo.max_grad_norm=", lambda r: r.ppo.max_grad_norm, None),
        ("evaluate=null", lambda r: r.evaluate, None),
        ("logging.report_to=[]", lambda r: r.logging.report_to, []),
        ("peft.r=4", lambda r: (r.peft.r, r.peft.lora_alpha), (4, 32)),
        (
            'ppo.rewards=[{function: "a.b:c", weight: 2}]',
            lambda r: (r.ppo.rewards[0].weight, r.ppo.critic_init),
            (2, "sft"),
        ),
        ("description=a=b", lambda r: r.description, "a=b"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_override(override, read, expected):
    assert read(load_recipe("ci", [override])) == expected


def test_overrides_apply_in_order_and_leave_the_rest():
    plain, changed = load_recipe("ci"), load_recipe("ci", ["ppo.kl_coef=0.1", "ppo.kl_coef=0.3"])
    assert (plain.ppo.kl_coef, changed.ppo.kl_coef) == (0.05, 0.3)
    assert plain.model_dump(exclude={"ppo": {"kl_coef"}}) == changed.model_dump(exclude={"ppo": {"kl_coef"}})


def test_resolved_recipe_loads_back_to_itself(tmp_path):
    recipe = load_recipe("tiny")
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_not_a_number_is_refused():
    for value in (".nan", ".inf"):
        with pytest.raises(UserError, match="finite"):
            load_recipe("ci", [f"ppo.rewards=[{{artifact: reward, weight: {value}}}]"])
