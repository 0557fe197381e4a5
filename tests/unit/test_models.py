"""Forwards of a rollout against plain transformers calls; saving; special tokens."""

import json
import struct

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.activations import NewGELUActivation

from rlhf.convert import convert
from rlhf.errors import UserError
from rlhf.graphs import has_dropout
from rlhf.models import (
    ActorCritic,
    Scorer,
    check_saved,
    check_tensors,
    disable_dropout,
    explicit_masks,
    has_plain_head,
    init_score_head,
    last_position,
    load_model,
    load_tokenizer,
    new_reward_model,
    position_ids,
    response_logprobs,
    save_model,
    split_digits,
    trunk_of,
)
from rlhf.ppo.build import value_head
from tests.builders import CHAT_TEMPLATE, build_model, build_recipe, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

PROMPTS = [[1, 40, 41], [1, 42, 43, 44, 45], [1, 50]]
RESPONSES = [[60, 61, 62, 2], [63, 2], [64, 0, 65]]  # the last one holds the pad token (0)
TEMPERATURE = 0.7


def gpt2():
    return lively(build_model(build_tokenizer(), n_layer=2))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def test_gpt2_gets_one_gelu_kernel_and_the_same_outputs(tmp_path):
    plain = gpt2()
    save_model(plain, build_tokenizer(), tmp_path)
    fused = load_model(tmp_path)
    kinds = {type(block.mlp.act) for block in fused.transformer.h}
    assert kinds == {nn.GELU} and isinstance(plain.transformer.h[0].mlp.act, NewGELUActivation)
    ids = torch.tensor([[1, 40, 41, 60]])
    assert_close(fused(ids).logits, plain(ids).logits, atol=1e-5)
    assert fused.config.activation_function == "gelu_new"  # what is saved loads as before


def joined(prompts, responses, left=0, right=0, pad=0):
    """input_ids and attention_mask: prompts left-padded (`left` more than needed), responses right-padded."""
    width, length = max(map(len, prompts)) + left, max(map(len, responses)) + right
    rows, masks = [], []
    for p, r in zip(prompts, responses, strict=True):
        rows.append([pad] * (width - len(p)) + p + r + [pad] * (length - len(r)))
        masks.append([0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r)))
    return torch.tensor(rows), torch.tensor(masks), length


def by_hand(model, prompt, response, temperature):
    """log-probs, entropies and hidden states of one unpadded row from a plain full forward."""
    ids = torch.tensor([prompt + response])
    out = model(ids, output_hidden_states=True)
    logp = (out.logits[0].double() / temperature).log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    logprobs = [float(logp[place, token]) for place, token in zip(places, response, strict=True)]
    entropies = [float(-(logp[place].exp() * logp[place]).sum()) for place in places]
    return logprobs, entropies, out.hidden_states[-1][0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("left", "right", "pad"), [(0, 0, 0), (3, 2, 0), (1, 0, 77)])
