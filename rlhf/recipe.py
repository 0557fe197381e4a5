"""The typed recipe: every number's meaning, unit, range, default and source, once.

A recipe is one YAML file with one section per stage, sparse: it says only what differs from the defaults below.
Anything unknown, mistyped or out of range is refused before a model is loaded. Imports no torch.

Sources of the PPO defaults: "N+" is Huang et al. 2024, *The N+ Implementation Details of RLHF with PPO*.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlhf.errors import UserError
from rlhf.yamlio import parse_scalar, read_yaml, validate

RECIPE_DIR = Path(__file__).resolve().parents[1] / "pipelines" / "recipes"
MAX_SEED = 2**32 - 1  # the largest that numpy takes


class Section(BaseModel):
    """Strict base: an unknown key or a wrong type is an error, and a loaded recipe does not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    # Fields that never change what a finished stage hands on: changing one must not redo it, nor forbid to continue.
    not_identity: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """What decides the result of a stage, as plain data, for fingerprints."""
        return self.model_dump(mode="json", exclude=set(self.not_identity))


class ModelSection(Section):
    """The base model that the run starts from, and how text becomes tokens."""

    base: str | None = Field(None, description="Hub id, local path, or (with `package`) a folder inside that package.")
    revision: str | None = Field(None, description="Hub revision of the base; pin it for a reproducible run.")
    package: str | None = Field(None, description="Installed Python package that ships the base; `base` is inside it.")
    gguf_file: str | None = Field(None, description="GGUF file inside the base folder, dequantised on load.")
    trust_remote_code: bool = Field(False, description="Run Python code that the base ships.")
    attn_implementation: str | None = Field(None, description="transformers' attn_implementation; null = its default.")
    chat: bool = Field(False, description="Render prompts through the chat template instead of as plain text.")
    chat_template: str | None = Field(None, description="Path of a Jinja file that replaces the base's chat template.")
    pad_token: str | None = Field(None, description="Token used for padding; added (embedding resized) if absent.")
    eos_token: str | None = Field(None, description="Token that ends a response; null = the tokenizer's own.")
    bos_token: str | None = Field(None, description="Start token; null = the tokenizer's own.")


class PeftSection(Section):
    """LoRA for sft, reward and ppo: adapters on the one merged SFT model. Hu et al. 2021."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the update.")
    lora_alpha: float = Field(32, gt=0, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter input (sft and reward; ppo uses 0)."
    )
    target_modules: str | list[str] = Field("all-linear", description="Module names, or 'all-linear'.")
    stages: list[Literal["sft", "reward", "ppo"]] = Field(
        ["sft", "reward", "ppo"], description="The stages that train adapters; the others train full weights."
    )


class Architecture(Section):
    """A GPT-2-shaped model trained from scratch (`pretrain` without `model.base`)."""

    vocab_size: int = Field(4096, ge=300, le=200_000, description="BPE vocabulary, specials included.")
    n_positions: int = Field(128, ge=16, description="Longest sequence in tokens.")
    n_embd: int = Field(128, ge=8, description="Width.")
    n_layer: int = Field(4, ge=1, description="Blocks.")
    n_head: int = Field(4, ge=1, description="Attention heads; divides n_embd.")

    @model_validator(mode="after")
    def _divides(self) -> Architecture:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide by n_head {self.n_head}: pick n_head that does")
        return self


class PretrainSection(Section):
    """(Continued) pre-training on raw text. From scratch when `architecture` is given."""

    data: list[str] = Field(min_length=1, description="Data recipes read as raw text, concatenated.")
    split: str = Field("train", description="The split that is read.")
    architecture: Architecture | None = Field(None, description="Train a tokenizer and a model from scratch.")
    block_size: int = Field(128, ge=8, description="Tokens per packed training row.")
    max_tokens: int | None = Field(None, ge=1, description="Stop reading text after this many tokens.")
    trainer: dict[str, Any] = Field({}, description="Passed to transformers.TrainingArguments.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null = the recipe's seed.")


class SftSection(Section):
    """Supervised fine-tuning with TRL's SFTTrainer, loss on completions."""

    data: str = Field(description="Data recipe of prompt/completion rows.")
    split: str = Field("train", description="Training split.")
    eval_split: str | None = Field("validation", description="Held-out split for loss and EOS rate; null = none.")
    max_length: int = Field(1024, ge=2, description="Longest prompt + completion in tokens; longer rows are dropped.")
    eos_prompts: int = Field(128, ge=0, description="Held-out prompts sampled to measure the EOS rate; 0 = skip.")
    eos_max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Budget of that sampling; null = ppo.response_length. Without `ppo` null = 128, or half the "
        "model's position limit where that is less; prompts that leave no room for the budget are then left out.",
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many training rows.")
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Training steps as CUDA graphs, as `ppo.cuda_graphs`. Not with dropout, packing, or another loss "
        "than TRL's `nll`.",
    )
    trainer: dict[str, Any] = Field({}, description="Passed to TRL's SFTConfig, checked before anything loads.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null = the recipe's seed.")


