"""Diversity, repetition and length of a set of responses: pure functions of strings.

The same measures as `evaluate.Metric` objects are in `evaluate_metrics.py`: importing `evaluate` pulls in torch and
takes seconds, which a caller of these functions should not pay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf.errors import UserError

# Ideographs (base block, extension A, compatibility, the supplementary planes), kana, CJK and full-width punctuation:
# scripts that are written without spaces. Hangul is spaced and therefore not in the list.
CJK_CHARACTERS = "\u3001-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff65\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{CJK_CHARACTERS}]|[^\s{CJK_CHARACTERS}]+")
# For bag-of-words models: words with their apostrophe parts, without punctuation; each CJK character alone.
WORD_PATTERN = rf"(?u)[{CJK_CHARACTERS}]|[^\W{CJK_CHARACTERS}]+(?:'[^\W{CJK_CHARACTERS}]+)?"
_CJK = re.compile(rf"[{CJK_CHARACTERS}]")


def tokenize(text: str) -> list[str]:
    """Splits at whitespace; every CJK character is a token of its own.

    Model-independent on purpose: diversity must stay comparable between policies with different tokenizers.
    """
    return _TOKEN.findall(text)


def cjk_share(texts: Sequence[str]) -> float:
    """Share of CJK characters among all characters that are not whitespace, in [0, 1]; 0 where there are none."""
    characters = sum(len("".join(text.split())) for text in texts)
    return sum(len(_CJK.findall(text)) for text in texts) / characters if characters else 0.0


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` neighbouring tokens, in order; empty where there are fewer than `n` tokens."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Unique n-grams over all n-grams of the pooled responses (Li et al. 2016, distinct-n).

    The value falls with the number and the length of the responses, so compare sets of equal size only.

    Args:
        responses: texts, one per prompt.
        n: size of the n-grams, at least 1.

    Returns:
        A fraction in [0, 1]; 0 where no response has `n` tokens.

    Raises:
        UserError: `n` below 1, or no responses.
    """
    _check(responses, n)
    pooled = [gram for response in responses for gram in ngrams(tokenize(response), n)]
    return len(set(pooled)) / len(pooled) if pooled else 0.0


def repetition_rate(responses: Sequence[str], n: int = 4) -> float:
    """Mean share of n-grams that occurred earlier in the same response (Welleck et al. 2020, rep-n).

    Args:
        responses: texts, one per prompt.
        n: size of the n-grams, at least 1.

    Returns:
        A fraction in [0, 1): 0 means that nothing repeats. Responses shorter than `n` tokens count as 0.

    Raises:
        UserError: `n` below 1, or no responses.
    """
    _check(responses, n)
    grams = [ngrams(tokenize(response), n) for response in responses]
    return sum(1.0 - len(set(own)) / len(own) for own in grams if own) / len(responses)


def mean_length(responses: Sequence[str]) -> float:
    """Mean number of whitespace/CJK tokens of a response (not the model's tokens)."""
    _check(responses, 1)
    return sum(len(tokenize(response)) for response in responses) / len(responses)


def _check(responses: Sequence[str], n: int) -> None:
    if n < 1:
        raise UserError(f"text metrics: n-gram size is {n}; give an integer of at least 1")
    if not len(responses):
        raise UserError("text metrics: got 0 responses; sample at least one before measuring")