@torch.no_grad()
def test_response_logprobs_are_those_of_a_plain_forward(name, left, right, pad):
    model = MODELS[name]()
    ids, mask, length = joined(PROMPTS, RESPONSES, left, right, pad)
    logprobs, entropy, hidden = response_logprobs(model, ids, mask, length, TEMPERATURE, entropy=True)
    assert logprobs.shape == entropy.shape == (3, length)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = by_hand(model, prompt, response, TEMPERATURE)
        n = len(response)
        assert_close(logprobs[row, :n], expected[0], atol=1e-5)
        assert_close(entropy[row, :n], expected[1], atol=1e-5)
        assert_close(hidden[row, :n], expected[2], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_explicit_mask_says_the_same_as_one_of_padding(name):
    model = MODELS[name]()
    ids, mask, length = joined(PROMPTS, RESPONSES, 3, 2)
    short = response_logprobs(model, ids, mask, length, TEMPERATURE, entropy=True)
    with explicit_masks():
        whole = response_logprobs(model, ids, mask, length, TEMPERATURE, entropy=True)
    keep = mask[:, -length:].bool()
    for a, b in zip(short, whole, strict=True):
        assert_close(b[keep], a[keep], atol=1e-5)
        assert torch.isfinite(b).all()  # padding, too: one NaN in a mini-batch is one too many


@torch.no_grad()
def test_batch_order_and_packing_change_nothing():
    model = gpt2()
    ids, mask, length = joined(PROMPTS, RESPONSES)
    whole = response_logprobs(model, ids, mask, length, TEMPERATURE, entropy=False)[0]
    turned = response_logprobs(model, ids.flip(0), mask.flip(0), length, TEMPERATURE, entropy=False)[0].flip(0)
    keep = mask[:, -length:].bool()
    assert_close(turned[keep], whole[keep], atol=1e-5)
    for row in range(3):
        one = joined(PROMPTS[row : row + 1], RESPONSES[row : row + 1])
        alone = response_logprobs(model, *one, TEMPERATURE, entropy=False)[0]
        assert_close(alone[0], whole[row, : len(RESPONSES[row])], atol=1e-5)


def test_temperature_divides_the_logits():
    model = gpt2()
    ids, mask, length = joined(PROMPTS[:1], RESPONSES[:1])
    cold = response_logprobs(model, ids, mask, length, 0.5, entropy=True)
    warm = response_logprobs(model, ids, mask, length, 2.0, entropy=True)
    assert (cold[1] < warm[1]).all()
    assert (cold[0] - warm[0]).abs().max() > 0.1


def test_only_the_response_gets_logits():
    model = gpt2()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    ids, mask, length = joined(PROMPTS, RESPONSES, left=9)
    response_logprobs(model, ids, mask, length, TEMPERATURE, entropy=False)
    assert seen == [length + 1]


def test_position_ids_start_at_the_first_real_token():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1, 2, 2]]


def test_last_position_with_padding_on_either_side():
    values = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]])
    assert last_position(values, mask).tolist() == [3.0, 6.0, 11.0]