class OtherPairs(Section):
    """A preference set that the reward model was not trained for, measured by name."""

    data: str = Field(description="Data recipe of prompt/chosen/rejected rows.")
    split: str = Field("test", description="The split that is read.")
    limit: int | None = Field(1000, ge=1, description="Use at most this many pairs.")


class RewardReportSection(Section):
    """What the report on a reward model measures; `make report STAGE=reward` redoes it. docs/reward_report.md."""

    edit_pairs: int = Field(200, ge=10, description="Held-out pairs whose answers are edited (padded, shuffled, ...).")
    paraphrases: list[str] = Field(
        ["Question: {prompt}"], description="Other ways to put a prompt, with `{prompt}`; preferences should not turn."
    )
    ood: list[OtherPairs] = Field([], description="Preference sets from elsewhere, each reported by its name.")
    learning_curve_pairs: int = Field(
        2000, ge=0, description="Training pairs for the learning curve on frozen SFT features; 0 = skip."
    )
    failures: int = Field(8, ge=0, description="Pairs ranked wrong that are shown as text.")

    @field_validator("paraphrases")
    @classmethod
    def _one_place(cls, paraphrases: list[str]) -> list[str]:
        for template in paraphrases:
            if template.count("{prompt}") != 1:
                raise ValueError(f"{template!r} holds {{prompt}} {template.count('{prompt}')} times; must be once")
        return paraphrases


class RewardGateSection(Section):
    """When a reward model is good enough for PPO: a bound surely missed (whole 95 % interval) fails, else it warns."""

    min_accuracy: float | None = Field(0.6, ge=0, le=1, description="Held-out accuracy; null = off.")
    min_lead: float | None = Field(
        0.0, ge=-1, le=1, description="Accuracy minus that of the better baseline (length-only, TF-IDF); null = off."
    )
    min_accuracy_shorter: float | None = Field(
        0.5, ge=0, le=1, description="Accuracy where the shorter answer is the better one; null = off."
    )
    max_length_preference: float | None = Field(
        0.15,
        ge=0,
        le=1,
        description="Share by which it prefers the longer (or shorter) answer beyond what the labels do.",
    )
    max_edit_gain: float | None = Field(
        0.5, ge=0, description="Gain by an edit that makes no answer better, in std of the scores; null = off."
    )
    max_empty_wins: float | None = Field(
        0.5, ge=0, le=1, description="Share of good answers that an empty answer or a bare 'Thanks!' beats; null = off."
    )
    max_off_topic_wins: float | None = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of good answers that a good answer to another prompt beats; warns. null where no answer "
        "depends on its prompt.",
    )
    max_padding_shift: float | None = Field(
        0.01, ge=0, description="Change of a score by padding or batch size, in std of the scores; null = off."
    )
    max_paraphrase_flips: float | None = Field(
        0.25, ge=0, le=1, description="Share of preferences that turn with `report.paraphrases`; warns; null = off."
    )
    max_ece: float | None = Field(0.1, ge=0, le=1, description="Expected calibration error; warns; null = off.")
    min_accuracy_ood: float | None = Field(
        0.5, ge=0, le=1, description="Accuracy on each of `report.ood`; warns; null = off."
    )


