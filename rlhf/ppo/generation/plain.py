"""Sampling with transformers' `generate`: KV cache, early stop, any architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rlhf.ppo.generation.types import Generated

BLOCK = 256  # tokens that are summed together when sampling


class InverseCDFSampler(LogitsProcessor):
    """Draws each token by inverting the cumulative distribution at a given uniform number.

    It leaves one token with a finite score, so `generate` takes that one by greedy search. The draw then depends on
    the episode alone: one process or eight, this batch or that one, sample the same responses.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.top_p = top_p
        self.logprobs = torch.zeros_like(uniforms)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        logprobs = sampling_logprobs(scores, self.temperature, self.top_p)
        tokens = inverse_cdf(logprobs, self.uniforms[:, step]).unsqueeze(1)
        self.logprobs[:, step] = logprobs.gather(1, tokens).squeeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def sampling_logprobs(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Log of the sampling distribution [b,V] in float32; -inf outside the nucleus. Temperature 0 = greedy."""
    logits = logits.float()
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(1, best, 0.0)
    logprobs = (logits / temperature).log_softmax(dim=-1)
    if top_p >= 1:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    outside = (before >= top_p).scatter(1, order, before >= top_p)  # the most likely token always stays
    return logprobs.masked_fill(outside, -torch.inf).log_softmax(dim=-1)


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Token [b] whose cumulative-probability interval holds the uniform number of its row.

    First the block of tokens, then the token in it: two short sums in float64 instead of one over 10^5 tokens, where a
    float32 sum would be off by more than the rarest tokens weigh.
    """
    vocab = logprobs.shape[-1]
    probs = nn.functional.pad(logprobs.exp(), (0, -vocab % BLOCK)).unflatten(-1, (-1, BLOCK))
    blocks = probs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniforms.double().unsqueeze(1) * blocks[:, -1:]
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[-1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = probs.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    token = torch.searchsorted(inside, target - before, right=True)
    # Sums of a block in two orders differ in the last bit: stay in the block, at a token that has a probability.
    last = torch.where(inside < inside[:, -1:], 1, 0).sum(dim=-1, keepdim=True)
    return (block * BLOCK + torch.minimum(token, last)).squeeze(1).clamp(max=vocab - 1)


class ResponseEnd(StoppingCriteria):
    """Remembers where each response ended, by EOS or by a stop string.

    Lengths are counted here and not read off the pad id afterwards: a policy may sample the pad token.
    """

    def __init__(self, eos_ids: Sequence[int], prompt_length: int, stop: StopStringCriteria | None) -> None:
        self.eos_ids = list(eos_ids)
        self.prompt_length = prompt_length
        self.stop = stop
        self.lengths: Tensor | None = None  # [b], -1 = still running

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        last = input_ids[:, -1]
        done = torch.isin(last, torch.tensor(self.eos_ids, device=last.device))
        if self.stop is not None:
            done = done | self.stop(input_ids[:, self.prompt_length :], scores)
        if self.lengths is None:
            self.lengths = torch.full_like(last, -1)
        length = input_ids.shape[1] - self.prompt_length
        self.lengths = torch.where((self.lengths < 0) & done, length, self.lengths)
        return self.lengths >= 0


class PlainGenerator:
    """Samples with `model.generate`, where `model` is the ActorCritic or any causal LM.

    Args:
        model: has `generate`; kept up to date by whoever trains it (there is no copy of the weights here).
        tokenizer: pad and EOS; decodes for stop strings.
        stop_strings: a response ends where one of them appears.
        synced: every rank keeps generating until all are done (FSDP: each forward is a collective).
        autocast: dtype of the matrix products.
        repetition_penalty: logits of tokens that the response already has are divided by it, negative ones multiplied;
            1 = off. Of the response alone: with the prompt, the padding beside it would count too.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        synced: bool = False,
        autocast: torch.dtype = torch.float32,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_strings = list(stop_strings)
        self.synced = synced
        self.autocast = autocast
        self.repetition_penalty = repetition_penalty

    def sync(self) -> None:
        """Nothing to do: it samples from the policy itself."""

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Generated:
        """See `rlhf.ppo.generation.Generator`."""
        device = next(self.model.parameters()).device
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        input_ids, attention_mask = left_pad(prompts, pad)
        length, budget = input_ids.shape[1], uniforms.shape[1]
        stop = StopStringCriteria(self.tokenizer, self.stop_strings) if self.stop_strings else None
        end = ResponseEnd([eos], length, stop)
        sampler = InverseCDFSampler(uniforms.to(device), length, temperature, top_p)
        processors: list[LogitsProcessor] = [sampler]
        if self.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(self.repetition_penalty, prompt_ignore_length=length)
            processors.insert(0, penalty)
        config = GenerationConfig(max_new_tokens=budget, do_sample=False, pad_token_id=pad, use_cache=True)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast != torch.float32):
            sequences = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([end]),
                synced_gpus=self.synced,
            )
        return self._collect(sequences[:, length:], end, sampler, budget)

    def _collect(self, tokens: Tensor, end: ResponseEnd, sampler: InverseCDFSampler, budget: int) -> Generated:
        assert end.lengths is not None
        finished = end.lengths >= 0
        lengths = torch.where(finished, end.lengths, budget)
        mask = torch.arange(budget, device=tokens.device) < lengths.unsqueeze(1)
        tokens = nn.functional.pad(tokens, (0, budget - tokens.shape[1]))
        return Generated(
            response_ids=torch.where(mask, tokens, self.tokenizer.pad_token_id),
            response_mask=mask,
            finished=finished,
            logprobs=torch.where(mask, sampler.logprobs, 0.0),
        )


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [b,P] padded on the left, and the attention mask [b,P] (1 = real token)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
