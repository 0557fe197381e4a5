"""What the reward model is trained for, from the recipe: Bradley-Terry, noisy labels, length, a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models import has_plain_head, load_model
from rlhf.recipe import RewardSection
from rlhf.reward.losses import language_model_loss, length_correlation, noisy_pairwise_loss, pairwise_loss


class Objective:
    """The loss of a batch of pairs.

    Args:
        section: of the recipe.
        centring: weight of (r_chosen + r_rejected)^2; None = off. TRL's `center_rewards_coefficient`.
        head: the SFT model's output layer, which `lm_coef` needs.
    """

    def __init__(self, section: RewardSection, centring: float | None, head: nn.Module | None = None) -> None:
        self.section, self.centring, self.head = section, centring, head

    def __call__(self, scores: Tensor, batch: Mapping[str, Tensor], states: Tensor | None) -> Tensor:
        """The loss, a scalar.

        Args:
            scores: [2n] float32, of the chosen and then of the rejected sequences.
            batch: of `PairCollator`: `input_ids` [2n,T], padded on the right, `lengths` [2n]; with `lm_coef` also
                `prompt_length` [n], with `margin_scale` `margin` [n].
            states: [2n,T,D], last hidden states; needed with `lm_coef` alone.
        """
        chosen, rejected = scores.chunk(2)
        loss = self._preferences(chosen, rejected, batch.get("margin"))
        if self.centring is not None:
            loss = loss + self.centring * (chosen + rejected).square().mean()
        if self.section.length_decorrelation:
            longer = torch.sub(*batch["lengths"].chunk(2))
            loss = loss + self.section.length_decorrelation * length_correlation(chosen, rejected, longer)
        if self.head is not None and states is not None:
            loss = loss + self.section.lm_coef * self._language(states, batch)
        return loss

    def _preferences(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
        if self.section.loss == "bradley_terry":
            return pairwise_loss(chosen, rejected, margin)
        return noisy_pairwise_loss(chosen, rejected, self.section.flip_rate, self.section.loss == "robust", margin)

    def _language(self, states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Nats per token of the chosen responses."""
        ids = batch["input_ids"]
        head: Any = self.head.to(ids.device)
        count = len(ids) // 2
        places = torch.arange(ids.shape[1], device=ids.device)
        response = places >= batch["prompt_length"][:, None]
        response &= places < batch["lengths"][:count, None]
        return language_model_loss(head, states[:count].to(head.weight.dtype), ids[:count], response)


def frozen_head(directory: Path) -> nn.Module:
    """The SFT model's output layer, not trained.

    Raises:
        UserError: the model does more to its logits than this layer.
    """
    model = load_model(directory)
    if not has_plain_head(model):
        raise UserError(f"reward.lm_coef: {type(model).__name__} scales or caps its logits: set reward.lm_coef=0")
    return model.get_output_embeddings().requires_grad_(False)