class RewardSection(Section):
    """Scalar reward model with TRL's RewardTrainer, from the SFT artifact."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"report", "gate"})

    data: str = Field(description="Data recipe of prompt/chosen/rejected rows.")
    split: str = Field("train", description="Training split.")
    eval_split: str = Field("test", description="Held-out split for accuracy and baselines.")
    max_length: int = Field(1024, ge=2, description="Longest prompt + response in tokens; longer pairs are dropped.")
    normalize_samples: int = Field(256, ge=2, description="SFT samples whose score mean and std go into the manifest.")
    limit: int | None = Field(None, ge=1, description="Use at most this many training pairs.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of the transformer blocks. auto: on a GPU, from 1000 optimizer steps on."
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="Training steps as CUDA graphs, as `ppo.cuda_graphs`. Not with dropout or lm_coef."
    )
    baselines: bool = Field(True, description="Report length-only and TF-IDF baselines beside the accuracy.")
    loss: Literal["bradley_terry", "smoothed", "robust"] = Field(
        "bradley_terry", description="For noisy labels: smoothed (Wang et al. 2024) or robust (Chowdhury et al. 2024)."
    )
    flip_rate: float = Field(0.1, gt=0, lt=0.5, description="Share of flipped labels that those two reckon with.")
    margin_scale: float | None = Field(
        None, gt=0, description="The data recipe keeps a `margin`; times this, the score has to lead by it. Llama 2."
    )
    length_decorrelation: float = Field(
        0.0, ge=0, description="Weight of the squared correlation of margins with length differences. After ODIN."
    )
    lm_coef: float = Field(
        0.0, ge=0, description="Weight of the language-model loss on chosen responses, nats per token. Secrets."
    )
    mismatched: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of pairs repeated with the better answer to another prompt as the worse. RRM.",
    )
    truncated: float = Field(
        0.0, ge=0, le=1, description="Share of pairs repeated with the better answer, cut before its end, as the worse."
    )
    report: RewardReportSection = RewardReportSection()
    gate: RewardGateSection = RewardGateSection()
    trainer: dict[str, Any] = Field({}, description="Passed to TRL's RewardConfig, checked before anything loads.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null = the recipe's seed.")


class RewardSource(Section):
    """One weighted source of scores: a reward artifact or a Python callable (exactly one)."""

    artifact: str | None = Field(None, description="A stage of this run (`reward`) or the path of a reward artifact.")
    function: str | None = Field(None, description="`package.module:callable` of prompts and responses -> floats.")
    weight: float = Field(
        1.0, description="Multiplies the score before sources are aggregated; 0 = a judge: measured, not trained on."
    )

    @model_validator(mode="after")
    def _one_source(self) -> RewardSource:
        if (self.artifact is None) == (self.function is None):
            raise ValueError("give exactly one of `artifact` and `function`")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"function {self.function!r} is not of the form package.module:callable")
        return self


def source_names(sources: Sequence[RewardSource]) -> list[str]:
    """A name of its own for each of `ppo.rewards`, the same in PPO's metrics and in the evaluation.

    It is the folder of the artifact or the name of the function; a second one of that name gets its number behind it.
    """
    names: list[str] = []
    for source in sources:
        plain = Path(source.artifact).name if source.artifact else str(source.function).rpartition(":")[2]
        names.append(unique(plain, names))
    return names


def unique(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of `name_1`, `name_2`, ... from the number of those taken on, that none of them is."""
    number, found = len(taken), name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


