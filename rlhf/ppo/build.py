"""From artifacts to the modules that PPO trains, and from trained tensors back to artifacts."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.artifacts import KEPT_POLICIES, Artifact
from rlhf.errors import UserError
from rlhf.functions import load_function
from rlhf.graphs import Graphed, GraphPool
from rlhf.models import (
    ActorCritic,
    Response,
    Scorer,
    attention_options,
    check_saved,
    compile_blocks,
    compute_dtype,
    keep_residuals_in,
    load_model,
    lora_config,
    new_reward_model,
    response_logprobs,
    save_adapter,
    save_model,
    special_attention,
)
from rlhf.ppo.generation import CompiledGenerator, Generator, PlainGenerator
from rlhf.ppo.generation.vllm import VLLMGenerator
from rlhf.ppo.rewards import FunctionScore, ModelScore, ScoreSource
from rlhf.recipe import source_names
from rlhf.stage import StageContext

COMPILE_FROM_STEPS = 200
SLOTS_FROM_STEPS = 5  # 135M, H200: the first update took 6 s and later ones 1.5 s, against 3.8 s with `plain`


# ------------------------------------------------------------------------------------------------------ what is trained
def build_actor_critic(ctx: StageContext) -> ActorCritic:
    """Policy and critic from the SFT and reward artifacts, ready for `accelerator.prepare`."""
    config, sft = ctx.recipe.ppo, ctx.inputs["sft"]
    if ctx.recipe.uses_peft("ppo"):
        model = _build_lora(ctx)
    else:
        policy = load_model(sft.model_dir, **_attention(ctx))
        if config.critic == "shared":
            model = ActorCritic(policy, None, value_head(policy, ctx.seed))
        else:
            model = ActorCritic(policy, _build_critic(ctx), None, config.calibrates_critic)
    # Sampling is described by the recipe; the base's own top-k or repetition penalty would make another policy.
    model.policy.generation_config = GenerationConfig()
    for part in (model.policy, model.critic):
        if part is not None:
            keep_residuals_in(compute_dtype(ctx.recipe), part)
    if config.gradient_checkpointing:
        for part in (model.policy, model.critic):
            if part is not None:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                part.train()  # transformers recomputes in train mode only; dropout is off all the same
    return model


def _attention(ctx: StageContext) -> dict[str, str]:
    return attention_options(ctx.recipe.model)


def value_head(model: nn.Module, seed: int) -> nn.Linear:
    """A fresh head on a trunk, drawn from N(0, 1/(d+1)) (N+)."""
    width = model.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * (width + 1) ** -0.5)
    return head


def critic_source(ctx: StageContext) -> Artifact | None:
    """The reward artifact that the critic starts from; None = the SFT model with a fresh head."""
    if ctx.recipe.ppo.critic_init == "sft":
        return None
    sources = sorted(ctx.recipe.ppo.rewards, key=lambda source: source.weight == 0)  # judges last
    return next(ctx.inputs[source.artifact] for source in sources if source.artifact)


def _build_critic(ctx: StageContext) -> PreTrainedModel:
    source = critic_source(ctx)
    if source is None:
        return new_reward_model(ctx.inputs["sft"].model_dir, ctx.seed, **_attention(ctx))
    critic = load_model(source.model_dir, "score", **_attention(ctx))
    with torch.no_grad():  # scores are divided by the std before PPO sees them: values are on that scale too
        critic.score.weight /= source.manifest["reward_statistics"]["std"]
    return critic


def _build_lora(ctx: StageContext) -> ActorCritic:
    """Adapters "policy", "critic" and one per reward model on one copy of the SFT model; all off = the reference."""
    from peft import get_peft_model

    config, peft = ctx.recipe.ppo, ctx.recipe.peft
    # FSDP2 wants one dtype in all it shards, adapters included; it computes in bf16 all the same.
    dtype = torch.float32 if os.environ.get("ACCELERATE_USE_FSDP") == "true" else compute_dtype(ctx.recipe)
    base = load_model(ctx.inputs["sft"].model_dir, dtype=dtype, **_attention(ctx))
    torch.manual_seed(ctx.seed)  # adapters are drawn at random, the same on every rank
    policy = get_peft_model(base, lora_config(peft, "CAUSAL_LM", dropout=False), adapter_name="policy")
    head = value_head(base, ctx.seed)
    heads = nn.ModuleDict()
    if config.critic == "separate":
        source = critic_source(ctx)
        if source is None:
            policy.add_adapter("critic", lora_config(peft, "CAUSAL_LM", dropout=False))
        else:
            weight = load_reward_adapter(policy, source, "critic")
            with torch.no_grad():
                head.weight.copy_(weight / source.manifest["reward_statistics"]["std"])
    for name, artifact in shared_rewards(ctx).items():
        heads[name] = nn.Linear(head.in_features, 1, bias=False)
        with torch.no_grad():
            heads[name].weight.copy_(load_reward_adapter(policy, artifact, name))
    model = ActorCritic(policy, None, head, config.calibrates_critic)
    model.reward_heads = heads
    for name, parameter in model.named_parameters():
        trained = ".policy." in name or ".critic." in name
        parameter.requires_grad_(name.startswith("value_") or (trained and "lora_" in name))
    return model


def shared_rewards(ctx: StageContext) -> dict[str, Artifact]:
    """Reward artifacts that are adapters of this run's SFT model, by adapter name."""
    if not ctx.recipe.uses_peft("ppo"):
        return {}
    found = {}
    for number, source in enumerate(ctx.recipe.ppo.rewards):
        artifact = ctx.inputs[source.artifact] if source.artifact else None
        if artifact and is_adapter_of(artifact, ctx.inputs["sft"]):
            found[f"reward{number}"] = artifact
    return found


