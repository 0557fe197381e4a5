"""The policies of an evaluation, on toy artifacts: what may be named, common random numbers, KL, best of n."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.artifacts import Artifact
from rlhf.errors import UserError
from rlhf.evaluation import frontier
from rlhf.evaluation.policies import Scores, best_of, load_judge, sampling_settings
from rlhf.evaluation.stage import STAGE
from rlhf.models import load_model
from rlhf.recipe import EvaluateSection, JudgeSource, PolicySource, Recipe
from rlhf.sampling import Samples
from rlhf.stage import run_stage
from tests.builders import build_model, build_reward_artifact, build_sft_artifact, build_tokenizer, toy_recipe
from tests.ppo_toys import build_artifacts, lively, rows_of, toy_context, trainer_of


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Artifacts sft and reward, and beside them a model of another tokenizer."""
    root = tmp_path_factory.mktemp("artifacts")
    tokenizer = build_tokenizer()
    build_sft_artifact(root, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    build_reward_artifact(root, mean=0.1, std=0.5)
    other = build_tokenizer(texts=("quite another film of other words",), vocab_size=300)
    lively(build_model(other, seed=3)).save_pretrained(root / "other")
    other.save_pretrained(root / "other")
    return root


def evaluated(root: Path, run: str = "toy", **section) -> Artifact:
    recipe = toy_recipe(root, evaluate=section)
    return run_stage(STAGE, Recipe.model_validate(recipe), root, run, force=True)


def test_policies_of_every_kind(root):
    policies = [
        {"artifact": "sft"},
        {"artifact": "sft", "best_of": 3},
        {"model": str(root / "toy" / "sft" / "model"), "name": "again"},
        {"model": str(root / "other")},
    ]
    result = evaluated(root, policies=policies, prompts=6).manifest["comparison"]
    metrics = result["metrics"]
    assert result["policies"] == ["sft", "sft_best_of_3", "again", "other"]
    # The same weights and the same random numbers: the same responses.
    assert metrics["again_vs_sft/reward_delta_low"] == metrics["again_vs_sft/reward_delta_high"] == 0.0
    assert metrics["again/kl_mean"] == pytest.approx(0.0, abs=1e-5)
    # The best of three contains the plain sample, so it is never below it.
    assert metrics["sft_best_of_3_vs_sft/reward_delta_low"] >= 0.0 < metrics["sft_best_of_3_vs_sft/reward_delta"]
    assert metrics["sft_best_of_3/kl_mean"] == pytest.approx(math.log(3) - 2 / 3)
    # Another tokenizer: scored by the run's reward model, without a KL.
    assert "other/reward_mean" in metrics and "other/kl_mean" not in metrics
    assert "other_vs_sft/kl_delta" not in metrics and "other_vs_sft/length_delta" in metrics


def test_samples_and_manifest_say_what_those_of_other_stages_do(tmp_path):
    tokenizer = build_tokenizer()
    sft = build_sft_artifact(tmp_path, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    build_reward_artifact(tmp_path)
    build_sft_artifact(tmp_path, stage="ppo", tokenizer=tokenizer, manifest={"metrics": {"published_ppo_step": 7}})
    artifact = evaluated(tmp_path, prompts=4, best_of_n=1)
    rows = [json.loads(line) for line in (artifact.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["policy"], row["step"]) for row in rows] == [("sft", 0)] * 4 + [("ppo", 7)] * 4
    assert all(row["score"] == row["scores"]["reward"] for row in rows)
    assert artifact.manifest["tokenizer"] == sft.manifest["tokenizer"]


def test_sampling_settings_come_from_the_recipe_and_are_recorded(root):
    base = {"policies": [{"artifact": "sft"}, {"artifact": "sft", "name": "sft2"}]}
    plain = evaluated(root, **base).manifest["comparison"]
    assert plain["sampling"] == {
        "temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.0, "response_length": 8, "stop_strings": [],
        "seed": 0, "kl_as_sampled": False,
    }  # fmt: skip
    knobs = {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.5}
    other = evaluated(root, **base, **knobs).manifest["comparison"]
    assert {key: other["sampling"][key] for key in knobs} == knobs
    assert other["metrics"]["sft/reward_mean"] != plain["metrics"]["sft/reward_mean"]


@pytest.mark.parametrize(
    "knobs", [{"top_p": 0.5}, {"repetition_penalty": 1.5}, {"top_p": 0.6, "repetition_penalty": 2}]
)
@torch.no_grad()
def test_kl_is_that_of_the_policy_as_it_was_sampled(root, knobs):
    """With the knobs for the policy, without them for the reference; worked out token by token from the logits."""
    policies = [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}]
    artifact = evaluated(root, policies=policies, **knobs)
    model, known = load_model(root / "toy" / "sft" / "model"), {"top_p": 1.0, "repetition_penalty": 1.0} | knobs
    rows = rows_of(artifact.path / "samples.jsonl")
    for row in rows:
        logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0, len(row["prompt_ids"]) - 1 :]
        kl = 0.0
        for place, token in enumerate(row["response_ids"]):
            seen, own = row["response_ids"][:place], logits[place].clone()
            for other in set(seen):
                own[other] = own[other] / known["repetition_penalty"] if own[other] > 0 else (
                    own[other] * known["repetition_penalty"])  # fmt: skip
            probs = (own / 0.7).softmax(-1)
            likelier = probs[probs > probs[token]].sum()
            assert likelier < known["top_p"]
            order = probs.sort(descending=True).values
            nucleus = order[order.cumsum(0) - order < known["top_p"]].sum()
            kl += float((probs[token] / nucleus).log() - (logits[place] / 0.7).log_softmax(-1)[token])
        bound = math.log(2) - 0.5 if row["policy"] == "sft_best_of_2" else 0.0
        assert row["kl"] == pytest.approx(kl + bound, abs=2e-3)
    paid = [row["kl"] for row in rows if row["policy"] == "sft"]
    assert any(paid) and artifact.manifest["metrics"]["sft/kl_mean"] == pytest.approx(np.mean(paid), abs=1e-4)
    assert min(paid) >= 0 or "repetition_penalty" in knobs  # a nucleus has no more than all of the probability
    assert artifact.manifest["comparison"]["frontier"]["best_of_n"][0]["kl"] != 0
    text = (artifact.path / "report.md").read_text(encoding="utf-8")
    assert "KL is that of the policies with these knobs to the SFT model without them" in text


