"""Samples of published models, and what is measured on them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GenerationConfig

from rlhf.data import Renderer
from rlhf.sampling import response_logprob_sums, rows_at_once, sample_responses, samples_in_slots, score_sequences
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

PROMPTS = ["the film", "a dull movie", "it", "too soon and loud"]


@pytest.fixture
def model():
    return lively(build_model(build_tokenizer()))


@pytest.fixture
def renderer():
    return Renderer(build_tokenizer(), chat=False)


@pytest.mark.parametrize(
    ("free", "rows"),
    [(2**40, 256), (0, 64), (4 * 200 * 2048, 192)],  # a row of 16 tokens takes 8 * 1 layer * 2 heads * 8 * 16 bytes
)
def test_as_many_are_sampled_at_once_as_memory_allows(model, monkeypatch, free, rows):
    assert rows_at_once(model, 16) == 64
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    on_gpu = SimpleNamespace(
        config=model.config, parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))])
    )
    assert rows_at_once(on_gpu, 16) == rows
    model.config.num_key_value_heads, model.config.head_dim = 1, 4  # a quarter of that for a token
    assert rows_at_once(on_gpu, 64) == rows


def test_slots_sample_on_a_gpu_what_they_can(model, renderer, monkeypatch):
    plain = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1)
    assert not samples_in_slots(model, [], 1.0)  # a CPU gains nothing
    monkeypatch.setattr("rlhf.sampling.samples_in_slots", lambda *_: True)
    monkeypatch.setattr("rlhf.sampling.SLOTS_FROM", 1)
    slots = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1, batch_size=3)
    assert slots.response_ids == plain.response_ids and slots.has_eos == plain.has_eos
    assert_close(slots.logprobs, plain.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "adapters", "attention", "parameters", "can"),
    [
        (([], 1.0), False, "sdpa", 10**9, True),
        ((None, 1.0), False, "sdpa", 10**9, True),
        ((["\n"], 1.0), False, "sdpa", 10**9, False),
        (([], 1.1), False, "sdpa", 10**9, False),
        (([], 1.0), True, "sdpa", 10**9, False),
        (([], 1.0), False, "eager", 10**9, False),
        (([], 1.0), False, "sdpa", 8 * 10**9, False),
    ],
)
def test_what_slots_can_sample(model, knobs, adapters, attention, parameters, can):
    model.set_attn_implementation(attention)
    parameter = SimpleNamespace(device=torch.device("cuda"), numel=lambda: parameters)
    on_gpu = SimpleNamespace(config=model.config, parameters=lambda: iter([parameter]))
    if adapters:
        on_gpu.peft_config = {}
    assert samples_in_slots(on_gpu, *knobs) == can


def test_samples_do_not_depend_on_the_batch_size(model, renderer):
    one = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1, batch_size=1)
    all_ = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1, batch_size=4)
    assert one.response_ids == all_.response_ids and one.responses == all_.responses
    assert one.prompts == PROMPTS
    assert one.response_ids != sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=2).response_ids


def test_another_draw_uses_other_random_numbers(model, renderer):
    draws = [sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1, draw=draw) for draw in (0, 1, 1)]
    assert draws[1].response_ids == draws[2].response_ids != draws[0].response_ids
    assert draws[0].response_ids == sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1).response_ids


def test_repetition_penalty_counts_the_response_and_not_the_prompt(model, renderer):
    prompts = [text for text in PROMPTS for _ in range(8)]
    strict = sample_responses(model, renderer, prompts, 10, 0.7, seed=1, repetition_penalty=1e6)
    assert all(len(set(ids)) == len(ids) for ids in strict.response_ids)
    plain = sample_responses(model, renderer, prompts, 10, 0.7, seed=1)
    assert any(len(set(ids)) < len(ids) for ids in plain.response_ids)
    # The first token has only the prompt behind it.
    assert [ids[0] for ids in strict.response_ids] == [ids[0] for ids in plain.response_ids]


def test_lengths_and_eos_rate(model, renderer):
    samples = sample_responses(model, renderer, PROMPTS * 8, 10, 1.0, seed=1)
    assert samples.has_eos == [ids[-1] == 2 for ids in samples.response_ids]
    assert 0 < samples.eos_rate < 1 and samples.eos_rate == sum(samples.has_eos) / 32
    assert samples.lengths == [len(ids) for ids in samples.response_ids] and max(samples.lengths) <= 10
    assert not any("<|eos|>" in text for text in samples.responses)


def test_the_models_generation_config_is_ignored_and_restored(model, renderer):
    plain = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1).response_ids
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=2)
    model.generation_config = own
    assert sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1).response_ids == plain
    assert model.generation_config is own


def test_logprob_sums_are_those_of_single_rows(model, renderer):
    samples = sample_responses(model, renderer, PROMPTS, 10, 0.7, seed=1)
    sums = response_logprob_sums(model, samples, 0.7, pad_id=0, batch_size=3)
    for prompt, response, total in zip(samples.prompt_ids, samples.response_ids, sums, strict=True):
        with torch.no_grad():
            logp = (model(torch.tensor([prompt + response])).logits[0] / 0.7).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected = sum(float(logp[place, token]) for place, token in zip(places, response, strict=True))
        assert_close(total, expected, atol=1e-4)


def test_scores_of_sequences_are_the_classifiers(tmp_path, model):
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    rows = [[1, 40, 2], [1, 41, 42, 43, 2], [1, 2], [1, 50, 51, 2]]
    scores = score_sequences(classifier, rows, pad_id=0, batch_size=3)
    with torch.no_grad():
        assert_close(scores, [float(classifier(torch.tensor([row])).logits) for row in rows], atol=1e-5)