def is_adapter_of(artifact: Artifact, sft: Artifact) -> bool:
    """Whether a reward artifact holds an adapter that was trained on exactly this SFT model."""
    return (artifact.path / "adapter").is_dir() and artifact.manifest["inputs"].get("sft") == sft.hash


def load_reward_adapter(policy: Any, artifact: Artifact, name: str) -> Tensor:
    """Add a reward artifact's adapter to the causal LM as `name`; returns its score head's weight [1,D].

    Raises:
        UserError: the artifact has no adapter.
    """
    from peft import set_peft_model_state_dict

    directory = artifact.path / "adapter"
    if not directory.is_dir():
        raise UserError(
            f"artifact {artifact.path}: was trained with full weights, and a LoRA critic starts from an adapter: add "
            "`reward` to peft.stages, or set ppo.critic_init: sft"
        )
    policy.add_adapter(name, _reward_adapter_config(artifact))
    state = load_file(directory / "adapter_model.safetensors")
    head = state.pop(next(key for key in state if key.endswith("score.weight")))
    result = set_peft_model_state_dict(policy, state, adapter_name=name)
    if result.unexpected_keys:
        raise RuntimeError(f"{directory}: adapter tensors without a place: {result.unexpected_keys[:3]}")
    return head


def _reward_adapter_config(artifact: Artifact) -> Any:
    """LoraConfig of a reward artifact's adapter as one of a causal LM: dropout off, the score head apart."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(artifact.path / "adapter"))
    config.task_type, config.modules_to_save, config.lora_dropout = "CAUSAL_LM", None, 0.0
    return config


# --------------------------------------------------------------------------------------------------------- what samples
def build_generator(
    ctx: StageContext, model: ActorCritic, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Generator:
    """The back end that `ppo.generator` names.

    Raises:
        UserError: `compiled` or `vllm` cannot sample from this model, or vLLM is not installed.
    """
    config, dtype = ctx.recipe.ppo, compute_dtype(ctx.recipe)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if config.generator == "vllm":
        if sharded or model.has_adapters:
            raise UserError("ppo.generator vllm: needs the whole, full weights on each rank: set ppo.generator: auto")
        length = config.max_prompt_length + config.response_length
        policy: Any = model.policy
        return VLLMGenerator(policy, tokenizer, accelerator, length, config.vllm_memory, config.stop_strings)
    reason = special_attention(model.policy)
    if config.stop_strings:
        reason = "ppo.stop_strings are looked for in text"
    if sharded:
        reason = "no rank holds the whole weights"
    if config.generator == "compiled" and reason:
        raise UserError(f"ppo.generator compiled: {reason}: set ppo.generator: plain")
    if reason or not wants_slots(config.generator, config.total_steps, accelerator.device):
        return PlainGenerator(model, tokenizer, config.stop_strings, synced=sharded, autocast=dtype)
    adapter = partial(model.adapter, "policy")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    compiled = wants_compile(ctx, accelerator.device)
    return CompiledGenerator(model.policy, pad, eos, config.generation_slots, dtype, adapter, compiled)


def wants_slots(generator: str, total_steps: int, device: torch.device) -> bool:
    """Whether the `compiled` back end samples: recording its graph costs seconds, a few ppo_steps' gain."""
    if generator == "auto":
        return device.type == "cuda" and total_steps >= SLOTS_FROM_STEPS
    return generator == "compiled"


