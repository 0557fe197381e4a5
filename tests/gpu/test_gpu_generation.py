"""CUDA graphs draw the tokens of `generate`, and few of them are captured."""

import pytest
import torch

from rlhf.data import Renderer
from rlhf.graphs import recorded
from rlhf.ppo.generation import CompiledGenerator, PlainGenerator
from rlhf.ppo.rollout import uniforms
from rlhf.sampling import sample_responses
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[1, 40 + i % 20, 50 + 3 * i % 30, 44][: 1 + i % 4] for i in range(40)]


@pytest.mark.parametrize("slots", [64, 8])
def test_graphs_sample_the_same_as_generate(slots):
    tokenizer = build_tokenizer()
    model = lively(build_model(tokenizer, n_layer=2)).cuda()
    noise = uniforms(len(PROMPTS), 12, 3)
    plain = PlainGenerator(model, tokenizer).generate(PROMPTS, noise, 0.7)
    mine = CompiledGenerator(model, tokenizer.pad_token_id, tokenizer.eos_token_id, slots).generate(PROMPTS, noise, 0.7)
    assert torch.equal(mine.response_ids, plain.response_ids)
    assert torch.equal(mine.finished, plain.finished)
    assert_close(mine.logprobs, plain.logprobs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_rollouts_of_like_size_share_a_graph_and_see_new_weights(compiled):
    tokenizer = build_tokenizer()
    policy = lively(build_model(tokenizer, n_layer=2)).cuda()
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    generator = CompiledGenerator(policy, pad, eos, dtype=torch.bfloat16, compiled=compiled)
    seen, before = [], recorded()
    for seed in range(4):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        generator.sync()
        seen.append(generator.generate(PROMPTS[: 33 + seed], uniforms(33 + seed, 12, 0), 1.0).response_ids[:33])
    assert recorded() - before <= 2  # of all slots, and of the quarter that the last responses go on in
    assert not torch.equal(seen[0], seen[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluations_sample_in_slots(dtype):
    tokenizer = build_tokenizer()
    model = lively(build_model(tokenizer, n_layer=2)).cuda().eval()
    renderer, before = Renderer(tokenizer, chat=False), recorded()
    texts = ["abc", "abcabc", "c"] * 20
    slots = sample_responses(model, renderer, texts, 12, 0.7, seed=1, dtype=dtype)
    assert recorded() > before
    plain = sample_responses(model.cpu(), renderer, texts, 12, 0.7, seed=1)
    same = [a == b for a, b in zip(slots.response_ids, plain.response_ids, strict=True)]
    assert all(same) if dtype == torch.float32 else sum(same) > len(same) / 2
