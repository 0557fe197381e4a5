"""Difficulty of rows by their perplexity under a causal language model, and a curriculum from it."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, joined, split_result
from rlhf.errors import UserError


class PerplexityStep(StepConfig):
    """Writes each row's perplexity and curriculum phase, and drops rows outside the bounds."""

    step: Literal["perplexity"] = "perplexity"
    model: str | None = Field(
        default=None, min_length=1, description="In a recipe: folder or Hub id of the base model, a causal one."
    )
    context: str | None = Field(
        default=None, description="Column that is read but not scored (prompt); null = all texts are scored."
    )
    max_length: int = Field(default=1024, ge=2, description="Tokens of a row, context included; the rest is cut off.")
    batch_tokens: int = Field(default=8192, ge=2, description="Tokens per forward pass, padding included.")
    min: float | None = Field(default=None, gt=0, description="Smallest perplexity; below it a row is boilerplate.")
    max: float | None = Field(default=None, gt=0, description="Largest perplexity; above it a row is noise.")
    phases: int = Field(default=3, ge=1, description="Parts of equal size by difficulty; 1 = no phases.")
    order: Literal["keep", "easy_first", "hard_first"] = Field(
        default="keep", description="Order of the kept rows; easy_first is the curriculum of Bengio et al. 2009."
    )


def perplexity_step(rows: Sequence[Row], config: PerplexityStep, model: Any, tokenizer: Any) -> StepResult:
    """Adds the columns `perplexity` (null where nothing could be scored) and `phase` (0 = easiest).

    Args:
        rows: all rows; the phases are parts of the kept ones.
        config: the step's.
        model: a causal language model, on its device, in eval mode.
        tokenizer: its tokenizer.

    Returns:
        With `order` other than `keep`, `rows` and `index` are in that order. Report: quantiles of the perplexity.

    Raises:
        UserError: a row lacks the column `context`.
    """
    contexts, texts = [], []
    for number, row in enumerate(rows):
        if config.context is not None and config.context not in row:
            raise UserError(
                f"perplexity.context: row {number} has no column {config.context!r}; it has {', '.join(row)}"
            )
        contexts.append("" if config.context is None else joined(row[config.context]))
        scored = [name for name in config.columns or row if name != config.context]
        texts.append("\n".join(text for text in (joined(row.get(name)) for name in scored) if text))
    values = perplexities(texts, model, tokenizer, contexts, config.max_length, config.batch_tokens)
    reasons: dict[int, tuple[str, str]] = {}
    for number, value in enumerate(values.tolist()):
        if config.min is not None and value < config.min:
            reasons[number] = ("low_perplexity", f"{value:.1f}, min {config.min:g}")
        elif config.max is not None and value > config.max:
            reasons[number] = ("high_perplexity", f"{value:.1f}, max {config.max:g}")
    result = split_result(rows, reasons, {"perplexity": _quantiles(values)})
    kept = values[result.index]
    phases = curriculum_phases(kept, config.phases)
    result.rows = [
        row | {"perplexity": None if math.isnan(value) else round(value, 3), "phase": phase}
        for row, value, phase in zip(result.rows, kept.tolist(), phases.tolist(), strict=True)
    ]
    if config.order != "keep":
        order = np.argsort(kept if config.order == "easy_first" else -kept, kind="stable")  # NaN last
        result.rows = [result.rows[at] for at in order]
        result.index = [result.index[at] for at in order]
    return result


def perplexities(
    texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str] | None = None,
    max_length: int = 1024,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """exp of the mean negative log-likelihood per token of each text, natural log.

    Texts are tokenised without a chat template and run in batches of similar length. The first token is scored after
    the tokenizer's BOS token, or not at all where it has none.

    Args:
        texts: what is scored.
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        contexts: read before the text, not scored; same length as `texts`.
        max_length: tokens of context and text; the context is cut on the left, to at most half, then the text's end.
        batch_tokens: tokens per forward pass, padding included.

    Returns:
        (texts,); NaN where a text has no token to score.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[tuple[list[int], int]] = []
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        before = tokenizer(context, add_special_tokens=False)["input_ids"][-(max_length // 2) :] if context else []
        before = bos + before
        ids = before + tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append((ids[:max_length], max(1, len(before))))
    out = np.full(len(texts), np.nan)
    order = sorted(
        (number for number, (ids, start) in enumerate(rows) if len(ids) > start), key=lambda n: -len(rows[n][0])
    )
    with tqdm(total=len(order), desc="perplexity", unit=" rows", leave=False, disable=None) as bar:
        while order:
            size = max(1, batch_tokens // len(rows[order[0]][0]))
            batch, order = order[:size], order[size:]
            out[batch] = np.exp(_mean_nll([rows[number] for number in batch], model))
            bar.update(len(batch))
    return out


def _mean_nll(batch: Sequence[tuple[list[int], int]], model: Any) -> NDArray[np.float64]:
    """Mean negative log-likelihood of ids[start:] per row; padding on the right, where a causal model cannot see it."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    device = next(model.parameters()).device
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
    scored = torch.tensor([[start <= at < len(row) for at in range(1, width)] for row, start in batch], device=device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    # where, not a product: a padded position may be NaN
    total = torch.where(scored, -picked, 0.0).sum(1) / scored.sum(1)
    return total.double().cpu().numpy()


def curriculum_phases(difficulty: NDArray[np.float64], phases: int) -> NDArray[np.int64]:
    """Phase of each row, 0 = easiest: parts whose sizes differ by at most one row; ties by position, NaN hardest."""
    rank = np.empty(len(difficulty), dtype=np.int64)
    rank[np.argsort(difficulty, kind="stable")] = np.arange(len(difficulty))
    return rank * phases // max(1, len(difficulty))


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {"scored": 0}
    points = {f"p{q}": round(float(np.percentile(known, q)), 3) for q in (5, 25, 50, 75, 95)}
    return {"scored": len(known), **points}
