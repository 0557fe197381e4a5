"""Order and batches of preference pairs; the trainer's loss and metrics against TRL's own."""

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlhf.errors import UserError
from rlhf.lengths import LengthSampler
from rlhf.models import new_reward_model, save_model
from rlhf.reward.batches import PairCollator, pair_lengths
from rlhf.reward.train import STAGE, reward_trainer, wants_compile
from rlhf.stage import StageContext
from rlhf.trainers import trainer_args
from tests.builders import build_model, build_recipe, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

LENGTHS = [(7 * row) % 101 + 1 for row in range(300)]
PAIRS = [
    {"chosen_ids": [1, 40, 41, 2], "rejected_ids": [1, 42, 2]},
    {"chosen_ids": [1, 43, 2], "rejected_ids": [1, 44, 45, 46, 47, 2]},
    {"chosen_ids": [1, 50, 51, 2], "rejected_ids": [1, 52, 53, 2]},
]


def in_pass(epoch, seed=0):
    return LengthSampler(LENGTHS, batch=8, seed=seed, epoch=lambda: epoch)


def batches_of(sampler, size):
    order = list(sampler)
    return [order[first : first + size] for first in range(0, len(order), size)]


def test_every_row_once_in_batches_of_like_length_and_the_short_batch_last():
    sampler = in_pass(0)
    order = list(sampler)
    assert sorted(order) == list(range(300)) and len(sampler) == 300
    batches = batches_of(sampler, 8)
    assert [len(batch) for batch in batches] == [8] * 37 + [4]
    spread = [max(LENGTHS[row] for row in batch) - min(LENGTHS[row] for row in batch) for batch in batches]
    assert max(spread) <= 30 and sum(spread) / len(spread) < 6  # of lengths from 1 to 101
    longest = [max(LENGTHS[row] for row in batch) for batch in batches[:-1]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone():
    passes = iter([0, 0, 1, 0])
    sampler = LengthSampler(LENGTHS, batch=8, seed=0, epoch=lambda: next(passes))
    first, again, second, resumed = (list(sampler) for _ in range(4))
    assert again == resumed == first != second
    assert list(in_pass(0, seed=1)) != first
    assert list(in_pass(0)) == first


def test_batches_are_not_the_same_ones_in_each_epoch():
    first, second = ({frozenset(batch) for batch in batches_of(in_pass(epoch), 8)} for epoch in (0, 1))
    assert len(first & second) < 4


def test_a_batch_holds_all_chosen_then_all_rejected():
    batch = PairCollator(pad_id=0)(PAIRS[:2])
    assert batch["input_ids"].tolist() == [
        [1, 40, 41, 2, 0, 0],
        [1, 43, 2, 0, 0, 0],
        [1, 42, 2, 0, 0, 0],
        [1, 44, 45, 46, 47, 2],
    ]
    assert int(batch["tokens"]) == 4 + 3 + 3 + 6
    assert batch["lengths"].tolist() == [4, 3, 3, 6] and set(batch) == {"input_ids", "lengths", "tokens"}
    more = PairCollator(pad_id=0)([pair | {"prompt_length": n, "margin": 0.5} for n, pair in enumerate(PAIRS, start=1)])
    assert more["prompt_length"].tolist() == [1, 2, 3] and more["margin"].tolist() == [0.5] * 3
    assert pair_lengths(PAIRS) == [4, 6, 4]


def both(tmp_path, **options):
    """Our trainer and TRL's on the same weights and pairs, and what each makes of one batch."""
    tokenizer = build_tokenizer()
    save_model(lively(build_model(tokenizer, n_layer=2)), tokenizer, tmp_path / "sft")
    ctx = StageContext(STAGE, build_recipe(tmp_path), tmp_path, "toy")
    ctx.dir.mkdir(parents=True)
    pairs = Dataset.from_list(PAIRS)
    args = trainer_args(RewardConfig, options, ctx, max_length=None)
    ours = reward_trainer(ctx, new_reward_model(tmp_path / "sft", 0), args, tokenizer, pairs, pairs)
    args = trainer_args(RewardConfig, options, ctx, max_length=None)
    theirs = RewardTrainer(
        new_reward_model(tmp_path / "sft", 0), args=args, train_dataset=pairs, processing_class=tokenizer
    )
    return ours, theirs


@pytest.mark.parametrize(("centre", "as_with_graphs"), [(None, False), (0.1, False), (0.1, True)])
def test_loss_gradient_and_metrics_are_those_of_trl(tmp_path, centre, as_with_graphs):
    found = []
    ours, theirs = both(tmp_path, center_rewards_coefficient=centre)
    if as_with_graphs:  # the same path; without a pool nothing is recorded
        ours.use_graphs(None)
        ours.model.zero_grad()
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert trainer is theirs or batch["input_ids"].shape[1] == (32 if as_with_graphs else 6)
        loss = trainer.training_step(trainer.model, batch)
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        logged = {}
        trainer.callback_handler.on_log = lambda args, state, control, logs, kept=logged: kept.update(logs)
        trainer.log({})
        found.append((loss.detach(), gradients, logged))
    ours, theirs = found
    assert_close(ours[0], theirs[0], atol=1e-6)
    assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert float(ours[1].abs().max()) > 1e-3
    assert set(ours[2]) == set(theirs[2])
    assert set(ours[2]) >= {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"}
    assert_close(list(ours[2].values()), [theirs[2][key] for key in ours[2]], rtol=1e-4, atol=1e-5)
    assert ours[2]["num_tokens"] == 24 and 0 <= ours[2]["accuracy"] <= 1


def test_compiling_pays_from_a_thousand_steps_on(tmp_path):
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps, world_size = 8, 1, 1
        max_steps, num_train_epochs, device = -1, 2, torch.device("cuda")

    recipe = build_recipe(tmp_path)
    assert wants_compile(recipe, 4000, Args)
    assert not wants_compile(recipe, 3999, Args)
    Args.device = torch.device("cpu")
    assert not wants_compile(recipe, 4000, Args)
    on = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"compile": "on"})})
    assert wants_compile(on, 10, Args)


@pytest.mark.parametrize(
    ("head", "compiled", "blamed"),
    [(torch.nn.Identity(), False, "reward.lm_coef"), (None, True, "trainer.torch_compile")],
)
def test_what_a_graph_cannot_hold_is_said_where_it_is_asked_for(tmp_path, monkeypatch, head, compiled, blamed):
    ours, _ = both(tmp_path)
    ours.objective.head, ours.args.torch_compile = head, compiled
    monkeypatch.setattr("rlhf.trainers.graph_pool", lambda *args: "a pool")
    with pytest.raises(UserError, match=f"reward.cuda_graphs: on, but {blamed} cannot be part of a graph"):
        ours.graph_steps("reward", "on")
    ours.graph_steps("reward", "auto")
    assert ours.graphed is None
