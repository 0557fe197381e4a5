"""Slots sample what transformers' `generate` samples, in whatever order responses end and slots are filled again."""

from functools import partial

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models import set_active_adapter, special_attention
from rlhf.ppo.build import wants_slots
from rlhf.ppo.generation import CompiledGenerator, PlainGenerator, compiled
from rlhf.ppo.generation.compiled import MAX_KEPT, copy_weights, grouped_attention, sampling_copy
from rlhf.ppo.rollout import uniforms
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import lively, toy_trainer
from tests.tolerances import assert_close

PROMPTS = [[1, 40 + i % 20, 50 + 3 * i % 30, 44][: 1 + i % 4] for i in range(40)]


def llama(tokenizer, layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 40  # far from uniform
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.5
    model.generation_config = GenerationConfig()
    return model


def both(model, tokenizer, slots, temperature=0.7, top_p=1.0, length=12):
    noise = uniforms(len(PROMPTS), length, 3)
    plain = PlainGenerator(model, tokenizer).generate(PROMPTS, noise, temperature, top_p)
    mine = CompiledGenerator(model, tokenizer.pad_token_id, tokenizer.eos_token_id, slots)
    return plain, mine.generate(PROMPTS, noise, temperature, top_p)


@pytest.mark.parametrize("slots", [64, 8, 3, 1])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_samples_the_same_as_generate(architecture, slots):
    tokenizer = build_tokenizer()
    model = lively(build_model(tokenizer, n_layer=2)) if architecture == "gpt2" else llama(tokenizer)
    plain, mine = both(model, tokenizer, slots)
    lengths = plain.response_mask.sum(1)
    assert lengths.min() < 4 and lengths.max() > 8  # slots are freed at different times
    assert torch.equal(mine.response_ids, plain.response_ids)
    assert torch.equal(mine.response_mask, plain.response_mask)
    assert torch.equal(mine.finished, plain.finished)
    assert_close(mine.logprobs, plain.logprobs)


def test_the_last_responses_of_many_slots_go_on_in_a_smaller_cache():
    tokenizer = build_tokenizer()
    model, noise = lively(build_model(tokenizer, n_layer=2)), uniforms(len(PROMPTS), 12, 3)
    plain = PlainGenerator(model, tokenizer).generate(PROMPTS, noise, 0.7)
    generator = CompiledGenerator(model, tokenizer.pad_token_id, tokenizer.eos_token_id, slots=64)
    for _ in range(2):  # again with what is left in both caches
        mine = generator.generate(PROMPTS, noise, 0.7)
        assert [key[0] for key in generator.slots] == [64, 16]
        assert torch.equal(mine.response_ids, plain.response_ids)
        assert torch.equal(mine.finished, plain.finished)
        assert_close(mine.logprobs, plain.logprobs)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.3, 0.7)])
def test_greedy_and_nucleus(temperature, top_p):
    tokenizer = build_tokenizer()
    plain, mine = both(lively(build_model(tokenizer)), tokenizer, 8, temperature, top_p)
    assert torch.equal(mine.response_ids, plain.response_ids)
    assert torch.equal(mine.finished, plain.finished)


