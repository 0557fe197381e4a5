"""Sampling: a response depends on its episode alone, and follows the softmax that the recipe describes."""

import pytest
import torch
from transformers import GenerationConfig

from rlhf.models import ActorCritic, response_logprobs
from rlhf.ppo.generation import PlainGenerator
from rlhf.ppo.generation.plain import inverse_cdf, left_pad, sampling_logprobs
from rlhf.ppo.rollout import uniforms
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

PROMPTS = [[1, 40 + i, 50 + 3 * i][: 2 + i % 2] for i in range(8)]
LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    policy = lively(build_model(tokenizer, n_layer=2))
    policy.generation_config = GenerationConfig()
    return policy


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return PlainGenerator(model, tokenizer)


# ------------------------------------------------------------------------------------------------------ distributions
def test_inverse_cdf_takes_the_interval_that_holds_the_number():
    logprobs = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()  # intervals [0,.2) nothing [.2,.7) [.7,1)
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999999])
    tokens = inverse_cdf(logprobs.expand(6, 4), numbers)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_cdf_never_takes_an_impossible_token():
    logprobs = torch.tensor([[0.0, 1.0, 0.0]]).log()
    for number in (0.0, 0.5, 1 - 2**-24):
        assert inverse_cdf(logprobs, torch.tensor([number])).tolist() == [1]


