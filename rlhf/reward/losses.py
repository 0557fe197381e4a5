"""The reward model's losses."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def pairwise_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """Negative log-likelihood of the preferences under Bradley-Terry, averaged over pairs.

        L = -mean(log sigmoid(r_chosen - r_rejected - margin))

    Args:
        chosen_scores: [N], raw scores of the preferred responses.
        rejected_scores: [N], raw scores of the others.
        margin: by how much the chosen score should lead, in score units, [N] or one number for all; None = 0.

    Returns:
        Scalar, nats per pair, in the dtype of the scores. log 2 for equal scores and no margin. Stable for any
        difference: it grows linearly, and never overflows.

    Raises:
        ValueError: no pairs, or shapes that differ.

    Source:
        Ouyang et al. 2022 (InstructGPT), eq. 1; the margin is that of Touvron et al. 2023 (Llama 2), eq. 2.
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen_scores has shape {list(chosen_scores.shape)} but rejected_scores has "
            f"{list(rejected_scores.shape)}; give one score per response, in pairs"
        )
    if chosen_scores.numel() == 0:
        raise ValueError("chosen_scores is empty; a mean needs at least one pair")
    lead = chosen_scores - rejected_scores
    if margin is not None:
        if isinstance(margin, Tensor) and margin.dim() > 0 and margin.shape != lead.shape:
            raise ValueError(f"margin has shape {list(margin.shape)}; expected one per pair, {list(lead.shape)}")
        lead = lead - margin
    return -torch.nn.functional.logsigmoid(lead).mean()


def noisy_pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    flip_rate: float,
    robust: bool,
    margin: Tensor | float | None = None,
) -> Tensor:
    """Bradley-Terry loss where a share of the labels is taken to be flipped, averaged over pairs.

        l(m) = -log sigmoid(m), m = r_chosen - r_rejected - margin,    l(-m) for the flipped label
        smoothed: mean((1 - e) l(m) + e l(-m))
        robust:   mean((1 - e) l(m) - e l(-m)) / (1 - 2 e)

    The smoothed one has its minimum at m = log((1 - e) / e) and so bounds the margins. The robust one is, in the mean
    over flips of rate e, the loss of the clean labels; on pairs that repeat it has no lower bound: train one epoch.

    Args:
        chosen_scores, rejected_scores, margin: as for `pairwise_loss`.
        flip_rate: e in [0, 0.5).
        robust: which of the two.

    Returns:
        Scalar, nats per pair. With flip_rate 0 both are `pairwise_loss`.

    Raises:
        ValueError: a flip rate outside [0, 0.5), and what `pairwise_loss` refuses.

    Source:
        Smoothed: Wang et al. 2024 (Secrets of RLHF II), Mitchell 2023 (conservative DPO). Robust: Chowdhury et al. 2024
        (robust DPO), after Natarajan et al. 2013.
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate is {flip_rate}; must be at least 0 and below 0.5")
    right = pairwise_loss(chosen_scores, rejected_scores, margin)
    wrong = pairwise_loss(rejected_scores, chosen_scores, None if margin is None else -margin)
    if robust:
        return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)
    return (1 - flip_rate) * right + flip_rate * wrong


def length_correlation(chosen_scores: Tensor, rejected_scores: Tensor, length_differences: Tensor) -> Tensor:
    """Squared correlation of the pairs' margins with their differences in length: what length explains of a batch.

        rho^2 = cov(m, d)^2 / (var(m) var(d)),    m = r_chosen - r_rejected, d = length_chosen - length_rejected

    In expectation over unrelated m and d it is 1 / (N - 1), so small batches are noisy.

    Args:
        chosen_scores, rejected_scores: [N].
        length_differences: [N], tokens of the chosen minus those of the rejected response.

    Returns:
        Scalar in [0, 1]; 0 where all lengths or all margins are the same.

    Source:
        Chen et al. 2024 (ODIN) penalise |rho| of rewards and lengths; ours takes pairs, which share their prompt.
    """
    margins = chosen_scores - rejected_scores
    lengths = length_differences.to(margins.dtype)
    margins, lengths = margins - margins.mean(), lengths - lengths.mean()
    spread = margins.square().sum() * lengths.square().sum()
    return (margins * lengths).sum().square() / spread.clamp(min=torch.finfo(margins.dtype).tiny)


def language_model_loss(head: torch.nn.Module, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the masked tokens under a language-model head, averaged over them.

    Logits exist for one row at a time, and are computed again in the backward pass: for [B,T] tokens of a vocabulary of
    150,000 they would be the largest tensor of the training.

    Args:
        head: hidden [n,D] -> logits [n,V].
        hidden: [B,T,D], states after each token.
        input_ids: [B,T].
        mask: [B,T] bool, True = the token counts. The first token has nothing before it and never counts.

    Returns:
        Scalar, nats per token; 0 where none counts.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    counts = mask[:, 1:]
    for states, tokens, wanted in zip(hidden[:, :-1], input_ids[:, 1:], counts, strict=True):
        if bool(wanted.any()):
            total = total + checkpoint(_token_loss, head, states[wanted], tokens[wanted], use_reentrant=False)
    return total / counts.sum().clamp(min=1)


def _token_loss(head: torch.nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(head(states).float(), tokens, reduction="sum")