class AlertsSection(Section):
    """When PPO warns, against step 1, whose responses are the SFT model's; running means over about five steps."""

    kl: float | None = Field(None, gt=0, description="objective/kl above it, nats per response; null = ppo.max_kl.")
    eos_rate: float | None = Field(0.5, gt=0, le=1, description="EOS rate below this share of step 1's; null = off.")
    entropy: float | None = Field(
        0.25, gt=0, le=1, description="Entropy per token below this share of step 1's; null = off."
    )
    length: float | None = Field(
        2.0, gt=1, description="Length above this multiple of step 1's, or below step 1's by it; null = off."
    )
    repetition: float | None = Field(
        0.5, gt=0, le=1, description="distinct-2 below this share of step 1's while the score rose; null = off."
    )
    refusals: float | None = Field(
        0.25, gt=0, lt=1, description="Share of responses that refuse above step 1's by so much; null = off."
    )
    judge: float | None = Field(
        0.5, gt=0, description="A source of weight 0 fell by so many of its std while the score rose; null = off."
    )
    stop: list[Literal["kl", "eos_rate", "entropy", "length", "repetition", "refusals", "judge"]] = Field(
        [], description="Alerts that end the run, which is then published, as max_kl does."
    )


class PPOSection(Section):
    """PPO. Sizes are global, in episodes; lengths in tokens; KL in nats."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"max_bad_updates", "reward_timeout", "ignore_reward_gate"})

    data: str = Field(description="Data recipe of prompts.")
    split: str = Field("train", description="Prompts to train on.")
    eval_split: str = Field("validation", description="Held-out prompts for `eval/*`.")
    rewards: list[RewardSource] = Field([RewardSource(artifact="reward")], min_length=1)
    reward_aggregation: Literal["sum", "mean", "min", "penalised"] = Field(
        "sum", description="How weighted sources become one score; penalised: mean - uncertainty_coef * std."
    )
    uncertainty_coef: float = Field(
        1.0, ge=0, description="Weight of the std between sources in `penalised`. Coste et al. 2023 take the variance."
    )

    ignore_reward_gate: bool = Field(
        False,
        description="Train on a reward model whose report says fail (reward.gate); it is said aloud all the same.",
    )

    total_episodes: int = Field(10_000, ge=1, description="Episodes (prompt + response) of the whole run.")
    rollout_batch_size: int = Field(64, ge=1, description="Episodes sampled per ppo_step, over all ranks.")
    mini_batch_size: int = Field(64, ge=1, description="Episodes per optimizer step, over all ranks.")
    num_ppo_epochs: int = Field(4, ge=1, description="Passes over a rollout. N+.")
    max_tokens_per_micro_batch: int = Field(8192, ge=1, description="Padded tokens of one forward on one device.")
    max_prompt_length: int = Field(512, ge=1, description="Prompts of more tokens are dropped.")
    response_length: int = Field(53, ge=1, description="Most tokens of a response, EOS included. N+ (TL;DR).")
    temperature: float = Field(0.7, gt=0, description="Divides the logits of policy and reference alike. N+.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling; below 1 makes log-probabilities biased. N+: 1."
    )
    stop_strings: list[str] = Field([], description="For base models: a response ends where one of these appears.")

    generator: Literal["auto", "plain", "compiled", "vllm"] = Field(
        "auto",
        description="plain: transformers' generate. compiled: slots and a CUDA graph. auto: compiled on a GPU, from "
        "5 ppo_steps on. vllm: vLLM in the same process (full weights, CUDA; install it yourself).",
    )
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="Share of the GPU's memory that vLLM may take.")
    generation_slots: int = Field(256, ge=1, description="Responses under way at once on one device (compiled).")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of the transformer blocks. auto: on a GPU, from 200 ppo_steps on."
    )

    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Micro-batches as CUDA graphs: a small model's kernels run faster than a host launches them. "
        "auto: with one GPU, up to 500 million parameters, 2 billion with LoRA.",
    )

    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Several responses side by side in a row. Saves padding where CUDA graphs round shapes up; "
        "elsewhere it does not pay. One process, full attention. auto: with CUDA graphs, where the model allows it.",
    )

    learning_rate: float = Field(3e-6, gt=0, description="AdamW peak, linear to 0. N+.")
    critic_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak for the critic (with critic: shared for its head alone); null = learning_rate. OpenRLHF and "
        "verl take ten times the policy's.",
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of optimizer steps with rising learning rate.")
    adam_eps: float = Field(1e-5, gt=0, description="N+: 1e-5, not PyTorch's 1e-8.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm; null = off.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount. N+.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda. N+.")
    cliprange: float = Field(0.2, gt=0, description="Ratio clip. Schulman et al. 2017; N+.")
    cliprange_value: float | None = Field(0.2, gt=0, description="Value clip; null = off. N+.")
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss. N+.")
    whiten_rewards: bool = Field(False, description="Whiten token rewards (without mean shift). N+: off.")

    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL in the reward. N+.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Schulman 2020; only k1 has the KL's gradient.")
    kl_target: float | None = Field(None, gt=0, description="Nats per response; adaptive coefficient. null = fixed.")
    kl_horizon: int = Field(
        10_000, ge=1, description="Episodes; speed of the adaptive coefficient. Ziegler et al. 2019."
    )
    target_kl: float | None = Field(None, gt=0, description="Mean approxkl that ends an update early; null = off.")
    max_kl: float | None = Field(None, gt=0, description="Nats per response; above it the run stops. null = off.")

    max_bad_updates: int = Field(
        3, ge=0, description="Updates that may be skipped for NaN or infinity; one more ends the run."
    )
    alerts: AlertsSection = AlertsSection()
    reward_timeout: float | None = Field(
        600.0, gt=0, description="Seconds that one call of a reward function or judge may take; null = no limit."
    )

    missing_eos_penalty: float | None = Field(1.0, gt=0, description="Positive x; null = off. N+: score = -1.")
    missing_eos_mode: Literal["replace", "subtract"] = Field("replace", description="score = -x, or score -= x.")
    normalize_scores: bool = Field(
        False, description="Divide scores by their running std (after the manifest's shift)."
    )
    score_clip: float | None = Field(None, gt=0, description="Clip scores to +-this; null = off.")

    critic: Literal["separate", "shared"] = Field("separate", description="Own trunk, or a value head on the policy's.")
    critic_init: Literal["reward", "sft"] = Field("reward", description="N+: reward model.")
    calibrate_critic: bool = Field(
        True,
        description="Fit scale (at least 0.3) and offset of a critic from the reward model to the first rollout's "
        "returns. Needs critic: separate and critic_init: reward.",
    )
    critic_warmup_steps: int = Field(0, ge=0, description="First ppo_steps that train the critic alone.")

    eval_every: int | None = Field(None, ge=1, description="ppo_steps between held-out evaluations; null = never.")
    eval_prompts: int = Field(64, ge=1, description="Held-out prompts per evaluation.")
    best_metric: str | None = Field("eval/rlhf_reward", description="Step with its maximum is kept; null = the last.")
    checkpoint_every: int | None = Field(
        None, ge=1, description="ppo_steps between checkpoints; null = only at the end."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that stay, beside the best step's weights.")
    keep_policies_every: int | None = Field(
        None,
        ge=1,
        description="ppo_steps between policies that the artifact keeps in policies/ (with LoRA: adapters), for the "
        "over-optimisation curve; null = none.",
    )
    sample_every: int = Field(10, ge=1, description="ppo_steps between rows in samples.jsonl.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, slower.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null = the recipe's seed.")

    @model_validator(mode="before")
    @classmethod
    def _critic_without_reward_model(cls, data: Any) -> Any:
        """Rule-based rewards have no reward model to start the critic from: the default is then the SFT model."""
        if isinstance(data, dict) and "critic_init" not in data and isinstance(data.get("rewards"), list):
            sources = [source for source in data["rewards"] if isinstance(source, dict)]
            if sources and not any("artifact" in source for source in sources):
                return {**data, "critic_init": "sft"}
        return data

    @model_validator(mode="after")
    def _sizes(self) -> PPOSection:
        if self.mini_batch_size > self.rollout_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} is above rollout_batch_size {self.rollout_batch_size}: "
                "lower mini_batch_size"
            )
        if self.rollout_batch_size % self.mini_batch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} does not divide by mini_batch_size "
                f"{self.mini_batch_size}: choose sizes that divide"
            )
        if self.total_episodes < self.rollout_batch_size:
            raise ValueError(
                f"total_episodes {self.total_episodes} is below rollout_batch_size {self.rollout_batch_size}: "
                "there would be no step; raise total_episodes"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target needs a kl_coef above 0 to steer; it is 0: set kl_coef, for example to 0.05")
        if self.kl_target is not None and 0.2 * self.rollout_batch_size >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is too short for rollout_batch_size {self.rollout_batch_size}: "
                f"raise it to {self.rollout_batch_size} or more"
            )
        if not any(source.weight for source in self.rewards):
            raise ValueError("rewards: every weight is 0, there is nothing to maximise: give one source a weight")
        if self.critic_init == "reward" and not any(s.artifact for s in self.rewards):
            raise ValueError("critic_init 'reward' needs a reward artifact in `rewards`; set critic_init: sft")
        return self

    @property
    def calibrates_critic(self) -> bool:
        """Whether there is a head to calibrate: one that was trained as a reward model's."""
        return self.calibrate_critic and self.critic == "separate" and self.critic_init == "reward"

    @property
    def total_steps(self) -> int:
        """Number of ppo_steps (a last partial rollout is not run)."""
        return self.total_episodes // self.rollout_batch_size


