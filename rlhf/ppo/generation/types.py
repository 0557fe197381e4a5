"""What every generation back end returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Generated:
    """Sampled responses of b prompts.

    Attributes:
        response_ids: [b,R] right-padded with the pad id.
        response_mask: [b,R] bool, True = counts (the EOS, or the token that completed a stop string, included).
        finished: [b] bool, True = ended by EOS or a stop string, False = cut at the length limit.
        logprobs: [b,R] float32 under the sampling distribution; padding 0.
    """

    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor
    logprobs: Tensor
