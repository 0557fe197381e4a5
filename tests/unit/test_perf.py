"""Operations and padding, against counts by hand."""

from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model

from rlhf.models import ActorCritic
from rlhf.ppo.build import value_head
from rlhf.ppo.packing import Packed, Shapes, Sizes
from rlhf.ppo.perf import FlopCounter, matmul_peak, padding_share
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import toy_trainer


def test_training_operations_by_hand():
    policy = build_model(build_tokenizer(), n_layer=2)
    config = policy.config
    width, vocab = config.hidden_size, config.vocab_size
    # GPT-2 block: qkv 3, attention output 1, feed-forward 4 + 4 times width squared; embeddings are looked up.
    weights = 2 * 12 * width * width
    tokens, response = 7, 3
    forward = 2 * weights * tokens + 2 * vocab * width * response + 2 * (2 * 2 * width * tokens * tokens / 2)
    counter = FlopCounter(ActorCritic(policy, None, value_head(policy, seed=0)))
    assert counter.training([4], [3]) == 3 * forward
    assert counter.training([4, 4], [3, 3]) == 6 * forward


def test_training_operations_with_lora_by_hand():
    policy = get_peft_model(
        build_model(build_tokenizer(), n_layer=2), LoraConfig(r=2, target_modules=["c_attn"]), "policy"
    )
    policy.add_adapter("critic", LoraConfig(r=4, target_modules=["c_attn"]))
    policy.add_adapter("reward0", LoraConfig(r=8, target_modules=["c_attn"]))
    model = ActorCritic(policy, None, value_head(policy, seed=0))
    width, vocab = policy.config.hidden_size, policy.config.vocab_size
    weights = 2 * 2 * 12 * width * width + 2 * (2 + 4) * (width + 3 * width)  # once with each of the two adapters
    products = 2 * weights * 7 + 2 * vocab * width * 3
    attention = 2 * 2 * (2 * 2 * width * 7 * 7 / 2)
    assert FlopCounter(model).training([4], [3]) == 2 * products + 3 * attention  # the base's weights have no gradient


def test_a_rollout_that_is_not_learned_from_takes_no_operations(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.rewards[0].score = lambda rollout, *_: torch.full((len(rollout.prompts),), float("nan"))
    metrics, _ = trainer.step()
    assert metrics["perf/mfu"] == 0.0 and metrics["policy/bad_updates"] == 1
    assert toy_trainer(tmp_path / "good").step()[0]["perf/mfu"] > 0


def test_padding_share_by_hand():
    ids = torch.zeros(2, 2)
    rollout = SimpleNamespace(prompt_ids=ids, prompt_lengths=[2, 1], response_lengths=[1, 4], shapes=Shapes(64))
    rollout.packed = None
    assert padding_share(rollout, [[0, 1]], max_tokens=100, ranks=1) == 1 - 8 / 10  # one batch, 2 x max(3, 5)
    assert padding_share(rollout, [[0, 1]], max_tokens=5, ranks=1) == 0.0
    rollout.shapes = Shapes(64, Sizes(4), Sizes(3))
    assert padding_share(rollout, [[1, 0]], max_tokens=100, ranks=1) == 1 - 8 / 24  # 4 x 6
    assert padding_share(rollout, [[1], [0]], max_tokens=100, ranks=1) == 1 - 8 / 36  # 4 x 6 and 4 x 3
    rollout.shapes = Shapes(64)
    assert padding_share(rollout, [[0], [1]], max_tokens=100, ranks=2) == 1 - 8 / 16  # a row for nothing in each
    rollout.packed = Packed(9, Sizes(2))
    assert padding_share(rollout, [[0, 1]], max_tokens=100, ranks=1) == 1 - 8 / 18  # one row for both, and an empty one
    rollout.packed = Packed(7)
    assert padding_share(rollout, [[0, 1]], max_tokens=7, ranks=1) == 1 - 8 / 14  # two micro-batches of a row


def test_peak_is_that_of_a_matrix_product():
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
