"""The four shapes of policy and critic: what is trained, what is the reference, what is published."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models import load_model, response_logprobs
from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.build import publish_models
from rlhf.ppo.checkpoint import trainable_state
from tests.ppo_toys import SHAPES, first_rollout, rows_of, toy_context, toy_trainer, trainer_of, weights
from tests.tolerances import assert_close

FAST = {"learning_rate": 1e-2, "missing_eos_penalty": None, "kl_coef": 0.0}
LORA = ("lora-separate", "lora-shared")


def model_of(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)


def whole_batch(rollout):
    return rollout.batch(range(len(rollout.prompts)))


@pytest.mark.parametrize("shape", LORA)
def test_with_every_adapter_off_it_is_the_sft_model(tmp_path, shape):
    ctx = toy_context(tmp_path, shape, FAST)
    trainer = trainer_of(ctx)
    trainer.step()
    rollout = first_rollout(trainer)
    sft = load_model(ctx.inputs["sft"].model_dir)
    batch = whole_batch(rollout)
    with torch.no_grad():
        expected = response_logprobs(sft, batch.input_ids, batch.attention_mask, batch.length, 0.7, False)[0]
    mask = batch.fit(rollout.response_mask)
    assert_close(batch.fit(rollout.ref_logprobs)[mask], expected[mask], atol=1e-5)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 1e-3  # the policy has moved


@pytest.mark.parametrize("shape", LORA)
def test_one_backward_reaches_every_trained_adapter_and_nothing_else(tmp_path, shape):
    trainer = toy_trainer(tmp_path, shape, FAST)
    model = model_of(trainer)
    with torch.no_grad():  # lora_B starts at 0, and lora_A then has no gradient
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = whole_batch(first_rollout(trainer))
    out = model(batch.input_ids, batch.attention_mask, batch.length, 0.7)
    (out.logprobs.sum() + out.values.square().sum()).backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    adapters = {"policy", "critic"} if shape == "lora-separate" else {"policy"}
    expected = {n for n, _ in model.named_parameters() if "lora_" in n and n.split(".")[-2] in adapters}
    calibrated = {"value_bias"} if shape == "lora-separate" else set()
    assert graded == expected | {"value_head.weight"} | calibrated
    assert all(p.grad is None for name, p in model.named_parameters() if name not in graded)
    assert graded == {name for name, p in model.named_parameters() if p.requires_grad}


def test_policy_and_critic_adapters_do_not_leak_into_each_other(tmp_path):
    trainer = toy_trainer(tmp_path, "lora-separate", FAST)
    model, rollout = model_of(trainer), first_rollout(trainer)
    batch = whole_batch(rollout)
    before = model(batch.input_ids, batch.attention_mask, batch.length, 0.7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.critic" in name:
                parameter += 0.1
    after = model(batch.input_ids, batch.attention_mask, batch.length, 0.7)
    assert torch.equal(before.logprobs, after.logprobs)
    assert (before.values - after.values).abs().max() > 1e-3


@pytest.mark.parametrize("shape", LORA)
def test_reward_adapter_scores_like_the_published_reward_model(tmp_path, shape):
    ctx = toy_context(tmp_path, shape, FAST)
    trainer = trainer_of(ctx)
    rollout = first_rollout(trainer)
    reward = AutoModelForSequenceClassification.from_pretrained(ctx.inputs["reward"].model_dir).eval()
    for row, score in enumerate(rollout.raw_scores["reward"].tolist()):
        ids = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()], rollout.response_ids[row]
        ids = torch.cat([ids[0], ids[1][rollout.response_mask[row]]])[None]
        raw = float(reward(ids).logits.detach())
        assert_close(score, (raw - 0.25) / 2.0, atol=1e-4)  # mean and std of the toy reward's manifest


@pytest.mark.parametrize("shape", ["full-separate", "lora-separate"])
def test_the_critic_starts_as_the_reward_model_on_the_scale_of_the_scores(tmp_path, shape):
    ctx = toy_context(tmp_path, shape)
    rollout = first_rollout(trainer_of(ctx))
    reward = AutoModelForSequenceClassification.from_pretrained(ctx.inputs["reward"].model_dir).eval()
    ids = rollout.prompt_ids[0][rollout.prompt_mask[0].bool()][None]
    assert_close(float(rollout.values[0, 0]), float(reward(ids).logits.detach()) / 2.0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_published_is_what_was_trained(tmp_path, shape):
    ctx = toy_context(tmp_path, shape, FAST)
    trainer = trainer_of(ctx)
    before = weights(trainer)
    trainer.step()
    trained = [n for n, p in model_of(trainer).named_parameters() if p.requires_grad]
    after = weights(trainer)
    still = [name for name in trained if torch.equal(before[name], after[name])]
    assert not [name for name in still if "lora_A" not in name]  # (lora_A moves once lora_B is not 0)
    tokenizer = AutoTokenizer.from_pretrained(ctx.inputs["sft"].model_dir)
    publish_models(ctx, tokenizer, trainable_state(trainer.model, trainer.accelerator))

    rollout = first_rollout(trainer)
    batch, mask = whole_batch(rollout), rollout.response_mask
    policy = AutoModelForCausalLM.from_pretrained(ctx.dir / "model").eval()
    assert policy.lm_head.weight is policy.transformer.wte.weight
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id == 2
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id == 0
    with torch.no_grad():
        logprobs = response_logprobs(policy, batch.input_ids, batch.attention_mask, batch.length, 0.7, False)[0]
    assert_close(logprobs[batch.fit(mask)], rollout.logprobs[mask], atol=2e-5)

    critic = AutoModelForSequenceClassification.from_pretrained(ctx.dir / "critic").eval()
    assert critic.config.num_labels == 1
    bias = 0.0 if model_of(trainer).value_bias is None else model_of(trainer).value_bias.item()
    for row in range(len(rollout.prompts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        for t in range(int(mask[row].sum())):
            state = torch.cat([prompt, rollout.response_ids[row, :t]])
            if state[-1] != 0:  # the classifier reads at the last token that is not the pad id
                assert_close(
                    float(rollout.values[row, t]), float(critic(state[None]).logits.detach()) + bias, atol=1e-4
                )
    assert (ctx.dir / "adapter" / "adapter_model.safetensors").is_file() == shape.startswith("lora")
    if shape.startswith("lora"):  # PEFT's own order is another one in another process
        modules = json.loads((ctx.dir / "adapter" / "adapter_config.json").read_text())["target_modules"]
        assert modules == sorted(modules) and len(modules) > 2


@pytest.mark.parametrize("shape", LORA)
def test_the_published_adapter_on_the_sft_model_is_the_published_policy(tmp_path, shape):
    from peft import PeftModel

    ctx = toy_context(tmp_path, shape, FAST)
    trainer = trainer_of(ctx)
    trainer.step()
    tokenizer = AutoTokenizer.from_pretrained(ctx.inputs["sft"].model_dir)
    publish_models(ctx, tokenizer, trainable_state(trainer.model, trainer.accelerator))
    adapted = PeftModel.from_pretrained(load_model(ctx.inputs["sft"].model_dir), str(ctx.dir / "adapter")).eval()
    ids = torch.tensor([[1, 40, 41, 42]])
    merged = AutoModelForCausalLM.from_pretrained(ctx.dir / "model").eval()
    with torch.no_grad():
        assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4)
        assert (merged(ids).logits - load_model(ctx.inputs["sft"].model_dir)(ids).logits).abs().max() > 1e-3


def test_only_trained_tensors_are_kept_for_lora(tmp_path):
    trainer = toy_trainer(tmp_path, "lora-separate")
    state = trainable_state(trainer.model, trainer.accelerator)
    assert all(
        ("lora_" in name and "reward" not in name) or name in ("value_head.weight", "value_bias") for name in state
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_first_ratio_is_one_and_first_kl_zero(tmp_path, shape):
    trainer = toy_trainer(tmp_path, shape, {"num_ppo_epochs": 1, "mini_batch_size": 4})
    metrics, _ = trainer.step()
    assert_close(metrics["val/ratio"], 1.0, atol=1e-6)
    assert metrics["policy/approxkl_avg"] < 1e-10 and metrics["policy/clipfrac_avg"] == 0
    assert abs(metrics["objective/kl"]) < 1e-5
    assert metrics["rollout/logprob_drift"] < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_gives_the_same_update(tmp_path, shape):
    if shape == "lora-separate":
        with pytest.raises(UserError, match="wrong adapter"):
            ppo_stage.check(toy_context(tmp_path, shape, {"gradient_checkpointing": True}))
        return
    plain, saving = (
        toy_trainer(tmp_path / str(on), shape, FAST | {"gradient_checkpointing": on}) for on in (False, True)
    )
    plain.step(), saving.step()
    other = weights(saving)
    for name, value in weights(plain).items():
        assert_close(other[name], value, atol=1e-5)


def test_a_reward_adapter_of_another_sft_model_is_refused_as_critic(tmp_path):
    ctx = toy_context(tmp_path, "lora-separate")
    ctx.inputs["reward"].manifest["inputs"]["sft"] = "another hash"
    with pytest.raises(UserError, match=r"ppo\.critic_init"):
        ppo_stage.check(ctx)


@pytest.mark.parametrize("shape", LORA)
def test_a_reward_model_with_full_weights_serves_a_lora_policy(tmp_path, shape):
    toy_context(tmp_path, "full-separate")
    ctx = toy_context(tmp_path, shape, {"critic_init": "sft"})
    ppo_stage.check(ctx)
    trainer = trainer_of(ctx)
    trainer.train()
    assert len(rows_of(ctx.dir / "metrics.jsonl")) == 2
