"""One small interface to sample responses; back ends: `plain` (transformers' generate), `compiled` (CUDA graphs)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rlhf.ppo.generation.compiled import CompiledGenerator
from rlhf.ppo.generation.plain import PlainGenerator
from rlhf.ppo.generation.types import Generated

__all__ = ["CompiledGenerator", "Generated", "Generator", "PlainGenerator"]


class Generator(Protocol):
    """What the trainer asks of a back end."""

    def sync(self) -> None:
        """Take over the policy's current weights; called before each rollout."""
        ...

    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Generated:
        """Sample one response per prompt.

        Args:
            prompts: token ids, unpadded.
            uniforms: [b,R] float32 in [0,1): all the randomness there is, so that a response depends on its episode
                and not on the rank, the batch or the back end's own generator.
            temperature: divides the logits; 0 = greedy.
            top_p: nucleus; 1 = off.
        """
        ...