class JudgeSource(Section):
    """A judge that no stage trained on: exactly one of the five."""

    artifact: str | None = Field(
        None, description="A reward model that PPO never saw, such as `reward_b` of this run, or the path of one."
    )
    sentiment: str | None = Field(None, description="Data recipe of labelled texts; TF-IDF + logistic regression.")
    pairs: str | None = Field(
        None, description="Data recipe of preference pairs; TF-IDF of the response + logistic regression on them."
    )
    split: str | None = Field(
        None, description="With `pairs`: the split to fit on, one that no reward model of PPO saw; null = train."
    )
    vader: bool = Field(False, description="VADER's compound score.")
    function: str | None = Field(None, description="`package.module:callable`, as in ppo.rewards.")
    name: str = Field("judge", description="Name of its columns in the report.")

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeSource:
        sources = [self.sentiment, self.pairs, self.function, self.artifact, self.vader or None]
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of `artifact`, `sentiment`, `pairs`, `vader` and `function`")
        if self.split is not None and self.pairs is None:
            raise ValueError("`split` needs `pairs`; remove it")
        return self


class LlmJudgeSection(Section):
    """A language model that says which of two answers is better, over an OpenAI-compatible URL; both orders count."""

    url: str = Field(pattern=r"^https?://", description="Base URL, such as `http://localhost:8000/v1`.")
    model: str = Field(description="Name of the model there.")
    environment_variable: str | None = Field(
        "OPENAI_API_KEY", description="Holds the key, which is sent to that URL alone; null = a server without keys."
    )
    criterion: str = Field(
        "You compare two answers to one prompt. Judge how helpful, correct and well written they are, and not their "
        "length or their order.",
        description="What the judge is told to look at.",
    )
    name: str = Field("llm", pattern=r"^[^\s/]+$", description="Name of its columns in the report.")
    prompts: int = Field(100, ge=2, description="Pairs per policy, two requests each; the first ones of `prompts`.")
    max_tokens: int = Field(8, ge=1, description="Longest reply; more for a model that thinks first.")
    concurrency: int = Field(8, ge=1, le=256, description="Requests under way at once.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one reply.")
    retries: int = Field(3, ge=0, description="Further attempts after overload, a timeout or an error of the server.")


