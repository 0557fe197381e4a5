"""Expected values counted by hand."""

import subprocess
import sys

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
