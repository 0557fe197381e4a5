"""Operations and padding, against counts by hand."""

from types import SimpleNamespace

import torch

from rlhf.models import ActorCritic
from rlhf.ppo.build import value_head
from rlhf.ppo.packing import Shapes, Sizes
from rlhf.ppo.perf import FlopCounter, matmul_peak, padding_share
from tests.builders import build_model, build_tokenizer


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


def test_padding_share_by_hand():
    ids = torch.zeros(2, 2)
    rollout = SimpleNamespace(prompt_ids=ids, prompt_lengths=[2, 1], response_lengths=[1, 4], shapes=Shapes(64))
    assert padding_share(rollout, max_tokens=100, ranks=1) == 1 - 8 / 10  # one batch, 2 x max(3, 5)
    assert padding_share(rollout, max_tokens=5, ranks=1) == 0.0
    rollout.shapes = Shapes(64, Sizes(4), Sizes(3))
    assert padding_share(rollout, max_tokens=100, ranks=1) == 1 - 8 / 24  # 4 x 6


def test_peak_is_that_of_a_matrix_product():
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