def test_sections_own_value_wins_over_ppos(tmp_path):
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate={"temperature": 1.1}, ppo={"top_p": 0.9}))
    assert (sampling_settings(recipe)["temperature"], sampling_settings(recipe)["top_p"]) == (1.1, 0.9)


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ({"artifact": "ppo"}, "ppo"),
        ({"artifact": "ppo", "step": 20}, "ppo_step_20"),
        ({"artifact": "../other run/ppo", "best_of": 4}, "ppo_best_of_4"),
        ({"model": "HuggingFaceTB/SmolLM2-135M", "revision": "abc"}, "SmolLM2-135M"),
        ({"model": "my models/of today"}, "of_today"),
        ({"artifact": "sft", "name": "base"}, "base"),
    ],
)
def test_label(source, label):
    assert PolicySource(**source).label == label


@pytest.mark.parametrize(
    ("section", "seen"),
    [
        ({"policies": [{"artifact": "sft"}]}, "at least 2"),
        ({"policies": [{"artifact": "sft"}, {"artifact": "x/sft"}]}, "give each its own"),
        ({"policies": [{"artifact": "sft"}, {}]}, "exactly one of"),
        ({"policies": [{"artifact": "sft"}, {"artifact": "ppo", "model": "m"}]}, "exactly one of"),
        ({"policies": [{"artifact": "sft"}, {"model": "m", "step": 3}]}, "needs an `artifact`"),
        ({"policies": [{"artifact": "sft"}, {"artifact": "ppo", "revision": "a"}]}, "needs a `model`"),
        ({"policies": [{"artifact": "sft"}, {"artifact": "ppo", "name": "a/b"}]}, "pattern"),
    ],
)
def test_bad_policies_are_refused_before_anything_loads(section, seen):
    with pytest.raises(ValidationError, match=seen):
        EvaluateSection(**section)


@pytest.mark.parametrize(
    ("policy", "seen"),
    [
        ({"artifact": "reward", "step": 3}, "kept no policy of step 3"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"artifact": "dpo"}, "needs .*dpo, which is not there"),
    ],
)
def test_a_policy_that_is_not_there_is_one_line(root, policy, seen):
    with pytest.raises(UserError, match=seen) as error:
        evaluated(root, policies=[{"artifact": "sft"}, policy])
    assert "\n" not in str(error.value)