class PolicySource(Section):
    """A policy to evaluate: exactly one of `artifact` and `model`."""

    artifact: str | None = Field(None, description="A stage of this run (`sft`, `ppo`) or the path of an artifact.")
    step: int | None = Field(
        None, ge=1, description="With `artifact: ppo`: one of the steps of ppo.keep_policies_every."
    )
    model: str | None = Field(None, description="Hub id, or a local folder, of any causal language model.")
    revision: str | None = Field(None, description="Hub revision of `model`.")
    best_of: int = Field(1, ge=1, description="Sample so many responses and keep the one that PPO would pay most for.")
    name: str | None = Field(
        None, pattern=r"^[^\s/]+$", description="One word, in tables and metric keys; null = made from the rest."
    )

    @model_validator(mode="after")
    def _one_policy(self) -> PolicySource:
        if (self.artifact is None) == (self.model is None):
            raise ValueError("give exactly one of `artifact` and `model`")
        if self.step is not None and self.artifact is None:
            raise ValueError("`step` needs an `artifact`: only a ppo stage keeps policies of its steps")
        if self.revision is not None and self.model is None:
            raise ValueError("`revision` needs a `model` on the Hub")
        return self

    @property
    def label(self) -> str:
        """Its name: the one given, or such as `ppo_step_20` and `sft_best_of_16`."""
        if self.name is not None:
            return self.name
        place = "_".join(Path(self.artifact or self.model or "").name.split())
        step = f"_step_{self.step}" if self.step is not None else ""
        return place + step + (f"_best_of_{self.best_of}" if self.best_of > 1 else "")


