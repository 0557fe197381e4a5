"""Semantic deduplication and clustering: texts that say the same in other words (SemDeDup, Abbas et al. 2023)."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, joined, optional_module, split_result
from rlhf.data.cleaning.duplicates import PRIORITY, split_order
from rlhf.errors import UserError

Embed = Callable[[list[str]], NDArray[Any]]

_BLOCK = 1024  # rows compared at once: 4 MB of similarities per 1,000 rows of a cluster
_EXAMPLES = 3  # texts shown per cluster
_SHOWN = 120  # characters of each


class SemanticStep(StepConfig):
    """Drops rows whose meaning another row has, and describes the clusters of those that stay."""

    step: Literal["semantic"] = "semantic"
    model: str | None = Field(
        default=None, min_length=1, description="In a recipe: folder or Hub id of a sentence-transformers model."
    )
    threshold: float = Field(
        default=0.95, gt=0, le=1, description="Cosine similarity from which a row goes; 1 = drop none, only cluster."
    )
    clusters: int | None = Field(
        default=None, ge=1, description="k of k-means; rows are compared inside a cluster. null = rows / 2000."
    )
    priority: list[str] = Field(default=PRIORITY, description="Splits whose rows stay, strongest first.")
    seed: int = Field(default=0, ge=0, description="Seed of k-means.")


def semantic_step(
    rows: Sequence[Row], config: SemanticStep, embed: Embed, splits: Sequence[str] | None = None
) -> StepResult:
    """Drops rows that are at least `threshold` similar to a row that stays.

    Args:
        rows: all rows.
        config: the step's.
        embed: texts -> (texts, dimensions), any float; `load_embedder` makes one.
        splits: name of each row's split.

    Returns:
        Report: `clusters`, each with its `size` among the kept rows and the `examples` nearest its centre.

    Raises:
        UserError: `embed` gives another shape, or numbers that are not finite.
    """
    texts = ["\n".join(_texts(row, config.columns)) for row in rows]
    if not texts:
        return StepResult([], [], [], {"clusters": []})
    vectors = _unit_vectors(embed(texts), len(texts))
    labels = kmeans(vectors, config.clusters or max(1, len(texts) // 2000), config.seed)
    reasons: dict[int, tuple[str, str]] = {}
    if config.threshold < 1:
        rank = np.argsort(split_order(len(rows), splits, config.priority))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            reasons |= _similar(members[np.argsort(rank[members])], vectors, config.threshold)
    return split_result(rows, reasons, {"clusters": _describe(vectors, labels, texts, reasons)})


def _texts(row: Row, columns: Sequence[str] | None) -> list[str]:
    return [joined(value) for name, value in row.items() if columns is None or name in columns]


def _unit_vectors(vectors: NDArray[Any], count: int) -> NDArray[np.float32]:
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        raise UserError(
            f"semantic: embed gave the shape {vectors.shape} for {count} texts, or numbers that are not finite; "
            "must be (texts, dimensions)"
        )
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def kmeans(vectors: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.int64]:
    """Cluster of each row: (rows,). Deterministic for a seed; with one cluster no fit is made."""
    clusters = min(clusters, len(vectors))
    if clusters == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096)
    return model.fit_predict(vectors).astype(np.int64)


def _similar(members: NDArray[np.int64], vectors: NDArray[np.float32], threshold: float) -> dict[int, tuple[str, str]]:
    """Of a cluster's rows, strongest first, those that are similar to an earlier one that stays."""
    reasons: dict[int, tuple[str, str]] = {}
    for start in range(0, len(members), _BLOCK):
        block = members[start : start + _BLOCK]
        similar = vectors[block] @ vectors[members[: start + len(block)]].T
        for at, columns in enumerate(similar):
            for other in np.flatnonzero(columns[: start + at] >= threshold).tolist():
                if int(members[other]) not in reasons:
                    detail = f"similarity {columns[other]:.3f}, row {members[other]} stays"
                    reasons[int(block[at])] = ("semantic_duplicate", detail)
                    break
    return reasons


def _describe(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], texts: list[str], reasons: dict[int, tuple[str, str]]
) -> list[dict[str, Any]]:
    out = []
    for label in np.unique(labels):
        members = np.array([number for number in np.flatnonzero(labels == label) if number not in reasons])
        nearest = members[np.argsort(-(vectors[members] @ vectors[members].mean(axis=0)), kind="stable")[:_EXAMPLES]]
        out.append({"size": len(members), "examples": [texts[number][:_SHOWN] for number in nearest]})
    return sorted(out, key=lambda cluster: -cluster["size"])


def load_embedder(path: str | Path, batch_size: int = 64, device: str = "cpu") -> Embed:
    """An `embed` from a sentence-transformers model.

    Args:
        path: folder of the model, or its Hub id.
        batch_size: texts per forward pass.
        device: `cpu`, `cuda`, ...

    Raises:
        UserError: sentence-transformers is not installed, or there is no such model.
    """
    module = optional_module("sentence_transformers", "sentence-transformers", "semantic", extra="semantic")
    try:
        model = module.SentenceTransformer(str(path), device=device)
    except (OSError, ValueError) as error:
        raise UserError(f"semantic: cannot load the embedder {str(path)!r} ({error}); give a model folder") from error

    def embed(texts: list[str]) -> NDArray[Any]:
        return np.asarray(model.encode(texts, batch_size=batch_size, show_progress_bar=sys.stderr.isatty()))

    return embed
