"""What SFT computes where its steps are CUDA graphs; the graphs themselves are tested on a GPU."""

import pytest
import torch

from rlhf.errors import UserError
from rlhf.sft import token_losses
from tests.sft_toys import sft_trainer
from tests.tolerances import assert_close


def step(trainer, accumulated):
    """Loss, gradients and logged metrics of one batch of four rows, of which TRL counts the tokens."""
    trainer.current_gradient_accumulation_steps = accumulated
    batch = trainer.data_collator(list(trainer.train_dataset))
    items = trainer._get_num_items_in_batch([batch] * accumulated, trainer.args.device)
    loss = trainer.training_step(trainer.model, batch, items)
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    logged = {}
    trainer.callback_handler.on_log = lambda args, state, control, logs: logged.update(logs)
    trainer.log({})
    return batch["input_ids"].shape[1], loss.detach(), gradients, logged


@pytest.mark.parametrize("accumulated", [1, 2])
def test_loss_gradient_and_metrics_are_those_of_trl(tmp_path, accumulated):
    theirs, ours = sft_trainer(tmp_path / "trl"), sft_trainer(tmp_path / "ours")
    ours.use_graphs(None)  # the same path; without a pool nothing is recorded
    ours.model.zero_grad()
    found = step(theirs, accumulated), step(ours, accumulated)
    assert [width for width, *_ in found] == [9, 32]
    (_, loss, gradients, logged), (_, our_loss, our_gradients, our_logged) = found
    assert gradients.abs().max() > 1e-3
    assert_close(our_loss, loss, atol=1e-6)
    assert_close(our_gradients, gradients, atol=1e-6)
    assert set(our_logged) == set(logged) >= {"entropy", "mean_token_accuracy", "num_tokens"}
    for key, value in logged.items():
        assert_close(our_logged[key], value, atol=1e-5)


def test_losses_do_not_depend_on_the_size_of_a_piece(monkeypatch):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(8, 50, bias=False), torch.randint(0, 50, (3, 7))
    labels[0, :4] = labels[2] = -100
    found = []
    for tokens in (100, 2):
        monkeypatch.setattr("rlhf.models.LOGITS_BYTES", 4 * 50 * tokens)
        hidden = torch.linspace(-2, 2, 3 * 7 * 8).view(3, 7, 8).requires_grad_()
        loss, measured = token_losses(head, hidden, labels)
        found.append((loss, measured, torch.autograd.grad(loss, [hidden, head.weight])))
    (loss, measured, gradients), (piecewise, measured_so, gradients_so) = found
    assert measured[2] == 10 and loss > 0
    assert_close(piecewise, loss, rtol=1e-5)
    assert_close(measured_so, measured, rtol=1e-5)
    for ours, theirs in zip(gradients_so, gradients, strict=True):
        assert_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"loss_type": "dft"}, "trainer.loss_type dft"),
        ({"neftune_noise_alpha": 5.0}, "trainer.neftune_noise_alpha"),
        ({"torch_empty_cache_steps": 3}, "trainer.torch_empty_cache_steps"),
    ],
)
def test_what_a_graph_cannot_hold_runs_without(tmp_path, monkeypatch, options, blamed):
    monkeypatch.setattr("rlhf.trainers.graph_pool", lambda *args: "a pool")
    trainer = sft_trainer(tmp_path, **options)
    trainer.graph_steps("sft", "auto")
    assert trainer.graphed is None
    with pytest.raises(UserError, match=rf"sft.cuda_graphs: on, but {blamed} cannot be part of a graph"):
        trainer.graph_steps("sft", "on")


def test_experts_compilation_and_dropout_need_the_trainers_own_step(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.trainers.graph_pool", lambda *args: "a pool")
    trainer = sft_trainer(tmp_path)
    trainer.aux_loss_enabled = True
    with pytest.raises(UserError, match="the auxiliary loss of a mixture of experts cannot be part of a graph"):
        trainer.graph_steps("sft", "on")
    trainer.aux_loss_enabled = False
    trainer.args.torch_compile = True  # not in the constructor: it leaves its mark in the environment
    with pytest.raises(UserError, match=r"trainer.torch_compile cannot be part of a graph"):
        trainer.graph_steps("sft", "on")
    trainer.args.torch_compile = False
    trainer.model.transformer.h[0].mlp.dropout.p = 0.1
    with pytest.raises(UserError, match="dropout cannot be part of a graph"):
        trainer.graph_steps("sft", "on")


def test_tokens_are_counted_one_by_one(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.use_graphs(None)
    trainer._total_train_tokens = 2**25  # above it float32 knows every fourth number
    assert step(trainer, 1)[3]["num_tokens"] == 2**25 + 30


def test_graphs_on_need_a_gpu(tmp_path):
    with pytest.raises(UserError, match=r"sft.cuda_graphs: on needs one process on a GPU"):
        sft_trainer(tmp_path).graph_steps("sft", "on")


def test_rows_are_never_rounded_up_to_more_positions_than_the_model_has(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.trainers.graph_pool", lambda *args: "a pool")
    trainer = sft_trainer(tmp_path, pad_to_multiple_of=48)
    assert trainer.columns() == 96  # of the 32 of its own and those
    trainer.model.config.n_positions = 95
    with pytest.raises(UserError, match="rows of 9 tokens, rounded up to more than the model's 95 positions, cannot"):
        trainer.graph_steps("sft", "on")
    trainer.model.config.n_positions = 96
    trainer.graph_steps("sft", "on")
    assert trainer.graphed is not None and trainer.data_collator.pad_to_multiple_of == 96
    trainer = sft_trainer(tmp_path / "evaluated")
    trainer.model.config.n_positions, trainer.eval_dataset = 96, {"input_ids": [[1] * 97]}  # has the same collator
    with pytest.raises(UserError, match="rows of 97 tokens, rounded up"):
        trainer.graph_steps("sft", "on")
