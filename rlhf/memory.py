"""An estimate of memory per device before anything runs (`--dry-run`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.stage import StageContext

GIB = 2**30
TRAINED = 16  # bytes per trained parameter: weight, gradient and two Adam moments in float32


def parameter_count(ctx: StageContext) -> tuple[int, int, int]:
    """Parameters, layers x width, and vocabulary of the model that the stage works on, from its config alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    from rlhf import models

    trusted = {"trust_remote_code": models.trust_remote_code}
    recipe = ctx.recipe
    if "sft" in ctx.inputs:
        config = AutoConfig.from_pretrained(str(ctx.inputs["sft"].model_dir), **trusted)
    elif recipe.pretrain and recipe.pretrain.architecture:
        config = GPT2Config(**recipe.pretrain.architecture.model_dump())
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
    return model.num_parameters(), text.num_hidden_layers * text.hidden_size, text.vocab_size


def estimate(ctx: StageContext) -> list[str]:
    """Lines of the estimate, per device with DDP (FSDP divides the weights by the number of devices).

    Weights and optimiser are exact; activations are the usual 16 bytes x layers x width per token (34 without
    flash-like attention), logits 12 bytes x vocabulary per token. Expect it within a factor of 1.5.
    """
    from rlhf.models import LOGITS_BYTES

    parameters, width, vocab = parameter_count(ctx)
    name, recipe = ctx.stage.name, ctx.recipe
    tokens, trained, frozen = _work(ctx, parameters)
    activations, logits = tokens * width * 34, 0 if name == "reward" else tokens * vocab * 12
    if name == "ppo":
        logits = min(logits, 3 * LOGITS_BYTES)  # computed in chunks
    total = trained * TRAINED + frozen * 4 + activations + logits
    return [
        f"{name}: {parameters / 1e6:.1f} M parameters; {trained / 1e6:.1f} M trained, {frozen / 1e6:.1f} M frozen",
        f"weights and optimiser {(trained * TRAINED + frozen * 4) / GIB:.2f} GiB, activations of {tokens} tokens "
        f"{activations / GIB:.2f} GiB, logits {logits / GIB:.2f} GiB",
        f"about {total / GIB:.2f} GiB per device (precision {recipe.hardware.precision}), plus 0.5 GiB of libraries",
    ]


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