def wants_compile(ctx: StageContext, device: torch.device) -> bool:
    """Whether the blocks are compiled: it costs about a minute, which a short run does not earn back."""
    config = ctx.recipe.ppo
    if config.compile == "auto":
        return device.type == "cuda" and config.total_steps >= COMPILE_FROM_STEPS
    return config.compile == "on"


# --------------------------------------------------------------------------------------------------- what is only read
class Reference:
    """Log-probabilities of responses under the SFT model: a frozen copy, or the same model with adapters off."""

    def __init__(self, ctx: StageContext, model: nn.Module, accelerator: Accelerator) -> None:
        self.temperature = ctx.recipe.ppo.temperature
        self.model = model
        self.chunked = accelerator.unwrap_model(model).plain_head
        self.frozen: nn.Module | None = None
        if not ctx.recipe.uses_peft("ppo"):
            dtype = compute_dtype(ctx.recipe)
            frozen = load_model(ctx.inputs["sft"].model_dir, dtype=dtype, **_attention(ctx))
            self.frozen = frozen.to(accelerator.device).eval().requires_grad_(False)
            if wants_compile(ctx, accelerator.device):
                compile_blocks(self.frozen)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, response: Response) -> Tensor:
        """[b,R'] in nats; of packed rows [N]."""
        if self.frozen is None:
            return self.model(input_ids, attention_mask, response, self.temperature, mode="reference")
        args = input_ids, attention_mask, response, self.temperature
        return response_logprobs(self.frozen, *args, entropy=False, chunked=self.chunked)[0]


def build_rewards(
    ctx: StageContext, model: nn.Module, accelerator: Accelerator, graph_pool: GraphPool | None
) -> list[ScoreSource]:
    """The recipe's reward sources in order. With a `graph_pool` their forwards become CUDA graphs."""
    shared = shared_rewards(ctx)
    sources: list[ScoreSource] = []
    names = source_names(ctx.recipe.ppo.rewards)
    for number, (name, source) in enumerate(zip(names, ctx.recipe.ppo.rewards, strict=True)):
        if source.function is not None:
            function, timeout = load_function(source.function), ctx.recipe.ppo.reward_timeout
            sources.append(FunctionScore(name, source.weight, function, timeout))
            continue
        artifact = ctx.inputs[source.artifact]
        statistics = artifact.manifest["reward_statistics"]
        if f"reward{number}" in shared:
            forward = _shared_forward(model, f"reward{number}", graph_pool)
        else:
            forward = _frozen_forward(ctx, artifact, accelerator, graph_pool)
        sources.append(ModelScore(name, source.weight, forward, statistics["mean"], statistics["std"]))
    return sources


def _shared_forward(model: nn.Module, name: str, graph_pool: GraphPool | None) -> Any:
    graphed = Graphed(lambda ids, mask: model(ids, mask, 0, 1.0, mode=f"reward:{name}"), graph_pool)
    return lambda batch: graphed(batch.input_ids, batch.attention_mask)


def _frozen_forward(
    ctx: StageContext, artifact: Artifact, accelerator: Accelerator, graph_pool: GraphPool | None
) -> Any:
    reward = load_model(artifact.model_dir, "score", dtype=compute_dtype(ctx.recipe), **_attention(ctx))
    scorer = Scorer(reward).to(accelerator.device).eval().requires_grad_(False)
    if wants_compile(ctx, accelerator.device):
        compile_blocks(reward)
    graphed = Graphed(scorer, None if special_attention(reward) else graph_pool)
    return lambda batch: graphed(batch.input_ids, batch.attention_mask)