def test_frequencies_match_the_softmax():
    logits, temperature, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]), 0.7, 20_000
    numbers = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens = inverse_cdf(sampling_logprobs(logits.expand(n, 5), temperature), numbers)
    weights = torch.tensor([2.71828**2, 2.71828, 1.0, 1 / 2.71828, 2.71828**0.5]) ** (1 / temperature)
    expected = n * weights / weights.sum()
    chi_square = ((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.47  # 99.9 % of chi-square with 4 degrees of freedom


def test_frequencies_of_generate_match_the_models_softmax(model, generator):
    n = 4000
    noise = uniforms(n, 1, 7)
    out = generator.generate([PROMPTS[1]] * n, noise, temperature=0.5)
    with torch.no_grad():
        probs = (model(torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.5).softmax(-1)
    often = (n * probs >= 5).nonzero().squeeze(1)
    counts = torch.bincount(out.response_ids[:, 0], minlength=len(probs)).double()
    rest = 1 - probs[often].sum()
    expected = n * torch.cat([probs[often], rest[None]]).double()
    seen = torch.cat([counts[often], (n - counts[often].sum())[None]])
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    k = len(often)
    assert k >= 5
    assert chi_square < k + 4 * (2 * k) ** 0.5  # mean k, standard deviation sqrt(2 k)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    assert_close(sampling_logprobs(logits, 1.0, top_p=0.6).exp(), [[0.625, 0.0, 0.375, 0.0]])
    assert_close(sampling_logprobs(logits, 1.0, top_p=0.4).exp(), [[1.0, 0.0, 0.0, 0.0]])
    assert_close(sampling_logprobs(logits, 1.0, top_p=1.0).exp(), [[0.5, 0.1, 0.3, 0.1]])


def test_temperature_towards_zero_is_greedy(model, generator):
    noise = uniforms(8, LENGTH, 3)
    greedy = generator.generate(PROMPTS, noise, temperature=0.0)
    cold = generator.generate(PROMPTS, noise, temperature=1e-4)
    assert torch.equal(greedy.response_ids, cold.response_ids)
    with torch.no_grad():
        assert int(greedy.response_ids[0, 0]) == int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    assert (greedy.logprobs == 0).all()


# ----------------------------------------------------------------------------------------------------------- episodes
def test_a_response_depends_on_its_episode_alone(generator):
    noise = uniforms(8, LENGTH, 1)
    whole = generator.generate(PROMPTS, noise, temperature=0.7)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    turned = generator.generate([PROMPTS[i] for i in order], noise[order], temperature=0.7)
    assert torch.equal(turned.response_ids, whole.response_ids[order])
    for row in range(8):
        alone = generator.generate([PROMPTS[row]], noise[row : row + 1], temperature=0.7)
        assert torch.equal(alone.response_ids[0], whole.response_ids[row])
        assert torch.equal(alone.response_mask[0], whole.response_mask[row])


def test_other_uniforms_give_other_responses(generator):
    first = generator.generate(PROMPTS, uniforms(8, LENGTH, 1), temperature=0.7)
    second = generator.generate(PROMPTS, uniforms(8, LENGTH, 2), temperature=0.7)
    assert not torch.equal(first.response_ids, second.response_ids)


def test_eos_ends_a_row_and_counts(generator):
    out = generator.generate(PROMPTS * 4, uniforms(32, LENGTH, 4), temperature=1.0)
    assert out.finished.any() and not out.finished.all()  # else this test shows nothing
    for ids, mask, finished in zip(out.response_ids, out.response_mask, out.finished, strict=True):
        kept = ids[mask].tolist()
        assert mask.tolist() == [True] * len(kept) + [False] * (LENGTH - len(kept))
        assert (2 in kept) == bool(finished)
        assert kept.count(2) == int(finished) and (not finished or kept[-1] == 2)
        assert finished or len(kept) == LENGTH
        assert (ids[~mask] == 0).all()
    assert (out.logprobs[~out.response_mask] == 0).all() and (out.logprobs[out.response_mask] < 0).all()


def test_a_sampled_pad_token_stays_inside_the_response(model, tokenizer):
    noise = uniforms(64, LENGTH, 5)
    with torch.no_grad():
        before = model.transformer.ln_f.bias.clone()
        pad = model.transformer.wte.weight[0]
        model.transformer.ln_f.bias += 5 * pad / pad.square().sum()  # the pad token becomes likely
        out = PlainGenerator(model, tokenizer).generate([PROMPTS[0]] * 64, noise, temperature=1.0)
        model.transformer.ln_f.bias.copy_(before)
    inside = (out.response_ids == 0) & out.response_mask
    assert inside.any()
    followed = [row for row in range(64) if inside[row, :-1].any() and out.response_mask[row].sum() > 3]
    assert followed  # responses go on after the pad token
    assert all(out.response_mask[row].sum() == LENGTH or out.finished[row] for row in range(64))


def test_generation_stops_when_every_row_is_done(model, tokenizer):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    noise = uniforms(4, 40, 6)
    out = PlainGenerator(model, tokenizer).generate(PROMPTS[:4], noise, temperature=1.0)
    hook.remove()
    assert out.response_ids.shape == (4, 40)
    assert len(calls) == int(out.response_mask.sum(1).max()) < 40


def test_stop_strings_end_a_response(generator, model, tokenizer):
    noise = uniforms(8, LENGTH, 1)
    free = generator.generate(PROMPTS, noise, temperature=0.7)
    tokens = [(row, t) for row in range(8) for t in range(1, 6) if free.response_mask[row, t + 1]]
    texts = [(row, tokenizer.decode(free.response_ids[row, t])) for row, t in tokens]
    row, stop = next((row, text) for row, text in texts if text.isascii() and text.isprintable() and text)
    stopped = PlainGenerator(model, tokenizer, [stop]).generate(PROMPTS, noise, temperature=0.7)
    length = int(stopped.response_mask[row].sum())
    assert bool(stopped.finished[row]) and length <= 6
    assert torch.equal(stopped.response_ids[row, :length], free.response_ids[row, :length])
    assert stop in tokenizer.decode(stopped.response_ids[row, :length])
    assert stop not in tokenizer.decode(stopped.response_ids[row, : length - 1])
    for other in range(8):  # rows without it run as before
        text = tokenizer.decode(free.response_ids[other][free.response_mask[other]])
        if stop not in text:
            assert torch.equal(stopped.response_ids[other], free.response_ids[other])


# ----------------------------------------------------------------------------------------------- sampler and training
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@torch.no_grad()
def test_sampler_logprobs_are_the_training_forwards(model, generator, temperature):
    out = generator.generate(PROMPTS, uniforms(8, LENGTH, 1), temperature)
    ids, mask = left_pad(PROMPTS, 0)
    ids, mask = torch.cat([ids, out.response_ids], 1), torch.cat([mask, out.response_mask.long()], 1)
    training = response_logprobs(model, ids, mask, LENGTH, temperature, entropy=False)[0]
    assert_close(out.logprobs[out.response_mask], training[out.response_mask], atol=1e-5)


def test_the_bases_generation_config_has_no_influence(tmp_path):
    from tests.ppo_toys import build_artifacts, first_rollout, toy_trainer

    plain = first_rollout(toy_trainer(tmp_path / "a", ppo={"rollout_batch_size": 8, "total_episodes": 8}))
    build_artifacts(tmp_path / "b", lora=False)
    directory = tmp_path / "b" / "toy" / "sft" / "model"
    loud = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, min_new_tokens=6, eos_token_id=2, pad_token_id=0
    )
    loud.save_pretrained(directory)
    other = first_rollout(toy_trainer(tmp_path / "b", ppo={"rollout_batch_size": 8, "total_episodes": 8}))
    assert torch.equal(other.response_ids, plain.response_ids)


def test_gradient_checkpointing_samples_the_same(model, tokenizer, generator):
    noise = uniforms(8, LENGTH, 1)
    plain = generator.generate(PROMPTS, noise, 0.7)
    actor = ActorCritic(lively(build_model(tokenizer, n_layer=2)), None, torch.nn.Linear(16, 1, bias=False))
    actor.policy.generation_config = GenerationConfig()
    actor.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actor.policy.train()
    checkpointed = PlainGenerator(actor, tokenizer).generate(PROMPTS, noise, 0.7)
    assert torch.equal(checkpointed.response_ids, plain.response_ids)
    assert actor.policy.training  # recomputation needs it afterwards