def test_a_judge_may_be_a_reward_model_but_not_any_artifact(root):
    policies = [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}]
    judges = [{"name": "held_back", "artifact": str(root / "toy" / "reward")}]
    judges += [{"name": "judge", "function": "tests.ppo_toys:share_of_e"}]
    artifact = evaluated(root, policies=policies, judges=judges)
    metrics = artifact.manifest["metrics"]
    assert artifact.manifest["comparison"]["headline"] == "held_back"  # the first, whatever the others are called
    assert "by `held_back`" in (artifact.path / "report.md").read_text(encoding="utf-8")
    assert metrics["sft_best_of_2/held_back_mean"] == metrics["sft_best_of_2/reward_mean"]
    with pytest.raises(UserError, match="artifact sft is no reward model"):
        evaluated(root, policies=policies, judges=[{"artifact": "sft"}])


def test_what_ppo_maximised_is_made_of_its_sources_as_in_ppo(tmp_path):
    first, second = "tests.ppo_toys:share_of_e", "tests.ppo_toys:length_in_words"
    ppo = {"rewards": [{"function": first}, {"function": second}]}
    ppo |= {"reward_aggregation": "penalised", "uncertainty_coef": 2.0}
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate={}, ppo=ppo))
    scores = Scores(SimpleNamespace(recipe=recipe, inputs={}), {}, pad_id=0)
    assert scores.maximised == "combined"
    # Mean minus twice the std; of two that is half their distance.
    assert scores.trained({"share_of_e": [1.0, 2.0], "length_in_words": [3.0, 2.0]}) == [0.0, 2.0]


CUT = Samples(["p", "q"], [[1], [1]], ["e", "e"], [[2], [2]], has_eos=[True, False])


@pytest.mark.parametrize(
    ("changes", "paid", "rlhf_reward"),
    [
        ({}, [3.0, -1.0], [2.8, -1.0]),  # the defaults: replace by -1, kl_coef 0.05
        ({"missing_eos_penalty": None}, [3.0, 5.0], [2.8, 5.0]),
        ({"missing_eos_mode": "subtract", "missing_eos_penalty": 2.0, "kl_coef": 0.5}, [3.0, 3.0], [1.0, 3.0]),
        ({"score_clip": 2.0, "missing_eos_penalty": 4.0}, [2.0, -4.0], [1.8, -4.0]),
        ({"kl_target": 6.0}, [3.0, -1.0], None),
        ({"normalize_scores": True, "score_clip": 0.5}, [3.0, 5.0], None),  # their std is not known here
    ],
)
def test_what_a_response_is_worth_to_ppo(tmp_path, changes, paid, rlhf_reward):
    ppo = {"rewards": [{"function": "tests.ppo_toys:share_of_e"}], "kl_coef": 0.05, "missing_eos_penalty": 1.0}
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate={}, ppo=ppo | changes))
    scores, values = Scores(SimpleNamespace(recipe=recipe, inputs={}), {}, pad_id=0), {"share_of_e": [3.0, 5.0]}
    assert scores.paid(values, CUT) == paid
    assert scores.rlhf_reward(values, CUT, [4.0, 0.0]) == pytest.approx(rlhf_reward)
    assert scores.rlhf_reward(values, CUT, None) is None  # of a model with other tokens


@pytest.mark.parametrize(
    ("section", "known"),
    [({}, True), ({"temperature": 0.5}, False), ({"top_p": 0.9}, False), ({"repetition_penalty": 1.2}, False)],
)
def test_what_ppo_maximises_is_not_known_of_responses_sampled_otherwise(tmp_path, section, known):
    ppo = {"rewards": [{"function": "tests.ppo_toys:share_of_e"}]}
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate=section, ppo=ppo))
    scores = Scores(SimpleNamespace(recipe=recipe, inputs={}), {}, pad_id=0)
    assert (scores.rlhf_reward({"share_of_e": [3.0, 5.0]}, CUT, [0.0, 0.0]) is not None) == known