def test_a_copy_follows_the_policy_only_when_told():
    tokenizer = build_tokenizer()
    policy = lively(build_model(tokenizer))
    generator = CompiledGenerator(policy, tokenizer.pad_token_id, tokenizer.eos_token_id, dtype=torch.bfloat16)
    noise = uniforms(len(PROMPTS), 8, 0)
    before = generator.generate(PROMPTS, noise, 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(generator.generate(PROMPTS, noise, 1.0).response_ids, before.response_ids)
    generator.sync()
    assert {p.dtype for p in generator.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(generator.generate(PROMPTS, noise, 1.0).response_ids, before.response_ids)


def test_lora_samples_with_the_policy_adapter(tmp_path):
    trainer = toy_trainer(tmp_path, "lora-separate", ppo={"generator": "compiled"})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    noise = uniforms(4, 8, 0)
    prompts = trainer.prompts.ids[:4]
    mine = trainer.generator.generate(prompts, noise, 1.0)
    plain = PlainGenerator(trainer.model, build_tokenizer()).generate(prompts, noise, 1.0)
    assert torch.equal(mine.response_ids, plain.response_ids)
    assert_close(mine.logprobs, plain.logprobs)
    set_active_adapter(trainer.model, None)
    off = PlainGenerator(trainer.model.policy.get_base_model(), build_tokenizer()).generate(prompts, noise, 1.0)
    assert not torch.allclose(off.logprobs, mine.logprobs, atol=1e-3)


def test_a_copy_holds_the_policy_adapter_merged(tmp_path):
    trainer = toy_trainer(tmp_path, "lora-separate")
    policy = trainer.model.policy
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    plain = sampling_copy(policy, torch.float32)
    assert not hasattr(plain, "peft_config")
    copy_weights(policy, plain)
    ids = torch.tensor([[1, 40, 50, 60]])
    with trainer.model.adapter("policy"):
        expected = policy(ids).logits
    assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with trainer.model.adapter("critic"):
        assert not torch.allclose(policy(ids).logits, expected, atol=1e-2)
    # One set of what no adapter changes: embeddings are not copied, and merging has not touched the policy's weights.
    assert plain.get_input_embeddings().weight is policy.get_input_embeddings().weight
    merged, base = plain.transformer.h[0].attn.c_attn.weight, policy.get_base_model().transformer.h[0].attn.c_attn
    assert merged.data_ptr() != base.base_layer.weight.data_ptr() and not torch.equal(merged, base.base_layer.weight)


def test_a_training_run_is_the_same_with_both_back_ends(tmp_path):
    rows = {}
    for name in ("plain", "compiled"):
        trainer = toy_trainer(tmp_path / name, ppo={"generator": name, "generation_slots": 3})
        assert type(trainer.generator).__name__ == f"{name.capitalize()}Generator"
        rows[name], _ = trainer.step()
    for key, value in rows["plain"].items():
        if not key.startswith("perf/"):
            assert_close(rows["compiled"][key], value, rtol=1e-3, atol=1e-5)


def test_sizes_that_come_again_are_kept(monkeypatch):
    tokenizer = build_tokenizer()
    made = []
    build = compiled.Slots
    monkeypatch.setattr(compiled, "Slots", lambda *sizes: made.append(sizes) or build(*sizes))
    generator = CompiledGenerator(build_model(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    for length in range(1, 2 * MAX_KEPT):  # one that comes all the time, among others that come once
        for other in (length, 0):
            generator._slots_for(2, 8 + other, 4, 1.0, 1.0)
    assert [sizes[1] for sizes in made].count(8) == 1
    assert len(generator.slots) == MAX_KEPT


def test_what_slots_cannot_sample_is_said(tmp_path):
    model = build_model(build_tokenizer())
    assert special_attention(model) is None
    model.config._attn_implementation = "eager"
    assert "eager" in special_attention(model)
    windowed = llama(build_tokenizer())
    windowed.config.sliding_window = 8
    assert "full attention" in special_attention(windowed)
    with pytest.raises(UserError, match=r"stop_strings.*set ppo\.generator: plain"):
        toy_trainer(tmp_path, ppo={"generator": "compiled", "stop_strings": ["."]})


@pytest.mark.parametrize(
    ("choice", "steps", "device", "slots"),
    [
        ("auto", 5, "cuda", True),
        ("auto", 4, "cuda", False),  # over before the recording has paid
        ("auto", 1000, "cpu", False),
        ("compiled", 1, "cpu", True),
        ("plain", 1000, "cuda", False),
    ],
)
def test_auto_takes_slots_where_a_run_is_long_enough(choice, steps, device, slots):
    assert wants_slots(choice, steps, torch.device(device)) is slots


@pytest.mark.parametrize("compiling", [False, True])
def test_grouped_attention_is_attention_with_repeated_keys(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, heads, n, 8, generator=draw) for heads, n in ((6, 1), (2, 20), (2, 20)))
    mask = torch.rand(5, 1, 1, 20, generator=draw) > 0.4
    out, weights = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-6)
    assert weights is None


@torch.no_grad()
def test_the_sampling_copy_of_a_model_with_shared_keys_samples_as_the_model_itself():
    """Grouped attention, in float64 so that a different order of sums changes no token."""
    tokenizer = build_tokenizer()
    policy = llama(tokenizer)
    prompts, noise = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]], uniforms(4, 10, 7)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    plain = CompiledGenerator(policy, pad, eos, slots=2).generate(prompts, noise, 0.9)
    copied = CompiledGenerator(policy, pad, eos, slots=2, dtype=torch.float64)
    copied.sync()
    mine = copied.generate(prompts, noise, 0.9)
    assert copied.model.config._attn_implementation != policy.config._attn_implementation
    assert torch.equal(mine.response_ids, plain.response_ids)
    assert_close(mine.logprobs, plain.logprobs, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_all_blocks_share_the_compilations_of_a_step_for_any_number_of_slots_and_length(architecture, monkeypatch):
    """With torch's own kernels, so that it is fast here: what is compiled how often is decided before."""
    tokenizer = build_tokenizer()
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    policy = lively(build_model(tokenizer, n_layer=5)) if architecture == "gpt2" else llama(tokenizer, layers=5)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    sides = [
        CompiledGenerator(policy, pad, eos, slots, dtype=torch.float64, compiled=on)
        for slots, on in ((24, False), (24, True))
    ]
    torch._dynamo.utils.counters.clear()
    for count, width, length in ((24, 3, 12), (20, 6, 12), (6, 3, 12), (24, 90, 12), (40, 5, 20)):
        prompts = [[5 + (7 * i + j) % 40 for j in range(1 + (i + width) % width)] for i in range(count)]
        plain, mine = (side.generate(prompts, uniforms(count, length, 7), 0.9) for side in sides)
        assert torch.equal(mine.response_ids, plain.response_ids)
        assert_close(mine.logprobs, plain.logprobs, atol=1e-9)
    # A block and the draw, each once more when a size first changes.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_a_model_whose_blocks_are_not_its_layers_is_sampled_as_it_is(monkeypatch, caplog):
    tokenizer = build_tokenizer()
    policy = build_model(tokenizer, n_layer=2)
    policy._no_split_modules = ["GPT2Attention", "GPT2MLP"]
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    CompiledGenerator(policy, tokenizer.pad_token_id, tokenizer.eos_token_id, dtype=torch.float64, compiled=True)
    assert "sampling is not compiled: 4 blocks, 2 layers" in caplog.text
