"""The reward model's loss."""

import torch
from torch import Tensor


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