def test_reward_against_kl_ranks_cut_responses_as_ppo_does(root, monkeypatch):
    seen = []

    def spy(trained, columns, *args, **kwargs):
        seen.append((trained, columns["reward"]))
        return frontier.frontier(trained, columns, *args, **kwargs)

    monkeypatch.setattr("rlhf.evaluation.stage.frontier", SimpleNamespace(**vars(frontier) | {"frontier": spy}))
    recipe = toy_recipe(root, evaluate={"best_of_n": 4}, ppo={"missing_eos_penalty": 9.0, "response_length": 3})
    recipe["evaluate"]["policies"] = [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}]
    run_stage(STAGE, Recipe.model_validate(recipe), root, "toy", force=True)
    ((chosen_by, raw),) = seen
    cut = chosen_by == -9.0
    assert cut.sum() > 0 and (raw[cut] > -9.0).all() and (chosen_by[~cut] == raw[~cut]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"missing_eos_penalty": 3.0},
        {"missing_eos_mode": "subtract"},
        {"score_clip": 1.0},
        {"normalize_scores": True},
        {"kl_coef": 0.5},
        {"kl_target": 5.0},
    ],
)
def test_an_evaluation_is_made_again_where_ppo_pays_otherwise(tmp_path, changes):
    plain, other = (Recipe.model_validate(toy_recipe(tmp_path, evaluate={}, ppo=ppo)) for ppo in ({}, changes))
    assert STAGE.also(plain) == STAGE.also(Recipe.model_validate(toy_recipe(tmp_path, evaluate={})))
    assert STAGE.also(plain) != STAGE.also(other)


def test_best_of_n_takes_a_response_that_ends_before_one_that_pays_more_and_is_cut(tmp_path):
    ppo = {"rewards": [{"function": "tests.ppo_toys:share_of_e"}], "missing_eos_penalty": 1.0}
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate={}, ppo=ppo))
    scores = Scores(SimpleNamespace(recipe=recipe, inputs={}), {}, pad_id=0)
    ends = Samples(["p"], [[1]], ["eel"], [[2, 3]], [True], [-1.0])
    cut = Samples(["p"], [[1]], ["eee"], [[2, 2]], [False], [-1.0])
    sampler = SimpleNamespace(prompts=["p"], draw=lambda model, renderer, number: (cut, ends)[number])
    samples, values = best_of(sampler, scores, None, None, 2)
    assert samples == ends and values == {"share_of_e": [pytest.approx(2 / 3)]}


def test_sources_of_one_name_stay_two_with_the_names_of_ppo(tmp_path):
    build_artifacts(tmp_path, lora=False)
    shutil.copytree(tmp_path / "toy" / "reward", tmp_path / "other" / "reward")
    rule = {"function": "tests.ppo_toys:share_of_e"}
    rewards = [{"artifact": "reward"}, {"artifact": str(tmp_path / "other" / "reward"), "weight": 0.0}]
    ctx = toy_context(tmp_path, ppo={"rewards": [*rewards, rule, rule | {"weight": -10.0}]})
    trainer = trainer_of(ctx)
    scores = Scores(ctx, {}, pad_id=0)
    assert [source.name for source in trainer.rewards] == list(scores.sources)
    assert list(scores.weights.items()) == [("reward", 1), ("reward_1", 0), ("share_of_e", 1), ("share_of_e_3", -10)]
    assert scores.trained({"reward": [3.0], "share_of_e": [0.5], "share_of_e_3": [0.5]}) == [-1.5]
    assert scores.unseen == ["reward_1"]


def test_a_judge_fitted_on_pairs_prefers_what_they_prefer(root, tmp_path):
    texts = [("a quiet joy to see", "a dull and loud mess"), ("it sings and moves", "it is dull")] * 6
    rows = [{"prompt": f"p{i}", "chosen": good, "rejected": bad} for i, (good, bad) in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    split = {"by": "row", "fractions": {"half_a": 0.5, "half_b": 0.5}}
    source = {"name": "pairs", "source": {"files": str(tmp_path / "pairs.jsonl")}, "format": "preference", "clean": []}
    (tmp_path / "pairs.yaml").write_text(json.dumps(source | {"split": split}), encoding="utf-8")
    judges = [{"name": "words", "pairs": str(tmp_path / "pairs.yaml"), "split": "half_b"}]
    artifact = evaluated(root, policies=[{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}], judges=judges)
    assert "sft_best_of_2_vs_sft/win_rate_words" in artifact.manifest["metrics"]
    judge = load_judge(SimpleNamespace(rows=lambda *_: rows), JudgeSource(**judges[0]))
    good, bad, empty = judge(["", "", ""], ["what a quiet joy", "a loud mess", ""])
    assert good > 0 > bad and empty == 0


TWO = [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}]


