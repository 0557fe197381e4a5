"""docs/metrics.md and rlhf/metrics.py name the same keys, and nothing else is ever written."""

import re
from pathlib import Path

import pytest

from rlhf import metrics
from rlhf.evaluation.compare import PolicySamples, compare
from rlhf.logs import name_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
KEY = re.compile(r"^\s*(?:\||[-*])\s*`([^`]+)`", re.MULTILINE)  # the first cell of a row, or the start of a list item


def documented(page: str) -> set[str]:
    return {key for key in KEY.findall(page) if "*" not in key}  # `objective/*` speaks of a group


def test_reader_of_the_page():
    page = "| key | meaning |\n| --- | --- |\n| `a/b` | of `c` |\n- `a/*`: all\n- `d_<e>`: as `f`\ntext `g`\n"
    assert documented(page) == {"a/b", "d_<e>"}


def test_docs_name_exactly_the_keys():
    keys = set(metrics.PPO) | set(metrics.TRAINER) | set(metrics.EVALUATE)
    page = documented(PAGE.read_text(encoding="utf-8"))
    assert (sorted(keys - page), sorted(page - keys)) == ([], [])


@pytest.mark.parametrize(
    "key",
    [
        *(
            "objective/kl",
            "objective/scores/reward",
            "objective/scores/my_rule.fn",
            "eval/scores",
            "perf/train_seconds",
        ),
        *("loss", "eval_loss", "eval_accuracy", "step", "perf/train_runtime", "perf/eval_samples_per_second"),
        *("perf/total_flos", "perf/train_steps_per_second"),
    ],
)
def test_known_keys_pass(key):
    metrics.check_keys([key])


@pytest.mark.parametrize(
    "key",
    [
        *("objective/klx", "objective", "xobjective/kl", "objective/scores/", "objective/scores/a/b", "objective/kl/x"),
        *("eval_", "eval_lossy", "evalxloss", "perf/", "perf/anything", "perf/<key>", "policy/approxkl", "", "Loss"),
    ],
)
def test_unknown_keys_are_refused(key):
    with pytest.raises(KeyError, match=re.escape(repr(key))):
        metrics.check_keys(["loss", key])


@pytest.mark.parametrize(
    ("logged", "key"),
    [
        ("train_runtime", "perf/train_runtime"),
        ("eval_steps_per_second", "perf/eval_steps_per_second"),
        ("total_flos", "perf/total_flos"),
        ("eval_loss", "eval_loss"),
        ("grad_norm", "grad_norm"),
    ],
)
def test_clock_dependent_keys_of_transformers_go_under_perf(logged, key):
    assert name_of(logged) == key
    metrics.check_keys([key])


def test_evaluation_writes_only_documented_keys():
    def policy(name: str, score: float) -> PolicySamples:
        texts = ["a b c d e", "a b a b a b"]
        scores = {"reward": [score, 0.0], "judge": [0.1, score]}
        return PolicySamples(name, ["p", "q"], texts, [5, 6], [True, False], [0.0, score], scores)

    written = compare([policy("sft", 0.2), policy("ppo", 0.9)], num_resamples=100, seed=0)["metrics"]
    assert len(written) > 40
    names = {"policy": "sft|ppo", "baseline": "sft", "score": "reward|judge"}
    patterns = {re.sub(r"<(\w+)>", lambda m: f"({names[m[1]]})", key) for key in metrics.EVALUATE if "<key>" not in key}
    known = re.compile(f"({'|'.join(patterns)})(_low|_high)?")
    assert {"<key>_low", "<key>_high"} <= set(metrics.EVALUATE)
    assert [key for key in written if not known.fullmatch(key)] == []


def test_every_key_is_described_in_words():
    for key, text in (metrics.PPO | metrics.TRAINER | metrics.EVALUATE).items():
        assert len(text) >= 8 and text.endswith("."), key
