"""What selection sees of a pair of responses: differences of frozen features, from words, an embedder or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.data.cleaning.semantic import Embed
from rlhf.labels.selection import DIMENSIONS, Array

Pair = Mapping[str, Any]
SIDES = ("response_a", "response_b")


def longer(pairs: Sequence[Pair]) -> Array:
    """[N] log of 1 + characters of response_a minus the same of response_b."""
    a, b = ([len(pair[side]) for pair in pairs] for side in SIDES)
    return np.log1p(a) - np.log1p(b)


def word_differences(pairs: Sequence[Pair]) -> Array:
    """[N,D] of TF-IDF vectors reduced by truncated SVD: for a start, where there is no model at all.

    Words and pairs of words; in mostly Chinese or Japanese text also 1 to 3 characters.
    """
    from sklearn.decomposition import TruncatedSVD

    from rlhf.reward.baselines import text_features

    texts, a, b = _unique([pair[SIDES[0]] for pair in pairs], [pair[SIDES[1]] for pair in pairs])
    vectors = text_features(texts).fit_transform(texts)
    reduced = TruncatedSVD(min(DIMENSIONS, *vectors.shape), random_state=0).fit_transform(vectors)
    return reduced[a] - reduced[b]


def embedding_differences(pairs: Sequence[Pair], embed: Embed) -> Array:
    """[N,D] of sentence embeddings of the responses; each text is embedded once.

    Args:
        pairs: with `response_a` and `response_b`.
        embed: texts -> (texts, dimensions); `rlhf.data.cleaning.semantic.load_embedder` makes one.
    """
    texts, a, b = _unique([pair[SIDES[0]] for pair in pairs], [pair[SIDES[1]] for pair in pairs])
    vectors = np.asarray(embed(texts), dtype=np.float64)
    return vectors[a] - vectors[b]


def state_differences(pairs: Sequence[Pair], model: Any, renderer: Any, max_length: int) -> Array:
    """[N,D] of a model's last hidden states, averaged over prompt and response.

    Args:
        pairs: with `prompt`, `response_a` and `response_b`.
        model: a causal or a reward model.
        renderer: `rlhf.data.Renderer` of its tokenizer.
        max_length: in tokens; of longer ones the beginning goes.
    """
    from rlhf.reward.learning_curve import features

    sides = [[pair_ids(pair, side, renderer)[-max_length:] for pair in pairs] for side in SIDES]
    keys, a, b = _unique(*[[tuple(ids) for ids in side] for side in sides])
    states = features(model, [list(ids) for ids in keys], renderer.tokenizer.pad_token_id)
    scale = states.std(axis=0) + 1e-8  # a few dimensions of a language model are far larger than all others
    states = states / scale
    return states[a] - states[b]


def pair_ids(pair: Pair, side: str, renderer: Any) -> list[int]:
    """Token ids of the prompt and one response, as the reward model reads them."""
    return renderer.prompt_ids(pair["prompt"]) + renderer.response_ids(pair["prompt"], pair[side])


def _unique(first: list, second: list) -> tuple[list, np.ndarray, np.ndarray]:
    """Each item once, and where those of both lists are among them."""
    items = sorted(set(first + second))
    place = {item: number for number, item in enumerate(items)}
    return items, np.array([place[item] for item in first]), np.array([place[item] for item in second])
