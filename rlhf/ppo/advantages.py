"""From log-probabilities and scores to advantages: KL penalty, token rewards, GAE.

Shapes: B episodes, R response tokens. Masks are bool [B,R], True = counts (the EOS included). Log-probabilities and KL
are in nats. Everything is computed in the dtype of its inputs.
"""

import torch
from torch import Tensor

from rlhf.ppo.masking import check_mask

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference), from tokens that the policy sampled.

    With x ~ policy and r = ref(x) / policy(x), in nats:

    - k1 = -log r: unbiased; a single token may be negative. The only one that, as a penalty **in the reward**, gives
      the gradient of the KL.
    - k2 = (log r)^2 / 2: never negative, biased, small variance.
    - k3 = (r - 1) - log r: never negative and unbiased as a *value*, for reporting. In the reward its gradient is that
      of KL(policy || ref) - KL(ref || policy). Overflows to inf where ref - policy exceeds 88 nats in float32; it is
      not clamped, so that a broken reference stays visible.

    Args:
        logprobs: [B,R], of the sampling policy.
        ref_logprobs: [B,R], of the reference, same tokens, same temperature.
        estimator: "k1", "k2" or "k3".

    Returns:
        [B,R]; unmasked: padding gives whatever its inputs give, `token_rewards` drops it.

    Raises:
        ValueError: unknown estimator, or shapes that differ.

    Source:
        Schulman 2020, *Approximating KL Divergence*, http://joschu.net/blog/kl-approx.html
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs has shape {list(logprobs.shape)} but ref_logprobs has {list(ref_logprobs.shape)}; "
            "score the same response tokens with both models"
        )
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r.square()
    if estimator == "k3":
        return torch.expm1(log_r) - log_r  # expm1: near r = 1, r - 1 loses all its digits
    raise ValueError(f"kl_estimator is {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """Reward of each token: the KL penalty on all of them, the score on the last one.

        r_t = -kl_coef * kl_t + [t is the last response token] * score

    Args:
        scores: [B], of the reward model (after normalisation, clipping and the missing-EOS rule).
        kl: [B,R], nats, from `kl_penalty`.
        mask: bool [B,R], True = counts. The last True of a row is its last response token.
        kl_coef: weight of the penalty, score units per nat.

    Returns:
        [B,R]; 0 on padding. A row without any response token has no place for its score and stays all 0.

    Raises:
        ValueError: wrong shapes, or a mask that is not bool.

    Source:
        Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    check_mask(mask, kl=kl)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {list(scores.shape)}; expected one per response, [{mask.shape[0]}]")
    rewards = torch.where(mask, -kl_coef * kl, 0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)  # -1 for a row that is all padding
    return torch.where(positions == last, rewards + scores[:, None], rewards)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over right-padded responses.

        delta_t  = r_t + gamma * V_{t+1} - V_t        with V = 0 after the last token: the episode ends there
        A_t      = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    Args:
        rewards: [B,R], from `token_rewards`.
        values: [B,R], `values[:, t]` is the value of the state before token t.
        mask: bool [B,R], True = counts; right-padded, rows may differ in length and may be empty.
        gamma: discount per token, 0 to 1.
        lam: bias against variance, 0 (one-step TD error) to 1 (Monte Carlo return minus value).

    Returns:
        advantages: [B,R], not whitened; 0 on padding.
        returns: [B,R], the critic's targets; 0 on padding.

    Raises:
        ValueError: wrong shapes, a mask that is not bool, or one with padding before a counting token.

    Source:
        Schulman et al. 2016, *High-Dimensional Continuous Control Using Generalized Advantage Estimation*, eq. 11-16.
    """
    check_mask(mask, rewards=rewards, values=values)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask has padding before a token that counts; right-pad the responses")
    # Zeroed padding is all that ragged lengths need: after the last token V, delta and A are 0, so the recursion
    # starts afresh in each row.
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values  # eq. 12
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # eq. 16, as a recursion
        advantages[:, t] = advantage
    return advantages, advantages + values
