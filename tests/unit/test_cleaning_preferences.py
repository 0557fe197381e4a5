"""Hygiene of preference pairs."""

import random

import pytest

from rlhf.data.cleaning import PreferenceStep, run_step
from rlhf.data.cleaning.preferences import length_bias
from rlhf.errors import UserError


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def flipped_pairs(count: int, flips: int, chinese: bool = False) -> list[dict[str, str]]:
    """Pairs whose quality shows in their words; the first `flips` are labelled the wrong way."""
    rng = random.Random(0)
    good = (
        list("谢请您好帮忙解释清楚") if chinese else ["thanks", "gladly", "carefully", "explained", "helpful", "clear"]
    )
    bad = list("滚笨蛋烦闭嘴讨厌死了") if chinese else ["stupid", "shut", "idiot", "whatever", "useless", "boring"]
    filler = (
        list("的一是在不了有和人这中大为上个国我以要他")
        if chinese
        else ["the", "of", "and", "to", "it", "was", "for", "on", "with", "at", "by", "from"]
    )
    glue = "" if chinese else " "
    rows = []
    for number in range(count):
        sides = [glue.join(rng.choices(filler, k=12) + rng.choices(words, k=5)) for words in (good, bad)]
        rows.append(pair(f"question {number}", *(sides[::-1] if number < flips else sides)))
    return rows


def test_empty_identical_and_contradicting_pairs_go() -> None:
    rows = [
        pair("p", "good", "bad"),
        pair("P!", "bad", "good "),  # the same prompt, sides swapped
        pair("p", "good", "bad"),
        pair("p", " ", "bad"),
        pair("p", "good", ""),
        pair("p", "same  text", "same text"),
        pair("q", "bad", "good"),
    ]
    result = run_step(PreferenceStep(), rows)
    assert [(item.index, item.reason) for item in result.dropped] == [
        *((0, "contradicting_pair"), (1, "contradicting_pair"), (2, "contradicting_pair")),
        *((3, "empty_side"), (4, "empty_side"), (5, "identical_sides")),
    ]
    assert result.index == [6]
    assert result.report["flips"] == {"scored": 0, "accuracy": None, "trusted": False, "suspected": []}


def test_conversations_are_read_by_their_contents() -> None:
    message = [{"role": "assistant", "content": "same"}]
    rows = [{"prompt": [{"role": "user", "content": "p"}], "chosen": message, "rejected": list(message)}]
    assert run_step(PreferenceStep(), rows).dropped[0].reason == "identical_sides"


@pytest.mark.parametrize("chinese", [False, True])
def test_planted_flips_are_suspected_and_almost_nothing_else(chinese: bool) -> None:
    rows = flipped_pairs(600, 50, chinese)
    report = run_step(PreferenceStep(), rows).report["flips"]
    suspected = set(report["suspected"])
    assert len(suspected & set(range(50))) / 50 >= 0.75  # the flips themselves teach the scorer doubt
    assert len(suspected & set(range(50))) / len(suspected) >= 0.98
    assert report["accuracy"] == pytest.approx(550 / 600, abs=0.04)


def test_no_more_than_max_scored_pairs_are_scored() -> None:
    rows = flipped_pairs(600, 50)
    report = run_step(PreferenceStep(max_scored=300), rows).report
    assert report["flips"]["scored"] == 300 < report["length"]["pairs"]
    assert report["flips"]["suspected"]
    assert run_step(PreferenceStep(max_scored=300), rows).report == report


def test_suspected_flips_are_dropped_or_swapped_on_demand() -> None:
    rows = flipped_pairs(300, 20)
    suspected = run_step(PreferenceStep(), rows).report["flips"]["suspected"]
    dropped = run_step(PreferenceStep(flips="drop"), rows)
    assert [item.index for item in dropped.dropped] == suspected and dropped.dropped[0].reason == "suspected_flip"
    swapped = run_step(PreferenceStep(flips="swap"), rows).rows
    first = suspected[0]
    assert swapped[first] == pair(rows[first]["prompt"], rows[first]["rejected"], rows[first]["chosen"])
    assert [row for number, row in enumerate(swapped) if number not in suspected] == [
        row for number, row in enumerate(rows) if number not in suspected
    ]


def test_a_scorer_that_guesses_accuses_nobody() -> None:
    rng = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    rows = [pair(f"p{n}", " ".join(rng.choices(words, k=8)), " ".join(rng.choices(words, k=8))) for n in range(200)]
    report = run_step(PreferenceStep(), rows).report["flips"]
    assert report["accuracy"] < 0.65 and not report["trusted"] and report["suspected"] == []


def test_length_bias() -> None:
    assert length_bias([("aaa", "a"), ("aaa", "a"), ("a", "aaa"), ("aa", "bb")]) == {
        "pairs": 4,
        "longer_wins": 0.6667,
        "log_ratio": 0.1733,  # log(4 / 2) / 4
    }
    assert length_bias([]) == {"pairs": 0, "longer_wins": 0.5, "log_ratio": 0.0}


def test_missing_columns_are_an_error() -> None:
    with pytest.raises(UserError, match="lacks one of the columns prompt, chosen, rejected"):
        run_step(PreferenceStep(), [{"prompt": "p", "chosen": "c"}])
