"""One CUDA graph for all that a micro-batch needs.

On a small model the host takes longer to launch the kernels of a forward and backward than the GPU to run them. Where
the same shapes come again, the kernels are recorded once and launched together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.models import explicit_masks

EAGER_CALLS = 1  # with the same shapes, before they are recorded: kernels are compiled and chosen
MAX_GRAPHS = 128  # each keeps a little memory; activations share one pool


class Graphed:
    """Calls `function`; replays it as a CUDA graph where its arguments have the same shapes for the second time.

    What `function` computes must depend on its arguments and on memory that stays where it is (weights, gradients), and
    it must not wait for the device.

    Args:
        function: tensors (and plain keyword arguments, which belong to the shape) -> a tensor or a tuple of them.
        pool: `torch.cuda.graph_pool_handle()`, shared by graphs that never run at the same time and end together;
            None calls `function` and does nothing else.
        prepare: called before a recording, such as to allocate gradients at their final place.
    """

    def __init__(self, function: Callable[..., Any], pool: Any, prepare: Callable[[], None] | None = None) -> None:
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
                if self.seen[key] <= EAGER_CALLS or len(self.graphs) >= MAX_GRAPHS:
                    return self.function(*tensors, **static)
                self.graphs[key] = self._record(tensors, static)
        graph, inputs, outputs = self.graphs[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        # The next replay of any graph may overwrite them.
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)

    def _record(self, tensors: tuple[Tensor, ...], static: dict[str, Any]) -> tuple:
        if self.prepare is not None:
            self.prepare()
        inputs = tuple(tensor.clone() for tensor in tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*inputs, **static)
        return graph, inputs, outputs
