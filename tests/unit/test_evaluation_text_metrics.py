"""Expected values counted by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.evaluation import text_metrics


def test_tokens_are_words_and_single_cjk_characters():
    assert text_metrics.tokenize("I like 烤鸭, a lot。") == ["I", "like", "烤", "鸭", ",", "a", "lot", "。"]


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab ba ab
        (["a b", "a b"], 2, 1 / 2),  # pooled: the second response brings nothing new
        (["a b", "b a"], 2, 1.0),  # no bigram spans two responses
        (["很好很好"], 1, 2 / 4),
        (["很好很好"], 2, 2 / 3),  # 很好 好很 很好; by whitespace this would be one token and 0
        (["a"], 2, 0.0),
        (["", "  "], 1, 0.0),
    ],
)
def test_distinct_n(responses, n, expected):
    assert text_metrics.distinct_n(responses, n) == pytest.approx(expected, abs=1e-12)


def test_repetition_rate_is_within_a_response():
    # "a b a b a": ab ba ab ba has 2 of 4 new; "a b c" has none repeated; "a" is too short and counts as 0.
    assert text_metrics.repetition_rate(["a b a b a", "a b c", "a"], n=2) == pytest.approx(0.5 / 3, abs=1e-12)
    assert text_metrics.repetition_rate(["x y", "x y"], n=2) == 0.0


def test_mean_length_counts_cjk_characters():
    assert text_metrics.mean_length(["three short words", "好电影", ""]) == pytest.approx(2.0)


def test_cjk_share():
    assert text_metrics.cjk_share(["ab 好"]) == pytest.approx(1 / 3)
    assert text_metrics.cjk_share(["", " "]) == 0.0


@pytest.mark.parametrize(("responses", "n", "seen"), [([], 2, "0 responses"), (["a"], 0, "size is 0")])
def test_bad_input_is_one_line(responses, n, seen):
    with pytest.raises(UserError, match=seen) as error:
        text_metrics.distinct_n(responses, n)
    assert "\n" not in str(error.value)


def test_the_package_stays_light():
    """Judges, statistics and report must not pull in torch, scikit-learn, matplotlib or evaluate when imported."""
    code = (
        "import sys, rlhf.functions, rlhf.reward.baselines\n"
        "from rlhf.evaluation import compare, judges, report, statistics, text_metrics\n"
        "print([m for m in ('torch', 'sklearn', 'matplotlib', 'evaluate', 'pandas', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------- self-BLEU
def bleu(hypothesis, references, n):
    """Sentence BLEU by its definition: one loop over everything."""
    total = 0.0
    for order in range(1, n + 1):

        def grams(tokens, order=order):
            return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]

        own = grams(hypothesis)
        matches = sum(
            min(own.count(gram), max(grams(reference).count(gram) for reference in references)) for gram in set(own)
        )
        total += math.log((matches or 0.1) / max(1, len(own))) / n
    nearest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    penalty = 1.0 if len(hypothesis) >= nearest else math.exp(1 - nearest / len(hypothesis))
    return penalty * math.exp(total)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_the_mean_bleu_against_all_others(n):
    random = np.random.default_rng(n)
    texts = [" ".join(random.choice(list("abcd"), size=size)) for size in (3, 9, 5, 7, 7, 1)]
    rows = [text.split() for text in texts]
    expected = np.mean([bleu(row, rows[:i] + rows[i + 1 :], n) for i, row in enumerate(rows)])
    assert text_metrics.self_bleu(texts, n) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_of_typed_cases():
    assert text_metrics.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert text_metrics.self_bleu(["a b c d e"]) == 0.0
    # No unigram matches: 0.1 of 2, twice.
    assert text_metrics.self_bleu(["a b", "c d"], n=1) == pytest.approx(0.05)
    # "a b" in "a b c": all matches, and shorter than the nearest by 3 / 2; "a b c" has 2 of 3.
    assert text_metrics.self_bleu(["a b", "a b c"], n=1) == pytest.approx((math.exp(-0.5) + 2 / 3) / 2)
    assert text_metrics.self_bleu(["", "a"]) >= 0.0


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry,  but I can\u2019t help with that.", True),
        ("I'm sorry but my purpose is to keep you safe.", True),
        ("I absolutely cannot discuss this.", True),
        ("Sure! Here it is.", False),
        ("抱歉,我无法提供这方面的信息。", True),
        ("作为一个AI,我没有感情。", True),
        ("今天天气很好。", False),
        ("The hero opens the gate. " * 6 + "'I cannot do that', he says.", False),  # told, far from the start
        ("", False),
    ],
)
def test_refusals(response, refuses):
    assert text_metrics.is_refusal(response) is refuses


def test_refusal_rate():
    assert text_metrics.refusal_rate(["As an AI, I have no view.", "Yes.", "No.", "我不能。"]) == 0.5
