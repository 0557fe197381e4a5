"""An estimate of memory per device before anything runs (`--dry-run`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.recipe import Recipe
    from rlhf.stage import StageContext

GIB = 2**30
TRAINED = 16  # bytes per trained parameter: weight, gradient and two Adam moments in float32


class Counts(NamedTuple):
    """Of a model, from its config: parameters, layers x width, vocabulary, and numbers in the cache of a token."""

    parameters: int
    width: int
    vocab: int
    cache: int


def counts_of(ctx: StageContext) -> Counts:
    """Counts of the model that the stage works on."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    from rlhf import models

    trusted = {"trust_remote_code": models.trust_remote_code}
    recipe = ctx.recipe
    if "sft" in ctx.inputs:
        config = AutoConfig.from_pretrained(str(ctx.inputs["sft"].model_dir), **trusted)
    elif recipe.pretrain and recipe.pretrain.architecture:
        config = GPT2Config(**recipe.pretrain.architecture.model_dump(), bos_token_id=None, eos_token_id=None)
    else:
        kwargs = trusted | ({"gguf_file": recipe.model.gguf_file} if recipe.model.gguf_file else {})
        base = models.base_path(recipe.model)
        try:
            config = AutoConfig.from_pretrained(base, revision=recipe.model.revision, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"model {recipe.model.base}: cannot be loaded ({reason}): check model.base") from None
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **trusted)
    model.tie_weights()  # a tied head is counted once
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width, cache = text.num_hidden_layers * text.hidden_size, 2 * text.num_hidden_layers * heads * each
    return Counts(model.num_parameters(), width, text.vocab_size, cache)


def estimate(ctx: StageContext) -> list[str]:
    """Lines of the estimate, per device with DDP (FSDP divides the weights by the number of devices).

    Weights and optimiser are exact; activations are the usual 16 bytes x layers x width per token (34 without
    flash-like attention), logits 12 bytes x vocabulary per token. Expect it within a factor of 1.5.
    """
    from rlhf.models import LOGITS_BYTES

    model = counts_of(ctx)
    name, recipe = ctx.stage.name, ctx.recipe
    tokens, trained, frozen = _work(ctx, model.parameters)
    each = _bytes(recipe)
    weights, activations = trained * TRAINED + frozen * each, tokens * model.width * 34
    logits, cache = 0 if name == "reward" else tokens * model.vocab * 12, 0
    if name == "ppo":
        logits = min(logits, 3 * LOGITS_BYTES)  # computed in chunks
        cache = _sampled_tokens(recipe) * model.cache * each
    total = weights + activations + logits + cache
    millions = [f"{count / 1e6:.1f} M" for count in (model.parameters, trained, frozen)]
    return [
        "{}: {} parameters; {} trained, {} frozen".format(name, *millions),
        f"weights and optimiser {weights / GIB:.2f} GiB, activations of {tokens} tokens {activations / GIB:.2f} GiB, "
        f"logits {logits / GIB:.2f} GiB" + (f", cache of sampling {cache / GIB:.2f} GiB" if cache else ""),
        f"about {total / GIB:.2f} GiB per device (precision {recipe.hardware.precision}), plus 0.5 GiB of libraries",
    ]


def _bytes(recipe: Recipe) -> int:
    """Bytes of a number that is not trained. A recipe for a GPU can be looked at where there is none."""
    import torch

    hardware = recipe.hardware
    on_gpu = hardware.device == "cuda" or (hardware.device == "auto" and torch.cuda.is_available())
    return 2 if hardware.precision == "bf16" or (hardware.precision == "auto" and on_gpu) else 4


def _sampled_tokens(recipe: Recipe) -> int:
    """Tokens whose keys and values are held at once; one process samples the whole rollout."""
    ppo = recipe.ppo
    at_once = ppo.rollout_batch_size if ppo.generator == "plain" else min(ppo.rollout_batch_size, ppo.generation_slots)
    return at_once * (ppo.max_prompt_length + ppo.response_length)


def _work(ctx: StageContext, parameters: int) -> tuple[int, int, int]:
    """Tokens of one forward, trained parameters, frozen parameters."""
    recipe, name = ctx.recipe, ctx.stage.name
    adapters = parameters // 50 if recipe.uses_peft(name) else 0  # rank 16 on all linear layers is about 2 %
    if name == "ppo":
        ppo = recipe.ppo
        copies = 1 if ppo.critic == "shared" else 2
        rewards = sum(source.artifact is not None for source in ppo.rewards)
        trained = copies * (adapters or parameters)
        sampling = 0 if ppo.generator == "plain" or recipe.hardware.device == "cpu" else parameters  # a bf16 copy
        frozen = sampling + (parameters if adapters else parameters * (1 + rewards))
        return ppo.max_tokens_per_micro_batch, trained, frozen
    if name == "evaluate":
        return 64 * recipe.ppo.response_length, 0, 2 * parameters
    section: Any = recipe.section(name)
    batch = section.trainer.get("per_device_train_batch_size", 8)
    length = section.block_size if name == "pretrain" else section.max_length
    tokens = batch * length * (2 if name == "reward" else 1)
    return tokens, adapters or parameters, parameters if adapters else 0
