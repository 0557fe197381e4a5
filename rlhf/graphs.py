"""One CUDA graph for all that a micro-batch needs; PPO, the reward stage and SFT use it.

On a small model the host takes longer to launch the kernels of a forward and backward than the GPU to run them. Where
the same shapes come again, the kernels are recorded once and launched together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from rlhf.errors import UserError
from rlhf.models import dropout_of, explicit_masks, special_attention

logger = logging.getLogger(__name__)

CAUSAL = "rlhf_causal_sdpa"  # sdpa that is told no mask: it has its fastest kernel, also where transformers gives one
AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL, lambda *_args, **_kwargs: None)

EAGER_CALLS = 1  # with the same shapes, before they are recorded: kernels are compiled and chosen
MAX_GRAPHS = 128  # each keeps a little memory; activations share one pool
_recorded: Counter = Counter()

# Above it the GPU takes longer than the host, and the memory that graphs hold on to is better used. With LoRA each
# product is five small ones, and activations are few.
PARAMETERS, PARAMETERS_LORA = 500_000_000, 2_000_000_000


class GraphPool:
    """Memory of CUDA graphs that never run at the same time and end together, and of the calls before their recording.

    What one of them needs while it runs, the next may use. Without that the calls would keep as much memory for
    themselves as the graphs. (Of a call all but the backward's own: autograd has a thread, and a pool is of one.)
    """

    def __init__(self) -> None:
        self.memory = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream()  # memory is used again on the stream that it was allocated on, and no other

    def record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of `function`, and what it leaves its results in."""
        graph = torch.cuda.CUDAGraph()
        handle: Any = self.memory.id
        with torch.cuda.graph(graph, pool=handle, stream=self.stream):
            results = function()
        return graph, results

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Allocate here what the block allocates, also what it keeps: replays of graphs write over that."""
        others = torch.cuda.current_stream()
        self.stream.wait_stream(others)
        torch.cuda.empty_cache()  # meanwhile the allocator gives nothing back that others have left
        try:
            with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.memory):
                yield
        finally:
            others.wait_stream(self.stream)


def graph_pool(
    choice: str, section: str, models: Sequence[Any], accelerator: Accelerator, checkpointing: bool
) -> GraphPool | None:
    """Memory for the CUDA graphs of a stage; None where it has none.

    Args:
        choice: `auto`, `on` or `off`.
        section: of the recipe, for the message.
        models: that run in the graphs; the first is what `auto` looks at the size of.
        accelerator: graphs need one process on a GPU.
        checkpointing: of gradients: it draws and restores random states, which a graph cannot.

    Raises:
        UserError: `on` where graphs cannot be.
    """
    one = accelerator.distributed_type == DistributedType.NO
    special = next((found for model in models if (found := special_attention(model))), None)
    possible = accelerator.device.type == "cuda" and one and not checkpointing and not special
    if choice == "on" and not possible:
        needed = (
            f"a model whose masks a graph can hold: {special}"
            if special
            else ("one process on a GPU and no gradient_checkpointing")
        )
        raise UserError(f"{section}.cuda_graphs: on needs {needed}: set it to auto or off")
    most = PARAMETERS_LORA if hasattr(models[0], "peft_config") else PARAMETERS
    fits = sum(parameter.numel() for parameter in models[0].parameters()) <= most
    return GraphPool() if possible and (choice == "on" or (choice == "auto" and fits)) else None


def attend_without_mask(model: nn.Module) -> None:
    """Causal attention alone: right where padding is on the right, which nothing before it sees."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(CAUSAL)


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in training draws random numbers: replayed, a resumed run would draw others."""
    return any(dropout_of(module) for module in model.modules())


def count_recording() -> None:
    """One more CUDA graph was recorded in this process."""
    _recorded["graphs"] += 1


def recorded() -> int:
    """CUDA graphs that were recorded in this process so far; it has to stop growing after the first steps."""
    return _recorded["graphs"]


def allocate_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """A CUDA graph adds to gradients where they are: they must be there, and stay."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class Graphed:
    """Calls `function`; replays it as a CUDA graph where its arguments have the same shapes for the second time.

    What `function` computes must depend on its arguments and on memory that stays where it is (weights, gradients), and
    it must not wait for the device.

    Args:
        function: tensors (and plain keyword arguments, which belong to the shape) -> a tensor or a tuple of them.
        pool: of all that never runs at the same time; None calls `function` and does nothing else.
        prepare: called before anything runs, such as to allocate gradients at their final place.
    """

    def __init__(
        self, function: Callable[..., Any], pool: GraphPool | None, prepare: Callable[[], None] | None = None
    ) -> None:
        self.function, self.pool, self.prepare = function, pool, prepare
        self.seen: Counter = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}

    def __call__(self, *tensors: Tensor, **static: Any) -> Any:
        """As `function`."""
        if self.pool is None:
            return self.function(*tensors, **static)
        key = (tuple((tensor.shape, tensor.dtype) for tensor in tensors), tuple(static.items()))
        with explicit_masks():
            if key not in self.graphs:
                self.seen[key] += 1
                if len(self.graphs) >= MAX_GRAPHS:
                    return self.function(*tensors, **static)
                if self.seen[key] <= EAGER_CALLS:
                    return self._call(self.pool, tensors, static)
                self.graphs[key] = self._record(self.pool, tensors, static)
        graph, inputs, outputs = self.graphs[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return _kept(outputs)

    def _call(self, pool: GraphPool, tensors: tuple[Tensor, ...], static: dict[str, Any]) -> Any:
        if self.prepare is not None:
            self.prepare()
        with pool.borrowed():
            outputs = self.function(*tensors, **static)
        return _kept(outputs)

    def _record(self, pool: GraphPool, tensors: tuple[Tensor, ...], static: dict[str, Any]) -> tuple:
        if self.prepare is not None:
            self.prepare()
        inputs = tuple(tensor.clone() for tensor in tensors)
        graph, outputs = pool.record(lambda: self.function(*inputs, **static))
        count_recording()
        if len(self.graphs) + 1 == MAX_GRAPHS:
            logger.warning("%d shapes are CUDA graphs; further ones run without", MAX_GRAPHS)
        return graph, inputs, outputs


def _kept(outputs: Any) -> Any:
    """Copies outside the pool: what runs next in it may overwrite the outputs."""
    return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)