# ------------------------------------------------------------------------------------------------------------ rewards
def sequence_classifier(tmp_path, name):
    MODELS[name]().save_pretrained(tmp_path / name)
    return new_reward_model(tmp_path / name, seed=5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scorer_gives_the_logits_of_the_sequence_classifier(tmp_path, name, side):
    model = sequence_classifier(tmp_path, name)
    rows = [[1, 40, 60, 2], [1, 41, 42, 61, 62, 63, 2], [1, 2]]
    width = max(map(len, rows)) + 2
    padded, masks = [], []
    for row in rows:
        filler, ones = [0] * (width - len(row)), [1] * len(row)
        padded.append(filler + row if side == "left" else row + filler)
        masks.append(filler + ones if side == "left" else ones + filler)
    ids, mask = torch.tensor(padded), torch.tensor(masks)
    ours = last_position(Scorer(model)(ids, mask), mask)
    alone = [float(model(torch.tensor([row])).logits) for row in rows]
    assert_close(ours, alone, atol=1e-5)
    theirs = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits.squeeze(-1)
    assert_close(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_a_pad_token_inside_a_response_does_not_move_the_score(tmp_path):
    model = sequence_classifier(tmp_path, "gpt2")
    row = [1, 40, 60, 0, 61, 0]  # the policy sampled the pad token, at last even as its last token
    scores = {}
    for left, right in ((0, 0), (2, 0), (0, 3)):
        ids = torch.tensor([[0] * left + row + [0] * right])
        mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        scores[left, right] = float(last_position(Scorer(model)(ids, mask), mask))
    hidden = trunk_of(model)(torch.tensor([row])).last_hidden_state[0, -1]
    assert_close(list(scores.values()), [float(model.score(hidden))] * 3, atol=1e-5)


@torch.no_grad()
def test_what_is_saved_is_right_in_a_plain_batch(tmp_path):
    model = sequence_classifier(tmp_path, "gpt2")  # absolute positions
    model.score.weight *= 100
    tokenizer = build_tokenizer()
    save_model(model, tokenizer, tmp_path / "reward")
    save_model(MODELS["gpt2"](), tokenizer, tmp_path / "policy")
    assert tokenizer.padding_side == "left"  # as it was
    plain = AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = ["good", "a film that was long and quite bad", "ok it is"]
    scores = model(**plain(texts, padding=True, return_tensors="pt")).logits
    alone = [model(**plain(text, return_tensors="pt")).logits for text in texts]
    assert_close(scores, torch.cat(alone), atol=1e-5)
    plain.padding_side = "left"
    assert not torch.allclose(
        model(**plain(texts, padding=True, return_tensors="pt")).logits, torch.cat(alone), atol=1e-2
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").padding_side == "left"  # `generate` wants it


def test_score_head_is_drawn_with_variance_one_over_d_plus_one():
    model = nn.Module()
    model.score = nn.Linear(4095, 16, bias=False).requires_grad_(False)
    init_score_head(model, seed=0)
    assert abs(float(model.score.weight.std()) - 4096**-0.5) < 0.01 * 4096**-0.5
    assert abs(float(model.score.weight.mean())) < 3e-4


# ------------------------------------------------------------------------------------------------------- actor-critic
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_state_before_each_token(tmp_path, name):
    critic = sequence_classifier(tmp_path, name)
    policy = load_model(tmp_path / name)
    head = value_head(policy, seed=5)
    responses = [[60, 61, 62, 2], [63, 2], [64, 65]]  # no pad token: the classifier would not read its score there
    ids, mask, length = joined(PROMPTS, responses, left=1)
    separate = ActorCritic(policy, critic, None)(ids, mask, length, TEMPERATURE).values
    shared = ActorCritic(policy, None, head)(ids, mask, length, TEMPERATURE).values
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        for t in range(len(response)):
            # the sequence classifier reads its score at the last token: the state before token t ends there
            expected = float(critic(torch.tensor([prompt + response[:t]])).logits)
            assert_close(separate[row, t], expected, atol=1e-5)
            assert_close(shared[row, t], expected, atol=1e-5)  # same trunk, and the head is drawn by the same rule


def test_actor_critic_wants_exactly_one_critic():
    model = gpt2()
    with pytest.raises(ValueError, match="exactly one"):
        ActorCritic(model, None, None)
    with pytest.raises(ValueError, match="exactly one"):
        ActorCritic(model, model, nn.Linear(16, 1))


def test_modes_agree_and_entropy_is_measured_only_in_rollouts(tmp_path):
    model = ActorCritic(gpt2(), None, nn.Linear(16, 1, bias=False))
    batch = joined(PROMPTS, RESPONSES)
    train, rollout = model(*batch, TEMPERATURE), model(*batch, TEMPERATURE, mode="rollout")
    assert train.entropy is None and rollout.entropy.shape == train.logprobs.shape
    assert torch.equal(train.logprobs, rollout.logprobs) and torch.equal(train.values, rollout.values)


def test_dropout_is_off_after_loading(tmp_path):
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, n_positions=16)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    build_model(build_tokenizer()).__class__(config).save_pretrained(tmp_path)
    model = load_model(tmp_path).train()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_llama_attention_dropout_is_off():
    model = llama()
    model.config.attention_dropout = 0.5
    disable_dropout(model)
    model.train()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_by_a_function_call_is_found_and_off():
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=16)).train()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert has_dropout(model) and not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert not has_dropout(model) and torch.equal(model(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------------------------------- save
def test_a_saved_model_comes_back_and_a_tied_head_stays_tied(tmp_path):
    tokenizer = build_tokenizer()
    model = lively(build_model(tokenizer))
    save_model(model, tokenizer, tmp_path)
    check_saved(model, tmp_path, "causal")
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert (again.config.eos_token_id, again.config.pad_token_id) == (2, 0)
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (2, 0)


def test_check_tensors_compares_every_tensor_and_knows_tied_names(tmp_path):
    model = lively(build_model(build_tokenizer()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    check_tensors(state, tmp_path, "causal")
    tied = {name: tensor for name, tensor in state.items() if name != "transformer.wte.weight"}
    check_tensors(tied, tmp_path, "causal")  # it stands under lm_head.weight
    with pytest.raises(RuntimeError, match="no trained tensor for"):
        check_tensors({}, tmp_path, "causal")
    with pytest.raises(RuntimeError, match="extra was not saved"):
        check_tensors(state | {"extra": torch.zeros(1)}, tmp_path, "causal")
    state["transformer.ln_f.bias"] += 1e-3
    with pytest.raises(RuntimeError, match=r"transformer\.ln_f\.bias is not the trained one"):
        check_tensors(state, tmp_path, "causal")


def test_check_saved_notices_a_lost_score_head(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    model = new_reward_model(tmp_path / "base", seed=0)
    save_model(model, tokenizer, tmp_path / "model")
    check_saved(model, tmp_path / "model", "score")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.num_labels == 1
    with torch.no_grad():
        model.score.weight *= 1.1
    with pytest.raises(RuntimeError, match="outputs differ"):
        check_saved(model, tmp_path / "model", "score")


# ------------------------------------------------------------------------------------------------------------ chunks
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, compiled):
    """Whole logits of the model's own forward against chunks of five tokens, computed again in the backward pass."""
    monkeypatch.setattr("rlhf.models.LOGITS_BYTES", 5 * 4 * 280)
    if not compiled:
        monkeypatch.setattr("rlhf.models._fused_head_logprobs", None)
    results = []
    for chunked in (False, True):
        model = lively(build_model(build_tokenizer(), n_layer=2))
        if compiled and chunked:
            model.blocks_compiled = True
        ids = torch.arange(3 * 9).reshape(3, 9) * 37 % 280
        logprobs, entropy, hidden = response_logprobs(model, ids, torch.ones_like(ids), 6, 0.7, True, chunked)
        (logprobs.sum() + entropy.square().sum() + hidden.sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logprobs, entropy, hidden, gradients))
    for mine, whole in zip(results[1][:3], results[0][:3], strict=True):
        assert_close(mine, whole)
    for name, gradient in results[0][3].items():
        assert_close(results[1][3][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_scaled_head_is_not_plain():
    model = build_model(build_tokenizer())
    assert has_plain_head(model)
    forward = model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = capped
    assert not has_plain_head(model)


# ------------------------------------------------------------------------------------------------ GGUF and conversion
def gguf_with(fields):
    """The beginning of a GGUF file: magic, version, counts, then key, type and value of each string field."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(fields))]
    for key, value in fields.items():
        parts += [struct.pack("<Q", len(key)), key.encode(), struct.pack("<IQ", 8, len(value)), value.encode()]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"general.name": "x", "tokenizer.ggml.pre": "smollm", "z": "end"}, ["a", "ĠĠ", "1", "2"]),
        ({"tokenizer.ggml.pre": "gpt-2"}, ["a", "Ġ", "Ġ12"]),
        ({"general.name": "x"}, ["a", "Ġ", "Ġ12"]),
    ],
)
def test_a_gguf_tokenizer_takes_digits_alone_where_the_file_says_so(tmp_path, fields, tokens):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_with(fields))
    tokenizer = build_tokenizer(("a  12 12", "b   b   b   b", "12 12 12"), vocab_size=300)
    split_digits(tokenizer, str(path))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12", add_special_tokens=False)["input_ids"]) == tokens
    split_digits(tokenizer, str(path))  # and once is enough
    assert str(tokenizer.backend_tokenizer.pre_tokenizer).count("Digits") == tokens.count("1")


def build_base(directory, chat_template=None):
    tokenizer = build_tokenizer(chat_template=chat_template)
    lively(build_model(tokenizer, n_positions=128)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_a_base_is_converted_and_compared(tmp_path):
    build_base(tmp_path / "base", CHAT_TEMPLATE)
    recipe = build_recipe(tmp_path, model={"base": str(tmp_path / "base"), "chat": True})
    facts = convert(recipe, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["probes"] == facts["probes"]
    copy = load_tokenizer(tmp_path / "out")
    assert (copy.pad_token_id, copy.eos_token_id, copy.chat_template) == (0, 2, CHAT_TEMPLATE)
    with pytest.raises(UserError, match="exists already"):
        convert(recipe, tmp_path / "out")


def test_a_copy_that_answers_in_another_way_is_not_kept(tmp_path, monkeypatch):
    build_base(tmp_path / "base")
    recipe = build_recipe(tmp_path, model={"base": str(tmp_path / "base")})

    def other_weights(path, *args, **kwargs):
        model = load_model(path, *args, **kwargs)
        model.lm_head.weight.data += torch.randn_like(model.lm_head.weight)
        return model

    monkeypatch.setattr("rlhf.convert.load_model", other_weights)
    with pytest.raises(UserError, match="in another way"):
        convert(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
