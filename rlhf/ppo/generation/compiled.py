"""Sampling with a static cache and, on a GPU, one CUDA graph per step: no Python and no host sync between tokens.

Responses live in slots. A slot whose response ended is given the next prompt, so that a batch never waits for its
longest response. Each slot has a position of its own in the cache; the graph sees the same addresses at every step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf.graphs import count_recording
from rlhf.models import keep_last, position_ids, transformer_blocks
from rlhf.ppo.generation.plain import inverse_cdf, left_pad, sampling_logprobs
from rlhf.ppo.generation.types import Generated

logger = logging.getLogger(__name__)

STEPS_PER_CHECK = 8  # tokens between two looks at which responses ended: each look waits for the device
REFILL_SHARE = (
    0.25  # of the slots must be free before prompts are read in: a small prefill costs as much as a large one
)
LENGTH_BUCKET = 64  # cache lengths are multiples of it, so that few graphs are captured
SHRINK, SMALLEST = 4, 16  # the last responses go on in a cache of a quarter of the slots, of no fewer than 16
MAX_KEPT = 6  # sizes of slots whose cache and graph are kept
GROUPED = "rlhf_grouped_sdpa"
PREFILL_TOKENS = 65_536  # of one prefill: bounds its activations


class SlotLayer(CacheLayerMixin):
    """Keys and values [S,H,L,D] of one layer; a forward of one token writes slot s at `positions[s]`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, positions: Tensor, length: int) -> None:
        super().__init__()
        self.positions, self.length = positions, length
        self.rows = torch.arange(positions.shape[0], device=positions.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes that the model produces."""
        slots = self.positions.shape[0]
        self.keys, self.values = (
            torch.zeros(slots, x.shape[1], self.length, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one token of every slot [S,H,1,D]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        return self.keys, self.values

    def fill(self, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Write whole prompts [n,H,P,D] into `slots` [n], from position 0."""
        assert self.keys is not None and self.values is not None
        width = key_states.shape[2]
        self.keys[slots, :, :width] = key_states
        self.values[slots, :, :width] = value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys seen by a query, and their offset."""
        return self.length, 0

    def get_seq_length(self, *_: object) -> int:
        """Unused: positions are given to each forward."""
        return 0

    def get_max_length(self) -> int:
        """Positions per slot."""
        return self.length

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20


class SlotCache(Cache):
    """The layers of `Slots`; `compile_layers` knows by it that a forward is of one token."""


class Slots:
    """State of S responses under way, on the device, at fixed addresses.

    Attributes:
        token, start, position, count, active: [S] last token; first real cache position; where the next token is
            written; tokens sampled so far; whether the response still grows.
        uniforms, ids, logprobs: [S,R] random numbers, sampled tokens, their log-probabilities.
    """

    def __init__(self, slots: int, length: int, budget: int, layers: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.size, self.length, self.budget = slots, length, budget
        self.token, self.start, self.position, self.count = (zeros(slots) for _ in range(4))
        self.active = zeros(slots, dtype=torch.bool)
        self.uniforms, self.logprobs = (zeros(slots, budget, dtype=torch.float32) for _ in range(2))
        self.ids = zeros(slots, budget)
        self.layers: list[Any] = [SlotLayer(self.position, length) for _ in range(layers)]
        self.cache = SlotCache(layers=self.layers)
        self.rows, self.columns = (torch.arange(n, device=device) for n in (slots, length))
        self.graph: torch.cuda.CUDAGraph | None = None

    def admit(self, slots: Tensor, widths: Tensor, prompt: int, noise: Tensor) -> None:
        """Start a response in each of `slots` [n]: prompts of `widths` tokens, left-padded to `prompt` columns."""
        self.start[slots] = prompt - widths
        self.position[slots] = prompt
        self.count[slots] = 0
        self.uniforms[slots] = noise
        self.active[slots] = True

    def take_over(self, other: Slots, slots: list[int]) -> None:
        """Go on with the responses that stand in `slots` of `other`, in the first of these."""
        taken, count = torch.tensor(slots, device=self.token.device), len(slots)
        for name in ("token", "start", "position", "count", "active", "uniforms", "ids", "logprobs"):
            getattr(self, name)[:count] = getattr(other, name)[taken]
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[:count], mine.values[:count] = theirs.keys[taken], theirs.values[taken]

    def append(self, slots: Tensor, tokens: Tensor, logprobs: Tensor, eos: int) -> None:
        """Take one sampled token for each of `slots`; a response that ends with it becomes inactive. In place."""
        active, count = self.active[slots], self.count[slots]
        at = count.clamp(max=self.budget - 1)
        self.ids[slots, at] = torch.where(active, tokens, self.ids[slots, at])
        self.logprobs[slots, at] = torch.where(active, logprobs, self.logprobs[slots, at])
        self.token[slots] = tokens
        self.count[slots] = count + active
        self.active[slots] = active & (tokens != eos) & (count + 1 < self.budget)


class CompiledGenerator:
    """Samples from a copy of the policy in `dtype` (one more set of weights), in float32 from the policy itself.

    Args:
        policy: a causal LM for which `special_attention` says nothing. The copy holds LoRA adapters merged.
        pad_id, eos_id: of the tokenizer.
        slots: responses under way at once; more prompts wait for a free slot.
        dtype: of matrix products.
        active: context in which the policy's own adapter is active (LoRA).
        compiled: torch.compile the step of the copy: faster, and seconds before the first token.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        pad_id: int,
        eos_id: int,
        slots: int = 256,
        dtype: torch.dtype = torch.float32,
        active: Callable[[], AbstractContextManager] = nullcontext,
        compiled: bool = False,
    ) -> None:
        self.policy, self.pad_id, self.eos_id, self.max_slots = policy, pad_id, eos_id, slots
        self.active = active
        self.copied = dtype != torch.float32
        self.model: Any = sampling_copy(policy, dtype) if self.copied else policy
        self.draw = _draw
        if compiled and self.copied:
            compile_layers(self.model)
            self.draw = torch.compile(_draw)
        self.slots: dict[tuple, Slots] = {}  # the one used last comes last

    @property
    def device(self) -> torch.device:
        """Where it samples."""
        return next(self.model.parameters()).device

    def sync(self) -> None:
        """Take over the policy's weights."""
        if self.copied:
            copy_weights(self.policy, self.model)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Generated:
        """See `rlhf.ppo.generation.Generator`."""
        count, budget = uniforms.shape
        noise = uniforms.to(self.device)
        out = Slots(count, 0, budget, 0, self.device)  # the finished responses, in the order of the prompts
        owner: dict[int, int] = {}  # slot -> prompt
        waiting = sorted(range(count), key=lambda row: len(prompts[row]))  # taken from the end: longest first
        with self._sampling():
            size = min(self.max_slots, 1 << (count - 1).bit_length())
            length = -(-(max(map(len, prompts)) + budget) // LENGTH_BUCKET) * LENGTH_BUCKET
            slots = self._slots_for(size, length, budget, temperature, top_p)
            while waiting or owner:
                _harvest(slots, owner, out)
                if not waiting and 0 < len(owner) <= slots.size // SHRINK and slots.size == size >= SHRINK * SMALLEST:
                    large, slots = slots, self._slots_for(size // SHRINK, length, budget, temperature, top_p)
                    slots.take_over(large, list(owner))
                    owner = dict(enumerate(owner.values()))
                free = [slot for slot in range(slots.size) if slot not in owner]
                if waiting and (not owner or len(free) >= REFILL_SHARE * slots.size):
                    owner |= self._admit(slots, free, waiting, prompts, noise, temperature, top_p)
                for _ in range(STEPS_PER_CHECK if slots.graph else 1):
                    slots.graph.replay() if slots.graph else self._step(slots, temperature, top_p)
        mask = torch.arange(budget, device=self.device) < out.count.unsqueeze(1)
        return Generated(
            response_ids=torch.where(mask, out.ids, self.pad_id),
            response_mask=mask,
            finished=out.token == self.eos_id,
            logprobs=torch.where(mask, out.logprobs, 0.0),
        )

    def _slots_for(self, size: int, length: int, budget: int, temperature: float, top_p: float) -> Slots:
        """So many slots with a cache of so many positions, all of them free."""
        key = (size, length, budget, temperature, top_p)
        slots = self.slots.pop(key, None)
        if slots is None:
            while len(self.slots) >= MAX_KEPT:  # the caches and graphs that were not used for longest
                del self.slots[next(iter(self.slots))]
            layers = self.model.config.get_text_config().num_hidden_layers
            slots = Slots(size, length, budget, layers, self.device)
            self._step(slots, temperature, top_p)  # no slot is active yet: it allocates the cache and changes nothing
            if self.device.type == "cuda":
                self._capture(slots, temperature, top_p)
        self.slots[key] = slots
        slots.active.zero_()
        return slots

    def _capture(self, slots: Slots, temperature: float, top_p: float) -> None:
        """Record one step as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(slots, temperature, top_p)  # compiles; libraries choose their kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(slots, temperature, top_p)
        slots.graph = graph
        count_recording()

    def _step(self, slots: Slots, temperature: float, top_p: float) -> None:
        """Feed every slot its last token and sample the next one."""
        start, position = slots.start.unsqueeze(1), slots.position.unsqueeze(1)
        seen = (slots.columns >= start) & (slots.columns <= position)
        logits = self.model(
            input_ids=slots.token.unsqueeze(1),
            attention_mask=seen[:, None, None],
            position_ids=position - start,
            past_key_values=slots.cache,
            use_cache=True,
        ).logits[:, -1]
        noise = slots.uniforms[slots.rows, slots.count.clamp(max=slots.budget - 1)]
        tokens, logprobs = self.draw(logits, noise, temperature, top_p)
        slots.position.add_(slots.active).clamp_(max=slots.length - 1)
        slots.append(slots.rows, tokens, logprobs, self.eos_id)

    def _admit(
        self,
        slots: Slots,
        free: list[int],
        waiting: list[int],
        prompts: list[list[int]],
        noise: Tensor,
        temperature: float,
        top_p: float,
    ) -> dict[int, int]:
        """Read prompts into free slots and sample their first tokens; returns slot -> prompt."""
        room = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
        rows = [waiting.pop() for _ in range(min(len(free), len(waiting), room))]
        taken = torch.tensor(free[: len(rows)], device=self.device)
        ids, mask = (x.to(self.device) for x in left_pad([prompts[row] for row in rows], self.pad_id))
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=DynamicCache(config=self.model.config),
            use_cache=True,
            **keep_last(self.model, 1),
        )
        for layer, prefilled in zip(slots.layers, out.past_key_values.layers, strict=True):
            layer.fill(taken, prefilled.keys, prefilled.values)
        mine = noise[torch.tensor(rows, device=self.device)]
        slots.admit(taken, mask.sum(1), ids.shape[1], mine)
        slots.append(taken, *_draw(out.logits[:, -1], mine[:, 0], temperature, top_p), self.eos_id)
        return dict(zip(free, rows, strict=False))

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """For sampling from the policy itself: evaluation mode, its adapter, its blocks as they are."""
        if self.copied:
            yield
            return
        training = self.model.training
        self.model.eval()  # in train mode gradient checkpointing drops the KV cache
        try:
            with self.active(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train(training)


@torch.no_grad()
def sampling_copy(policy: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain copy of the policy in `dtype`, without adapters; `copy_weights` fills it.

    Frozen weights that no adapter changes, such as the embeddings under LoRA, are not copied where the dtype is theirs.
    """
    shared = {
        id(parameter): parameter
        for name, parameter in policy.named_parameters()
        if not parameter.requires_grad and parameter.dtype == dtype and ".base_layer." not in name
    }
    plain: Any = copy.deepcopy(policy, shared)
    if hasattr(policy, "peft_config"):
        plain = plain.unload()
    plain.requires_grad_(False).eval()
    plain.set_attn_implementation(GROUPED)
    return plain.to(dtype)


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile what each block of a sampling copy does to one new token, in place.

    All blocks share one compilation, for any number of slots and any length: each is given its own layer of the cache,
    where the whole cache and a layer's number would make 30 programs of 30 equal blocks. The whole step as one program
    has all 30 in it, and is compiled again for every new size. Prompts are read without it.
    """
    blocks: list[Any] = transformer_blocks(model)
    layers = model.config.get_text_config().num_hidden_layers
    if len(blocks) != layers:
        logger.warning("sampling is not compiled: %d blocks, %d layers of the cache", len(blocks), layers)
        return
    for index, block in enumerate(blocks):
        block.forward = _step_of(block.forward, index)


def _step_of(plain: Callable[..., Any], index: int) -> Callable[..., Any]:
    """`plain`, the forward of block `index`, compiled where it is given a `SlotCache` whose memory is there."""
    compiled = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, SlotCache)), None)
        if cache is None or not cache.layers[index].is_initialized:
            return plain(*args, **kwargs)
        layer = cache.layers[index]
        args = tuple(layer if value is cache else value for value in args)
        return compiled(*args, **{key: layer if value is cache else value for key, value in kwargs.items()})

    return forward


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa, without copies of keys and values where several heads share them and each row has one query.

    transformers repeats keys and values for every head when there is a mask: for one new token that moves more memory
    than the attention itself. Heads that share keys are taken as several queries of one head instead.

    Args:
        query: [S,H,T,D]. key, value: [S,K,L,D]; head h reads keys h // (H / K).
        attention_mask: bool [S,1,T,L] or None.
        kwargs: of transformers' interface.

    Returns:
        [S,T,H,D] and None.
    """
    rows, heads, queries, width = query.shape
    if queries != 1 or heads == key.shape[1] or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    scale = kwargs.get("scaling")
    if torch.compiler.is_compiling():
        out = written_out(grouped, key, value, attention_mask, width**-0.5 if scale is None else scale)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scale
        )
    return out.reshape(rows, 1, heads, width), None


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention as two products and a softmax, which the compiler joins with the mask.

    For a few queries and a mask the library's kernels, made for long queries, take half as long again (one H200, 64
    sequences, 3 heads of keys of 64 numbers: 18.7 against 12.1 us at 256 positions, 30.9 against 19.6 at 640).
    """
    weights = (query @ key.transpose(-1, -2)).float() * scale
    return weights.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype) @ value


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@torch.no_grad()
def copy_weights(policy: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Write the policy's weights, the "policy" adapter merged, into a `sampling_copy`. Sums in float32, then rounds."""
    if not hasattr(policy, "peft_config"):
        torch._foreach_copy_(list(plain.parameters()), list(policy.parameters()))
        return
    prefix = "base_model.model."
    module: Any
    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = module.get_base_layer().weight
            merged = weight.float() + module.get_delta_weight("policy").float()  # type: ignore[attr-defined]
            plain.get_parameter(name.removeprefix(prefix) + ".weight").copy_(merged)


def _draw(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Token [S] of each row of logits [S,V] at its uniform number [S], and its log-probability."""
    logprobs = sampling_logprobs(logits, temperature, top_p)
    tokens = inverse_cdf(logprobs, noise)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _harvest(slots: Slots, owner: dict[int, int], out: Slots) -> None:
    """Move responses that ended from their slots to `out`; waits for the device."""
    active = slots.active.tolist()
    done = [slot for slot in owner if not active[slot]]
    if not done:
        return
    taken = torch.tensor(done, device=slots.token.device)
    rows = torch.tensor([owner.pop(slot) for slot in done], device=slots.token.device)
    out.ids[rows], out.logprobs[rows], out.count[rows] = slots.ids[taken], slots.logprobs[taken], slots.count[taken]
    out.token[rows] = out.ids[rows, out.count[rows] - 1]  # the last one
