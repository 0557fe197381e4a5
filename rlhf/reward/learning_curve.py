"""Would more labels help? Held-out accuracy of a linear reward on frozen SFT features, over the number of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.models import hidden_states, trunk_of
from rlhf.ppo.generation.plain import left_pad
from rlhf.reward.slices import correct

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 3
BATCH = 64


@torch.no_grad()
def features(model: PreTrainedModel, sequences: list[list[int]], pad_id: int) -> np.ndarray:
    """[N,D] hidden states of a causal model's trunk, averaged over the tokens of each sequence.

    The mean, because the state at the last token is about what comes next: measured on `tiny`, it tells less of the
    answer than the mean does.
    """
    device, trunk = next(model.parameters()).device, trunk_of(model)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # little padding
    result = np.empty((len(sequences), model.config.get_text_config().hidden_size))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        ids, mask = (part.to(device) for part in left_pad([sequences[row] for row in rows], pad_id))
        states, weights = hidden_states(trunk, ids, mask).float(), mask.unsqueeze(-1).float()
        result[rows] = ((states * weights).sum(dim=1) / weights.sum(dim=1)).cpu().numpy()
    return result


def learning_curve(train: np.ndarray, test: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Accuracy of Bradley-Terry regressions on growing parts of the training pairs.

    Args:
        train: [N,D], features of the chosen minus those of the rejected response.
        test: [M,D], the same of held-out pairs.
        seed: of the order in which labels are taken; three draws.

    Returns:
        {labels, accuracy, low, high} with the mean, smallest and largest accuracy of the draws.
    """
    scale = train.std(axis=0) + 1e-8
    train, test = train / scale, test / scale
    curve = []
    for size in sorted({max(2, round(share * len(train))) for share in SHARES}):
        found = []
        for draw in range(DRAWS if size < len(train) else 1):  # all pairs are the same pairs in every draw
            picked = np.random.default_rng([seed, draw]).permutation(len(train))[:size]
            found.append(float(correct(test @ _fit(train[picked])).mean()))
        curve.append({"labels": size, "accuracy": float(np.mean(found)), "low": min(found), "high": max(found)})
    return curve


def _fit(differences: np.ndarray) -> np.ndarray:
    """Weights [D] of a logistic regression without intercept, both orders of every pair."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    both = np.concatenate([differences, -differences])
    model = LogisticRegression(C=len(both) ** -0.5, fit_intercept=False, max_iter=500)
    with threadpool_limits(limits=1):  # as in baselines.py
        model.fit(both, np.repeat([1, 0], len(differences)))
    return model.coef_[0]