class EvaluateSection(Section):
    """Two or more policies on held-out prompts: did PPO help?"""

    data: str | None = Field(None, description="Data recipe of prompts; null = ppo.data.")
    split: str = Field("test", description="The held-out split.")
    prompts: int = Field(256, ge=2, description="Number of prompts.")
    policies: list[PolicySource] = Field(
        [PolicySource(artifact="sft"), PolicySource(artifact="ppo")],
        min_length=2,
        description="The first is the baseline of every comparison. KL is always measured against `sft`.",
    )
    temperature: float | None = Field(None, gt=0, description="Of sampling and of the KL; null = ppo.temperature.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; null = ppo.top_p.")
    repetition_penalty: float = Field(
        1.0, gt=0, description="Above 1, tokens that a response already has become less likely. Keskar et al. 2019."
    )
    best_of_n: int = Field(
        16,
        ge=1,
        description="Samples per prompt of the SFT model for reward against KL (best of 1, 2, 4, ...); 1 = without "
        "best-of-n, the policy is held against the SFT model alone.",
    )
    frontier_prompts: int = Field(
        128, ge=2, description="Prompts of that, and of each kept PPO step; at most `prompts`."
    )
    perplexity_rows: int = Field(
        200, ge=0, description="Held-out rows of sft.data (its eval_split) whose perplexity shows forgetting; 0 = skip."
    )
    judges: list[JudgeSource] = Field([], description="The first one gives the headline win rate.")
    score_all_rewards: bool = Field(
        True,
        description="Score with every other reward model of the run, too: judges that PPO never saw, each by the name "
        "of its folder.",
    )
    llm_judge: LlmJudgeSection | None = Field(None, description="A language model as judge; null = none.")
    bootstrap: int = Field(2000, ge=100, description="Resamples for the 95 % intervals.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null = the recipe's seed.")

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateSection:
        names = [policy.label for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"policies are named {names}: give each its own `name`")
        judges = [judge.name for judge in (*self.judges, self.llm_judge) if judge is not None]
        if len(set(judges)) < len(judges):
            raise ValueError(f"judges are named {judges}: give each its own `name`")
        return self


class HardwareSection(Section):
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = a GPU when there is one.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto = bf16 on GPUs that have it, else fp32."
    )