@pytest.fixture
def run_with_rewards(tmp_path) -> Path:
    """`reward`, which PPO maximises, and what else may lie in a run: `reward_b` is a model of its own."""
    tokenizer = build_tokenizer()
    sft = build_sft_artifact(tmp_path, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    build_reward_artifact(tmp_path, mean=0.1, std=0.5)
    run = tmp_path / "toy"
    place = build_reward_artifact(tmp_path, "b", sft=sft, mean=0.3, std=2.0).path
    for name in ("reward_b", "reward_x.old", "reward_y.linking"):
        shutil.copytree(place, run / name)
    shutil.copytree(run / "reward", run / "reward_copy")  # the same weights: nothing new
    other = build_tokenizer(texts=("quite another film of other words",), vocab_size=270)
    alien = build_sft_artifact(tmp_path, "alien", tokenizer=other)
    shutil.copytree(build_reward_artifact(tmp_path, "alien", sft=alien, tokenizer=other).path, run / "reward_alien")
    (run / "reward_broken").mkdir()
    (run / "reward_broken" / "manifest.json").write_text("{", encoding="utf-8")
    return tmp_path


def test_a_reward_model_that_nothing_names_is_a_judge_that_ppo_never_saw(run_with_rewards, caplog):
    artifact = evaluated(run_with_rewards, policies=TWO)
    manifest = artifact.manifest
    assert manifest["comparison"]["scores"] == ["reward", "reward_b"]
    assert manifest["comparison"]["frontier"]["unseen"] == ["reward_b"]
    # (score - 0.3) / 2 where reward has (score - 0.1) / 0.5, of the same weights.
    first, second = (manifest["metrics"][f"sft/{name}_mean"] for name in ("reward", "reward_b"))
    assert second == pytest.approx((0.5 * first + 0.1 - 0.3) / 2)
    # Lineage and fingerprint know it, so evaluate is stale when it changes.
    digest = Artifact.load(run_with_rewards / "toy" / "reward_b").hash
    assert manifest["inputs"]["reward_b"] == manifest["fingerprint"]["inputs"]["reward_b"] == digest
    assert set(manifest["inputs"]) == {"sft", "reward", "reward_b"}
    assert "no score by reward_broken" in caplog.text


def test_one_that_is_named_or_not_wanted_is_scored_once_or_not_at_all(run_with_rewards):
    judges = [{"name": "held_back", "artifact": str(run_with_rewards / "toy" / "reward_b")}]
    assert evaluated(run_with_rewards, policies=TWO, judges=judges).manifest["comparison"]["scores"] == [
        "reward", "held_back"
    ]  # fmt: skip
    alone = evaluated(run_with_rewards, policies=TWO, score_all_rewards=False).manifest
    assert alone["comparison"]["scores"] == ["reward"] and set(alone["inputs"]) == {"sft", "reward"}
    named = [{"name": "reward_b", "function": "tests.ppo_toys:share_of_e"}]
    scores = evaluated(run_with_rewards, policies=TWO, judges=named).manifest["comparison"]["scores"]
    assert scores == ["reward", "reward_b", "reward_b_2"]


def test_a_new_reward_model_makes_a_finished_evaluation_anew(run_with_rewards):
    run, recipe = run_with_rewards / "toy", toy_recipe(run_with_rewards, evaluate={"policies": TWO})
    (run / "reward_b").rename(run_with_rewards / "away")
    results = []
    for _ in range(2):
        results.append(run_stage(STAGE, Recipe.model_validate(recipe), run_with_rewards, "toy"))
    (run_with_rewards / "away").rename(run / "reward_b")
    results.append(run_stage(STAGE, Recipe.model_validate(recipe), run_with_rewards, "toy"))
    finished = [result.manifest["finished"] + str(result.manifest["wall_seconds"]) for result in results]
    assert finished[0] == finished[1] != finished[2]
    assert results[2].manifest["comparison"]["scores"] == ["reward", "reward_b"]
