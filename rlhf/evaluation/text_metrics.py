"""Diversity, repetition and length of a set of responses: pure functions of strings.

The same measures as `evaluate.Metric` objects are in `evaluate_metrics.py`: importing `evaluate` pulls in torch and
takes seconds, which a caller of these functions should not pay.
"""

from __future__ import annotations

import math
import re
from collections import Counter
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


def self_bleu(responses: Sequence[str], n: int = 4) -> float:
    """Mean BLEU of each response against all others as its references: how alike they are (Zhu et al. 2018, Texygen).

    BLEU of orders 1 to `n`, equally weighted, with the brevity penalty of the nearest reference length. An order
    without a match counts 0.1 matches, as in Texygen (Chen and Cherry 2014, method 1).

    Args:
        responses: texts, one per prompt.
        n: longest n-grams, at least 1.

    Returns:
        A number in [0, 1], 1 where all are the same; 0 for a single response.

    Raises:
        UserError: `n` below 1, or no responses.
    """
    _check(responses, n)
    tokens = [tokenize(response) for response in responses]
    if len(tokens) < 2:
        return 0.0
    logs = [0.0] * len(tokens)
    for order in range(1, n + 1):
        counts = [Counter(ngrams(row, order)) for row in tokens]
        for index, precision in enumerate(_precisions(counts)):
            logs[index] += math.log(precision) / n
    lengths = [len(row) for row in tokens]
    penalties = [_brevity(lengths, index) for index in range(len(tokens))]
    scores = [math.exp(log) * penalty for log, penalty in zip(logs, penalties, strict=True)]
    return sum(scores) / len(scores)


def _precisions(counts: list[Counter[tuple[str, ...]]]) -> list[float]:
    """Clipped n-gram precision of each against the others. The largest two counts of a gram tell the most of others."""
    best: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, whose it is, second largest
    for index, own in enumerate(counts):
        for gram, count in own.items():
            first, owner, second = best.get(gram, (0, -1, 0))
            best[gram] = (count, index, first) if count > first else (first, owner, max(second, count))
    precisions = []
    for index, own in enumerate(counts):
        matches = 0
        for gram, count in own.items():
            first, owner, second = best[gram]
            matches += min(count, second if owner == index else first)
        precisions.append((matches or 0.1) / max(1, own.total()))
    return precisions


def _brevity(lengths: Sequence[int], index: int) -> float:
    """BLEU's penalty of a text shorter than the nearest other one; of equally near ones the shorter counts."""
    own = lengths[index]
    if own == 0:
        return 0.0
    others = (length for other, length in enumerate(lengths) if other != index)
    nearest = min(others, key=lambda length: (abs(length - own), length))
    return 1.0 if own >= nearest else math.exp(1 - nearest / own)


REFUSALS = (
    "i can't help", "i cannot help", "i can't assist", "i cannot assist", "i can't provide", "i cannot provide",
    "i can't do that", "i cannot do that", "i can't fulfill", "i cannot fulfill", "i can't comply", "i cannot comply",
    "i won't be able to", "i am unable to", "i'm unable to", "i am not able to", "i'm not able to", "i must decline",
    "i have to decline", "i'm sorry, but", "i am sorry, but", "i'm sorry but", "i am sorry but",
    "i apologize, but", "as an ai", "as a language model", "i absolutely cannot", "i absolutely can't",
    "it would be inappropriate", "it is not appropriate to", "i don't feel comfortable",
    "我不能", "我无法", "无法提供", "不能提供", "无法帮助", "不便回答", "无法回答", "抱歉", "对不起",
    "作为一个人工智能", "作为一个ai", "作为人工智能", "作为ai", "作为一名ai", "我拒绝", "恕我不能",
)  # fmt: skip
_REFUSED_WITHIN = 100  # characters: a refusal comes first; later the words may be quoted or told


def is_refusal(response: str) -> bool:
    """Whether one of REFUSALS (English and Chinese) stands in the first 100 characters. A list, so it misses some."""
    start = " ".join(response.lower().replace("\u2019", "'").split())[:_REFUSED_WITHIN]
    return any(phrase in start for phrase in REFUSALS)


def refusal_rate(responses: Sequence[str]) -> float:
    """Share of responses that refuse, by `is_refusal`."""
    _check(responses, 1)
    return sum(map(is_refusal, responses)) / len(responses)


def mean_length(responses: Sequence[str]) -> float:
    """Mean number of whitespace/CJK tokens of a response (not the model's tokens)."""
    _check(responses, 1)
    return sum(len(tokenize(response)) for response in responses) / len(responses)


def _check(responses: Sequence[str], n: int) -> None:
    if n < 1:
        raise UserError(f"text metrics: n-gram size is {n}; give an integer of at least 1")
    if not len(responses):
        raise UserError("text metrics: got 0 responses; sample at least one before measuring")
