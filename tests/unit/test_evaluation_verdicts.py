"""What a judge's reply is read as, reply by reply."""

import pytest

from rlhf.evaluation.verdicts import read_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "a"),
        ("b", "b"),
        ("Tie.", "tie"),
        ("**B**", "b"),
        ("[[A]]", "a"),
        ("\\boxed{B}", "b"),
        ("Answer A", "a"),
        ("Answer: B", "b"),
        ("answer: b", "b"),
        ('{"answer": "B"}', "b"),
        ("The better answer is B", "b"),
        ("The better answer is **B**.", "b"),
        ("The better answer is A because it is short.", "a"),
        ("My final verdict: tie", "tie"),
        ("A tie", "tie"),
        ("It's a tie.", "tie"),
        ("I would call it a tie: both say the same.", "tie"),
        ("A good answer would be honest, so B is better.", "b"),
        ("A is better than B.", "a"),
        ("B is clearly the better answer, A is rude.", "b"),
        ("A is better written, but overall B wins", "b"),
        ("Answer A is long. Answer B is concise and kind.\n\nB", "b"),
        ("Answer A is concise.\nI prefer B: it does not lie.", "b"),
        ("A does not answer, so B", "b"),
        ("B. Answer A contains a factual", "b"),
        ("A because it answers", "a"),
        ("B\n\nIt is more helpful.", "b"),
        ("There is no tie here: B is better.", "b"),
    ],
)
def test_a_verdict_is_read(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Both are about films",
        "A good answer would be honest.",
        "Answer: A good reply would be honest.",
        "A or B",
        "A/B",
        "A, B",
        "Answer A is long. Answer B is concise.",
        "A. It is short\nB. It is long and",
        "Answer A:\nIt is short.\nAnswer B:",
        "I don't think B is better",
        "It is hard to say whether the better answer is A",
        "The better answer is A or B",
        "B is worse",
        "A tie-breaker would help",
        "Bananas",
    ],
)
def test_what_says_no_verdict_is_not_guessed(reply):
    assert read_verdict(reply) is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>\nA is short. The better answer is A?\n</think>\n\nB", "b"),
        ("<think>A</think><think>A again</think>The better answer is B", "b"),
        ("A is short, so A.\n</think>\n\nB", "b"),  # the template of the chat opened it
        ("<think>\nOkay, so the better answer is A", None),  # cut off by max_tokens
        ("<THINK>A</THINK>", None),
    ],
)
def test_thoughts_are_no_verdict(reply, verdict):
    assert read_verdict(reply) == verdict
