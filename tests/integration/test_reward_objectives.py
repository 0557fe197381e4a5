"""What each training option of the reward model does to one batch of TRL's trainer."""

from __future__ import annotations

import pytest
import torch
from trl import RewardConfig

from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.models import hidden_states, new_reward_model
from rlhf.reward.train import STAGE, load_pairs, rendered_pairs, reward_trainer
from rlhf.stage import StageContext
from rlhf.trainers import trainer_args
from tests.builders import build_recipe, build_sft_artifact, build_tokenizer
from tests.tolerances import assert_close

ROWS = [
    {"prompt": "the film", "chosen": " is a quiet joy", "rejected": " is loud", "margin": 2},
    {"prompt": "a movie", "chosen": " it sings", "rejected": " a dull and loud mess of it", "margin": 0.5},
    {"prompt": "it", "chosen": " moves", "rejected": " ends too soon", "margin": 1},
]


@pytest.fixture
def trainer(tmp_path):
    """The stage's trainer of the toy model with some options, its batch of all rows, and its scores [6]."""

    def make(**options):
        tokenizer = build_tokenizer()
        recipe = build_recipe(tmp_path, reward=options)
        ctx = StageContext(STAGE, recipe, tmp_path, "toy", inputs={"sft": build_sft_artifact(tmp_path)})
        ctx.dir.mkdir(parents=True)
        section, sft = recipe.reward, ctx.inputs["sft"].model_dir
        train, _ = rendered_pairs(ROWS, Renderer(tokenizer, chat=False), 64, "toy", section.margin_scale)
        args = trainer_args(RewardConfig, section.trainer, ctx, max_length=None)
        made = reward_trainer(ctx, new_reward_model(sft, seed=0), args, tokenizer, train, train)
        batch = next(iter(made.get_train_dataloader()))
        ids = batch["input_ids"]
        batch["attention_mask"] = (torch.arange(ids.shape[1]) < batch["lengths"][:, None]).long()
        scores = made.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        return made, batch, scores

    return make


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(x))


def test_without_options_the_loss_is_trls(trainer):
    made, batch, scores = trainer()
    lead = scores[:3] - scores[3:]
    assert_close(made.compute_loss(made.model, batch), softplus(-lead).mean().item())


@pytest.mark.parametrize("loss", ["smoothed", "robust"])
def test_noisy_labels(trainer, loss):
    made, batch, scores = trainer(loss=loss, flip_rate=0.2, trainer={"center_rewards_coefficient": 0.5})
    lead = scores[:3] - scores[3:]
    right, wrong = softplus(-lead), softplus(lead)
    expected = 0.8 * right + 0.2 * wrong if loss == "smoothed" else (0.8 * right - 0.2 * wrong) / 0.6
    centring = 0.5 * ((scores[:3] + scores[3:]) ** 2).mean()
    assert_close(made.compute_loss(made.model, batch), (expected.mean() + centring).item())


def test_margins_of_the_data(trainer):
    made, batch, scores = trainer(margin_scale=0.5)
    assert sorted(batch["margin"].tolist()) == [0.25, 0.5, 1.0]
    expected = softplus(-(scores[:3] - scores[3:] - batch["margin"])).mean().item()
    assert_close(made.compute_loss(made.model, batch), expected)


def test_length_decorrelation(trainer):
    made, batch, scores = trainer(length_decorrelation=3.0)
    lead, lengths = scores[:3] - scores[3:], batch["attention_mask"].sum(dim=1).float()
    rho = torch.corrcoef(torch.stack([lead, lengths[:3] - lengths[3:]]))[0, 1]
    assert_close(made.compute_loss(made.model, batch), (softplus(-lead).mean() + 3 * rho**2).item(), rtol=1e-4)


def test_language_model_loss_on_the_chosen_responses_alone(trainer):
    made, batch, scores = trainer(lm_coef=0.3)
    ids, mask, prompts = batch["input_ids"][:3], batch["attention_mask"][:3], batch["prompt_length"]
    logits = made.objective.head(hidden_states(made.model.base_model, ids, mask))
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(-1)
    places = torch.arange(1, ids.shape[1])
    counts = mask[:, 1:].bool() & (places >= prompts[:, None])
    assert counts.sum() == sum(len(row["chosen_ids"]) for row in made.train_dataset) - prompts.sum()
    expected = softplus(-(scores[:3] - scores[3:])).mean() - 0.3 * logprobs[counts].mean()
    assert_close(made.compute_loss(made.model, batch), expected.item(), rtol=1e-5)

    assert not any(parameter.requires_grad for parameter in made.objective.head.parameters())


def test_a_pair_without_margin_is_refused():
    rows = [ROWS[0] | {"margin": None}]
    with pytest.raises(UserError, match=r"reward.margin_scale is set, but a pair's margin is None.*keep: \{margin"):
        rendered_pairs(rows, Renderer(build_tokenizer(), chat=False), 64, "reward", margin_scale=1.0)


def loaded(tmp_path, monkeypatch, **section):
    """`load_pairs` of ROWS, for training and held out, with this reward section."""
    recipe = build_recipe(tmp_path, reward=section)
    ctx = StageContext(STAGE, recipe, tmp_path, "toy", inputs={"sft": build_sft_artifact(tmp_path)})
    monkeypatch.setattr(StageContext, "rows", lambda *_, **__: ROWS)
    return load_pairs(ctx, Renderer(build_tokenizer(), chat=False))


def test_truncated_and_mismatched_pairs_are_trained_on_together(tmp_path, monkeypatch):
    (train, rows), (test, _) = loaded(tmp_path, monkeypatch, mismatched=1.0, truncated=1.0)
    assert len(train) == 9 and rows == ROWS and len(test) == 3
    for pair in list(train)[3:6]:
        chosen, cut = pair["chosen_ids"], pair["rejected_ids"]
        assert pair["prompt_length"] < len(cut) < len(chosen) and cut == chosen[: len(cut)]


def test_mismatched_pairs_are_trained_on_and_stay_out_of_the_baselines(tmp_path, monkeypatch):
    (train, rows), (test, _) = loaded(tmp_path, monkeypatch, mismatched=1.0, margin_scale=1.0)
    assert len(train) == 6 and rows == ROWS and len(test) == 3
    own = [list(pair["chosen_ids"]) for pair in train]
    assert own[:3] == [list(ids) for ids in test["chosen_ids"]] and sorted(own[3:]) == sorted(own[:3])
    assert all(list(pair["rejected_ids"]) != list(pair["chosen_ids"]) for pair in train)
    assert sorted(train["margin"][3:]) == [0.5, 1.0, 2.0]
