"""Prompt order, random numbers, shares of ranks, and forwards over a rollout."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models import explicit_masks, has_plain_head, response_logprobs, special_attention
from rlhf.ppo.generation.plain import left_pad
from rlhf.ppo.packing import Packed, Shapes, Sizes
from rlhf.ppo.rollout import PromptStream, Rollout, evaluate_tokens, micro_batches, my_share, uniforms
from rlhf.ppo.stage import wants_packing
from tests.ppo_toys import SHAPES, first_rollout, toy_trainer
from tests.tolerances import assert_close


def rank(index=0, count=1):
    """As much of an Accelerator as the functions under test use; alone it reduces to itself."""
    return SimpleNamespace(process_index=index, num_processes=count, reduce=lambda x, how: x, gather=lambda x: x)


def rollout_of(prompts, lengths, width=6):
    ids, mask = left_pad(prompts, 0)
    response_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    response_ids = torch.where(response_mask, torch.arange(10, 10 + width).expand(len(lengths), width), 0)
    n = len(prompts)
    texts = [str(i) for i in range(n)]
    return Rollout(
        ids, mask, response_ids, response_mask, torch.ones(n).bool(), torch.zeros(n, width), texts, texts, {}
    )


# ------------------------------------------------------------------------------------------------------- prompt order
def test_each_pass_shows_every_prompt_once_in_another_order():
    stream = PromptStream(count=10, batch_size=5, seed=3)
    passes = [stream.indices(step) + stream.indices(step + 1) for step in (0, 2, 4)]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]


def test_fewer_prompts_than_a_batch_are_cycled_and_reshuffled():
    rows = PromptStream(count=3, batch_size=9, seed=0).indices(0)
    parts = [rows[0:3], rows[3:6], rows[6:9]]
    assert all(sorted(part) == [0, 1, 2] for part in parts)
    assert len({tuple(part) for part in parts}) > 1


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    walked = PromptStream(7, 4, seed=1)
    trace = [walked.indices(step) for step in range(6)]
    assert [PromptStream(7, 4, seed=1).indices(step) for step in (5, 2, 0)] == [trace[5], trace[2], trace[0]]
    assert [PromptStream(7, 4, seed=2).indices(step) for step in range(6)] != trace


def test_no_prompts_is_an_error():
    with pytest.raises(ValueError, match="split is empty"):
        PromptStream(0, 4, seed=0)


def test_uniform_numbers_depend_on_the_key():
    assert torch.equal(uniforms(4, 5, 0, 1, 2), uniforms(4, 5, 0, 1, 2))
    others = [uniforms(4, 5, *key) for key in ((0, 1, 3), (0, 0, 2), (1, 1, 2))]
    assert all(not torch.equal(uniforms(4, 5, 0, 1, 2), other) for other in others)
    many = uniforms(100, 100, 9)
    assert float(many.min()) >= 0 and float(many.max()) < 1 and abs(float(many.mean()) - 0.5) < 0.01


@pytest.mark.parametrize(("count", "ranks"), [(8, 1), (8, 2), (7, 2), (5, 4), (1, 3)])
def test_shares_are_equally_long_and_gather_to_the_whole(count, ranks):
    shares = [my_share(count, rank(index, ranks)) for index in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert [row for share in shares for row in share][:count] == list(range(count))


# ------------------------------------------------------------------------------------------------------ micro-batches
def test_a_batch_is_trimmed_to_its_longest_row():
    rollout = rollout_of([[1, 5], [1, 5, 6, 7], [1]], [2, 3, 4])
    batch = rollout.batch([0, 2])
    assert batch.length == 4
    assert batch.input_ids.tolist() == [[0, 1, 5, 10, 11], [1, 10, 11, 12, 13]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert rollout.batch([1, 0]).input_ids.tolist() == [[1, 5, 6, 7, 10, 11, 12], [0, 0, 0, 1, 5, 10, 11]]
    assert rollout.batch([0]).input_ids.tolist() == [[1, 5, 10, 11]]


def test_responses_are_moved_to_the_end_of_a_batch_and_back():
    rollout = rollout_of([[1, 5], [1, 5, 6, 7], [1]], [2, 3, 4])
    batch = rollout.batch([2, 0])
    assert batch.fit(rollout.response_ids).tolist() == [[10, 11, 12, 13], [0, 0, 10, 11]]
    assert batch.fit(rollout.response_mask).tolist() == [[True] * 4, [False, False, True, True]]
    moved = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    back = torch.full((3, 6), 9.0)
    batch.put(moved, back, rollout.response_mask)
    assert back.tolist() == [[7, 8, 0, 0, 0, 0], [9] * 6, [1, 2, 3, 4, 0, 0]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_counts_once_over_all_ranks(ranks):
    rollout = rollout_of([[1]] * 5, [6, 1, 1, 2, 3])
    rows = [4, 0, 2, 3]
    seen, counts = [], set()
    for index in range(ranks):
        batches = list(micro_batches(rollout, rows, max_tokens=7, accelerator=rank(index, ranks)))
        counts.add(len(batches))
        seen += [int(row) for batch, real in batches if real for row in batch.index]
    assert sorted(seen) == sorted(rows)
    assert len(counts) == 1  # collectives must match


def test_dummy_micro_batches_do_not_count():
    rollout = rollout_of([[1]] * 2, [6, 6])
    plans = [list(micro_batches(rollout, [0], 100, rank(index, 2))) for index in (0, 1)]
    assert [[real for _, real in plan] for plan in plans] == [[True], [False]]
    other = evaluate_tokens(rollout, lambda batch: [torch.ones(len(batch.index), batch.length)], 1, 100, rank(1, 2))
    first = evaluate_tokens(rollout, lambda batch: [torch.ones(len(batch.index), batch.length)], 1, 100, rank(0, 2))
    assert_close(first[0] + other[0], torch.ones(2, 6))


def test_rounded_sizes_change_nothing_but_padding():
    plain, wide = (rollout_of([[1, 2, 3], [1, 2, 3, 4, 5], [1, 2]], [4, 1, 6]) for _ in range(2))
    wide.shapes = Shapes(0, Sizes(4), Sizes(12), Sizes(4))
    a, b = plain.batch([2, 0]), wide.batch([2, 0])
    assert (a.input_ids.shape, a.length, a.count) == ((2, 8), 6, 2)
    assert (b.input_ids.shape, b.length, b.count) == ((4, 12), 8, 2)
    assert torch.equal(a.input_ids[0], b.input_ids[0, 4:]) and torch.equal(a.input_ids[1, 1:], b.input_ids[1, 5:])
    assert torch.equal(a.attention_mask, b.attention_mask[:2, 4:]) and not b.attention_mask[:2, :4].any()
    assert torch.equal(b.input_ids[2], b.input_ids[0])  # something to compute with
    mask = b.fit(wide.response_mask)
    assert torch.equal(mask[:2, 2:], a.fit(plain.response_mask)) and mask.sum() == 10
    results = []
    for rollout in (plain, wide):
        results += evaluate_tokens(rollout, lambda batch: [batch.input_ids[:, -batch.length :].float()], 1, 100, rank())
    assert torch.equal(*results)


def test_evaluate_tokens_puts_rows_in_their_place_and_zero_on_padding():
    rollout = rollout_of([[1, 2], [1], [1, 2, 3]], [1, 4, 2])
    nan = float("nan")

    def forward(batch):
        out = batch.input_ids[:, -batch.length :].float() * 10 + batch.index[:, None]
        return [torch.where(batch.fit(rollout.response_mask), out, nan)]

    for budget in (1, 8, 100):
        (out,) = evaluate_tokens(rollout, forward, 1, budget, rank())
        assert out.tolist() == [[100, 0, 0, 0, 0, 0], [101, 111, 121, 131, 0, 0], [102, 112, 0, 0, 0, 0]]


# ----------------------------------------------------------------------------------------------- several in a row
def test_responses_side_by_side_by_hand():
    rollout = rollout_of([[1, 5], [1, 5, 6, 7], [1]], [2, 3, 4])
    batch = rollout.packed_batch([[1], [2, 0]], Packed(10, Sizes(3), Sizes(4)))
    assert batch.input_ids[0, :7].tolist() == [1, 5, 6, 7, 10, 11, 12]
    assert batch.input_ids[1, :9].tolist() == [1, 10, 11, 12, 13, 1, 5, 10, 11]
    assert batch.attention_mask.tolist() == [[1] * 7 + [0] * 3, [1] * 5 + [2] * 4 + [0], [0] * 10]
    (before,) = batch.before
    assert before[:9].tolist() == [3, 4, 5, 10, 11, 12, 13, 16, 17] and batch.count == 9 and len(before) == 12
    assert batch.fit(rollout.response_ids).tolist() == [10, 11, 12, 10, 11, 12, 13, 10, 11, 0, 0, 0]
    assert batch.fit(rollout.response_mask).tolist() == [True] * 9 + [False] * 3
    back = torch.full((3, 6), 9.0)
    batch.put(torch.arange(12.0), back, rollout.response_mask)
    assert back.tolist() == [[7, 8, 9, 9, 9, 9], [0, 1, 2, 9, 9, 9], [3, 4, 5, 6, 9, 9]]


@pytest.mark.parametrize("shape", SHAPES)
def test_side_by_side_changes_nothing(tmp_path, shape):
    sizes = {"rollout_batch_size": 8, "mini_batch_size": 4, "total_episodes": 16}
    sides = [toy_trainer(tmp_path / packing, shape, sizes | {"packing": packing}) for packing in ("off", "on")]
    apart, together = (first_rollout(trainer) for trainer in sides)
    assert apart.packed is None and together.packed is not None
    for name in ("response_ids", "logprobs", "ref_logprobs", "values", "entropy", "scores"):
        assert_close(getattr(together, name), getattr(apart, name), atol=2e-5)
    for _ in range(2):
        a, b = (trainer.step()[0] for trainer in sides)
        for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/grad_norm", "objective/kl"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-5), name
        assert b["perf/padding_share"] != a["perf/padding_share"]
        for trainer in sides:
            trainer.ppo_step += 1


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}  # fewer than a packed row has columns
FAMILIES = {
    "gpt2": GPT2,
    "llama": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "granite": SMALL | {"num_key_value_heads": 2, "logits_scaling": 4.0},  # its logits are not the head's alone
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},  # passes by its trunk
    "falcon": SMALL | {"alibi": False},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_side_by_side_is_the_same_for_every_family(family):
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family], **tokens)).eval()
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)  # numbers that tell rows apart
    assert special_attention(model) is None and has_plain_head(model) == (family != "granite")
    rollout = rollout_of([[5, 6, 7, 8, 9], [20], [30, 31, 32], [40, 41]], [6, 2, 3, 4])
    found = []
    for packed in (None, Packed(32), Packed(11)):
        rollout.packed = packed

        def forward(batch):
            response = batch.before[0] if batch.before else batch.length
            with explicit_masks():
                return response_logprobs(
                    model, batch.input_ids, batch.attention_mask, response, 1.0, True, has_plain_head(model)
                )[:2]

        found.append(torch.stack(evaluate_tokens(rollout, forward, 2, 1000, rank())))
    assert found[0][0].min() < -1
    assert_close(found[1], found[0], atol=1e-5)
    assert_close(found[2], found[0], atol=1e-5)


def test_a_bias_by_distance_needs_more_than_a_mask():
    config = SimpleNamespace(_attn_implementation="sdpa", alibi=True)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert "ALiBi" in special_attention(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 8}, "it has layers other than full attention: set ppo.packing: off"),
        ({"ranks": 2}, "there are 2 processes: set ppo.packing: off"),
        ({"plain_head": False}, "the model does more to its logits than its head: set ppo.packing: off"),
        ({}, None),
    ],
)
def test_where_responses_cannot_be_side_by_side(change, message):
    given = {"window": None, "ranks": 1, "plain_head": True} | change
    attention = SimpleNamespace(_attn_implementation="sdpa", sliding_window=given["window"])
    models = [SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: attention))]
    arguments = given["plain_head"], models, SimpleNamespace(num_processes=given["ranks"])
    assert wants_packing("auto", True, *arguments) == (message is None)
    assert not wants_packing("auto", False, *arguments) and not wants_packing("off", True, *arguments)
    if message is None:
        assert wants_packing("on", False, *arguments)
        return
    with pytest.raises(UserError, match=f"ppo.packing on: {message}"):
        wants_packing("on", True, *arguments)


# ------------------------------------------------------------------------------------------------------ whole rollouts
@pytest.mark.parametrize("shape", SHAPES)
def test_micro_batch_packing_changes_nothing(tmp_path, shape):
    sizes = {"rollout_batch_size": 8, "mini_batch_size": 8, "total_episodes": 8}
    one = first_rollout(toy_trainer(tmp_path, shape, sizes | {"max_tokens_per_micro_batch": 4096}))
    many = first_rollout(toy_trainer(tmp_path, shape, sizes | {"max_tokens_per_micro_batch": 1}))
    assert torch.equal(one.response_ids, many.response_ids)
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "scores"):
        assert_close(getattr(many, name), getattr(one, name), atol=2e-5)
    assert one.values.abs().max() > 0.1 and one.logprobs.min() < -1  # numbers that could differ


@pytest.mark.parametrize("shape", SHAPES)
def test_sampler_training_and_reference_logprobs_agree_before_any_update(tmp_path, shape):
    rollout = first_rollout(toy_trainer(tmp_path, shape, {"temperature": 0.6}))
    assert_close(rollout.sampler_logprobs, rollout.logprobs, atol=1e-5)
    assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5)
    assert rollout.response_mask.any(dim=1).all()