# -------------------------------------------------------------------------------------------------------------- publish
def publish_models(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor]) -> None:
    """Write `model/`, `critic/` (and `adapter/`) from trained tensors, on CPU, on rank 0, and check what was written.

    Built from the inputs and the tensors alone, so that it does not matter how the training was sharded.
    """
    lora = ctx.recipe.uses_peft("ppo")
    if lora:
        config = lora_config(ctx.recipe.peft, "CAUSAL_LM", dropout=False)
        policy = _merge_lora(ctx, state, "policy", "causal", config, ctx.dir / "adapter")
    else:
        policy = _full_policy(ctx, state)
    save_model(policy, tokenizer, ctx.dir / "model")
    check_saved(policy, ctx.dir / "model", "causal")
    critic = _published_critic(ctx, state, policy)
    save_model(critic, tokenizer, ctx.dir / "critic")
    check_saved(critic, ctx.dir / "critic", "score")


def publish_policies(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, kept: dict[int, dict[str, Tensor]]) -> None:
    """Write the policies of kept steps to `policies/step_N/`: a model each, with LoRA an adapter of the SFT model."""
    for step, state in kept.items():
        directory = ctx.dir / KEPT_POLICIES / f"step_{step:06d}"
        if ctx.recipe.uses_peft("ppo"):
            config = lora_config(ctx.recipe.peft, "CAUSAL_LM", dropout=False)
            _merge_lora(ctx, state, "policy", "causal", config, directory)
        else:
            save_model(_full_policy(ctx, state), tokenizer, directory)


def _full_policy(ctx: StageContext, state: dict[str, Tensor]) -> PreTrainedModel:
    policy = load_model(ctx.inputs["sft"].model_dir)
    _load(policy, state, "policy.")
    return policy


def _published_critic(ctx: StageContext, state: dict[str, Tensor], policy: PreTrainedModel) -> PreTrainedModel:
    sft = ctx.inputs["sft"].model_dir
    if any(name.startswith("critic.") for name in state):
        critic = load_model(sft, "score")
        _load(critic, state, "critic.")
        return critic
    if any(".critic." in name for name in state):
        critic = _merge_lora(ctx, state, "critic", "score", _critic_adapter_config(ctx))
    else:  # shared trunk: the policy's
        critic = load_model(ctx.dir / "model", "score")
    with torch.no_grad():
        critic.score.weight.copy_(state["value_head.weight"])
    return critic


def _critic_adapter_config(ctx: StageContext) -> Any:
    """Rank and scale of the critic's adapter: the reward adapter's where it started from one."""
    source = critic_source(ctx)
    if source is None:
        return lora_config(ctx.recipe.peft, "CAUSAL_LM", dropout=False)
    return _reward_adapter_config(source)


def _merge_lora(
    ctx: StageContext, state: dict[str, Tensor], name: str, kind: Any, config: Any, adapter: Path | None = None
) -> Any:
    """The SFT model in float32 with adapter `name` folded in; writes the adapter too if asked."""
    from peft import get_peft_model

    base = load_model(ctx.inputs["sft"].model_dir, kind)
    config.task_type = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
    model = get_peft_model(base, config)
    part = {key.replace(f".{name}.", ".default."): value for key, value in state.items() if f".{name}." in key}
    _load(model, part, "policy.", adapters_only=True)
    if adapter is not None:
        save_adapter(model, adapter)
    return model.merge_and_unload()


def _load(model: nn.Module, state: dict[str, Tensor], prefix: str, adapters_only: bool = False) -> None:
    """Load the tensors below `prefix`; every trained tensor must find its place and every place its tensor."""
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    result = model.load_state_dict(part, strict=False)
    named = dict(model.named_parameters())  # a tied weight appears once here, and needs one tensor
    missing = [key for key in named if key in result.missing_keys and ("lora_" in key or not adapters_only)]
    if result.unexpected_keys or missing:
        raise RuntimeError(
            f"trained tensors do not fit: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
        )