class LoggingSection(Section):
    """Trackers beside metrics.jsonl, which is always written."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="Trackers by name."
    )
    project: str = Field("rlhf", description="Project name for wandb and trackio.")
    samples: int = Field(8, ge=1, description="Fixed prompts (and as many random ones) in samples.jsonl.")


class Recipe(Section):
    """One run: a base model and what each stage does with it."""

    name: str = Field(description="Default name of the run.")
    description: str = Field("", description="One line for people.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of every stage that names none of its own.")
    model: ModelSection = ModelSection()
    peft: PeftSection | None = Field(None, description="LoRA; null = full weights.")
    pretrain: PretrainSection | None = None
    sft: SftSection
    reward: RewardSection | None = None
    ppo: PPOSection | None = None
    evaluate: EvaluateSection | None = None
    hardware: HardwareSection = HardwareSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        from_scratch = self.pretrain is not None and self.pretrain.architecture is not None
        if (self.model.base is None) == (not from_scratch):
            raise ValueError("give exactly one of model.base and pretrain.architecture")
        if self.evaluate is not None and self.ppo is None:
            raise ValueError("`evaluate` samples and scores as `ppo` does: add a `ppo` section or remove `evaluate`")
        if self.evaluate is not None and self.ppo is not None:
            sources = source_names(self.ppo.rewards)
            for judge in (*self.evaluate.judges, self.evaluate.llm_judge):
                if judge is not None and judge.name in sources:
                    raise ValueError(
                        f"evaluate: a judge is named {judge.name}, as a source of ppo.rewards is: give it another name"
                    )
        return self

    def stage_seed(self, stage: str) -> int:
        """Seed of `stage`: its own, or the recipe's."""
        own = getattr(self.section(stage), "seed", None)
        return self.seed if own is None else own

    def section(self, stage: str) -> Section:
        """The section of `stage`.

        Raises:
            UserError: when the recipe has no such section.
        """
        section = getattr(self, stage, None)
        if section is None:
            raise UserError(f"recipe {self.name}: no section `{stage}`: add one, or pick a recipe that has it")
        return section

    def uses_peft(self, stage: str) -> bool:
        """Whether `stage` trains adapters."""
        return self.peft is not None and stage in self.peft.stages


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """Path of a shipped recipe by name, or of a user's YAML file.

    Raises:
        UserError: when there is neither.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or os.sep in name_or_path:
        if path.is_file():
            return path
        raise UserError(f"--recipe {name_or_path}: no such file: give a path that exists or one of {recipe_names()}")
    shipped = RECIPE_DIR / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped are {recipe_names()}"
    raise UserError(f"--recipe {name_or_path}: no such recipe: {hint} (or give the path of a YAML file)")


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply dotted overrides such as `ppo.kl_coef=0.1`.

    Raises:
        UserError: unknown file, key or override, wrong type, value out of range, sizes that do not fit.
    """
    path = find_recipe(name_or_path)
    data = read_yaml(path)
    data.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(data, override)
    return validate(Recipe, data, f"recipe {path.name}")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested `data`; a value is read as YAML.

    Raises:
        UserError: when `override` is not `key=value`, or walks through something that has no keys.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: not of the form section.key=value, for example ppo.kl_coef=0.1")
    try:
        parsed = parse_scalar(value)
    except UserError as error:
        raise UserError(
            f"override {key}: {error}: if the value holds blanks, quote it for the shell too: SET=\"{key}='...'\""
        ) from None
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, key)
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            walked = ".".join(parents[:depth])
            raise UserError(f"override {override!r}: `{walked}` is {node!r}, which has no keys: check the path")
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise UserError(f"override {override!r}: `{'.'.join(parents)}` is {node!r}, which has no keys: check the path")


def _item(node: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override {key}: {part!r} is no index of a list of {len(node)}: use 0..{len(node) - 1}")
    return node[int(part)]
