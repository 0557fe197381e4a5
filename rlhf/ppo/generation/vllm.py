"""Sampling with vLLM in the training process, through TRL's VLLMGeneration. Optional: the extra `vllm`.

vLLM has its own random numbers: a response depends on its batch, on the number of ranks and on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.ppo.generation.types import Generated


class VLLMGenerator:
    """Samples with a vLLM engine of its own on each rank's GPU; it holds one more set of weights.

    Args:
        policy: a causal LM with full weights on this rank; vLLM loads the folder it came from, then its weights.
        tokenizer: pad and EOS; decodes for stop strings.
        accelerator: placement.
        max_length: longest prompt and response together, in tokens.
        memory: share of the GPU's memory that vLLM may take, weights included.
        stop_strings: a response ends where one of them appears.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        max_length: int,
        memory: float,
        stop_strings: Sequence[str] = (),
    ) -> None:
        if util.find_spec("vllm") is None:
            raise UserError(
                "ppo.generator vllm: vLLM is not installed: make setup EXTRAS=vllm on a machine with CUDA, or set "
                "ppo.generator: auto"
            )
        from trl.generation.vllm_generation import VLLMGeneration

        self.tokenizer, self.device, self.stop_strings = tokenizer, accelerator.device, list(stop_strings)
        stop = {"stop": self.stop_strings, "include_stop_str_in_output": True} if self.stop_strings else {}
        self.engine: Any = VLLMGeneration(
            model=policy,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode="colocate",
            gpu_memory_utilization=memory,
            max_model_length=max_length,
            logprobs=0,  # those of the sampled tokens, after temperature and top_p
            generation_kwargs=stop,
        )

    def sync(self) -> None:
        """Give vLLM the policy's current weights."""
        self.engine.sync_weights()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Generated:
        """See `rlhf.ppo.generation.Generator`; of `uniforms` [b,R] only the shape is used."""
        budget = uniforms.shape[1]
        self.engine.temperature, self.engine.top_p = temperature, top_p
        self.engine.max_completion_length = budget
        _, responses, logprobs, _ = self.engine.generate(prompts=prompts, images=None, num_generations=1)
        lengths = torch.tensor([len(row) for row in responses])
        mask = torch.arange(budget) < lengths.unsqueeze(1)
        ids = torch.full((len(responses), budget), self.tokenizer.pad_token_id)
        ids[mask] = torch.tensor([token for row in responses for token in row])
        sampled = torch.zeros(len(responses), budget)
        sampled[mask] = torch.tensor([float(token[0]) for row in logprobs for token in row])
        finished = torch.tensor([self._finished(row) for row in responses])
        return Generated(*(x.to(self.device) for x in (ids, mask, finished, sampled)))

    def _finished(self, response: list[int]) -> bool:
        """Whether it ended by EOS or a stop string, and was not cut."""
        if response[-1] == self.tokenizer.eos_token_id:
            return True
        return bool(self.stop_strings) and any(s in self.tokenizer.decode(response) for s in self.stop_strings)
