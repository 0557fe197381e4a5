"""PPO's two clipped losses.

Both are a **sum over response tokens divided by a token count**. Pass the count of the whole mini-batch (all
micro-batches, all ranks) as `denominator`, and the losses and statistics of the micro-batches add up to those of the
mini-batch, however it was cut. (DDP and FSDP *average* gradients over ranks: multiply the loss by their number.)

Padding may hold anything, NaN included: it reaches neither a loss nor a gradient. Use float32 or wider.
"""

import math

import torch
from torch import Tensor

from rlhf.ppo.masking import check_mask


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate loss of the policy.

    Log-ratios far outside the clip range are safe where the objective is clipped (loss and gradient exact, never NaN).
    Where PPO does not clip (negative advantage, ratio above 1) the loss grows as exp(log-ratio) and beyond 88 nats in
    float32 is inf: not clamped away, because the trainer has to see it.

    Args:
        new_logprobs: [B,R], nats, of the current policy; carries the gradient.
        logprobs: [B,R], nats, of the policy that sampled; constant.
        advantages: [B,R], constant.
        mask: bool [B,R], True = counts.
        cliprange: the ratio is clipped to 1 - cliprange .. 1 + cliprange.
        denominator: token count of the whole mini-batch, > 0; None takes this mask's own (at least 1).

    Returns:
        loss: scalar, to be minimised. All padding gives 0 with gradient 0.
        clipfrac: scalar, detached: share of tokens whose gradient the clip has cut off.
        approxkl: scalar, detached: mean of (new - old)^2 / 2, nats per token: the k2 estimate of
            KL(sampling || current), which TRL and Huang et al. 2024 call approxkl too. They average over padding as
            well, we do not.

    Raises:
        ValueError: wrong shapes, a mask that is not bool, or a denominator that is not positive.

    Source:
        Schulman et al. 2017, *Proximal Policy Optimization Algorithms*, eq. 7.
    """
    check_mask(mask, new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    count = _token_count(mask, denominator)
    # With both factors zeroed on padding each term below is exactly 0 there, in value and in gradient.
    advantages = torch.where(mask, advantages, 0)
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0)
    ratio = _safe_exp(log_ratio, advantages)

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    # L = -E[min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)]: the minus turns min into max
    loss = torch.maximum(unclipped, clipped).sum() / count

    clipfrac = (clipped > unclipped).to(loss.dtype).sum() / count
    approxkl = 0.5 * log_ratio.detach().square().sum() / count
    return loss, clipfrac, approxkl


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the critic, clipped around the values it had when the responses were sampled.

    Args:
        new_values: [B,R], of the current critic; carries the gradient.
        values: [B,R], of the critic at sampling time; constant.
        returns: [B,R], targets from `gae`; constant.
        mask: bool [B,R], True = counts.
        cliprange_value: largest move away from `values` that still lowers the loss, in units of the value; None = no
            clipping.
        denominator: token count of the whole mini-batch, > 0; None takes this mask's own (at least 1).

    Returns:
        loss: scalar, half a mean square. All padding gives 0 with gradient 0.
        clipfrac: scalar, detached: share of tokens where the clipped error is the larger one.

    Raises:
        ValueError: wrong shapes, a mask that is not bool, or a denominator that is not positive.

    Source:
        Dhariwal et al. 2017, OpenAI baselines, ppo2; Huang et al. 2024, *The N+ Implementation Details*.
    """
    check_mask(mask, new_values=new_values, values=values, returns=returns)
    count = _token_count(mask, denominator)
    new_values = torch.where(mask, new_values, 0)
    values = torch.where(mask, values, 0)
    returns = torch.where(mask, returns, 0)

    unclipped = (new_values - returns).square()
    if cliprange_value is None:
        return 0.5 * unclipped.sum() / count, unclipped.new_zeros(())
    # Bounds, not values + clamp(new - values): inside the range the result must be new_values to the last bit, else
    # rounding alone counts as clipped.
    clipped_values = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    clipped = (clipped_values - returns).square()
    # L = E[max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)] / 2
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() / count
    clipfrac = (clipped > unclipped).to(loss.dtype).sum() / count
    return loss, clipfrac


def _safe_exp(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """exp(log_ratio), kept finite wherever the advantage is not negative.

    There the objective is constant above 1 + cliprange, so the cap changes neither loss nor gradient; without it an
    overflow would meet a zero (a zero advantage, or the zero gradient of the branch not taken) and inf * 0 is NaN.
    """
    cap = 0.9 * math.log(torch.finfo(log_ratio.dtype).max)  # 80 nats in float32, 639 in float64
    return torch.where(advantages < 0, log_ratio, log_ratio.clamp(max=cap)).exp()


def _token_count(mask: Tensor, denominator: float | Tensor | None) -> float | Tensor:
    """What to divide the sum by. A tensor is not checked: that would make the host wait for the device."""
    if denominator is None:
        return mask.sum().clamp(min=1)
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; pass the token count of the whole mini-batch")
    return denominator
