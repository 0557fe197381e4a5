"""Trivial baselines on pairs whose right answer is known."""

import pytest

from rlhf.errors import UserError
from rlhf.reward.baselines import length_baseline, tfidf_baseline


def pair(chosen, rejected, prompt="p"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


LONGER, SHORTER, TIE = pair("abcd", "ab"), pair("ab", "abcd"), pair("ab", "cd")


def test_length_learns_longer():
    report = length_baseline([LONGER, LONGER, SHORTER], [LONGER, LONGER, SHORTER, TIE])
    assert report.accuracy == 2.5 / 4
    assert report.rule == "prefers the longer response"
    assert report.n == 4
    assert report.low < 0.625 < report.high


def test_length_learns_shorter_from_train_not_from_test():
    report = length_baseline([SHORTER, SHORTER, LONGER], [LONGER, LONGER, SHORTER, SHORTER, SHORTER])
    assert (report.accuracy, report.rule) == (3 / 5, "prefers the shorter response")
    assert length_baseline([SHORTER], [LONGER]).accuracy == 0.0


def test_length_votes_by_pair_not_by_characters():
    # Two pairs say shorter, one very long answer says longer: the count of pairs decides.
    assert length_baseline([SHORTER, SHORTER, pair("x" * 999, "y")], [SHORTER]).accuracy == 1.0


def test_length_undecided_is_a_coin():
    report = length_baseline([LONGER, SHORTER], [LONGER, LONGER])
    assert report.accuracy == 0.5
    assert report.rule.startswith("undecided")


def test_tfidf_learns_words_and_generalises():
    train = [pair(f"a kind answer {i}", f"a rude answer {i}") for i in range(20)]
    report = tfidf_baseline(train, [pair("kind words", "rude words"), pair("so rude", "so kind"), pair("same", "same")])
    assert report.accuracy == 1.5 / 3  # right, wrong, tie
    assert (report.n, report.name) == (3, "tfidf")


@pytest.mark.parametrize(("chosen", "rejected"), [("我很高兴", "我很难过"), ("谢谢你的帮助", "滚开你这个人")])
def test_tfidf_reads_chinese(chosen, rejected):
    train = [pair(f"{chosen}{i}。", f"{rejected}{i}。") for i in range(20)]
    test = [pair(f"今天{chosen}", f"今天{rejected}")] * 3
    assert tfidf_baseline(train, test).accuracy == 1.0


def test_chinese_gets_character_trigrams():
    """Words are not delimited in Chinese; runs of characters stand in for them."""
    from rlhf.reward import baselines

    assert [name for name, _ in baselines.text_features(["电影很好看"]).transformer_list] == ["words", "characters"]
    assert [name for name, _ in baselines.text_features(["a good film"]).transformer_list] == ["words"]
    assert "影很好" in baselines.text_features(["电影很好看"]).fit(["电影很好看"]).transformer_list[1][1].vocabulary_


def test_swapping_test_pairs_mirrors_the_accuracy():
    """Without an intercept, a pair and its mirror image get opposite answers."""
    train = [pair(f"yes {word}", f"no {word}") for word in ("one", "two", "three", "four")]
    test = [pair("yes one", "no two"), pair("no three", "yes four"), pair("yes", "four")]
    mirrored = [pair(p["rejected"], p["chosen"]) for p in test]
    assert tfidf_baseline(train, test).accuracy + tfidf_baseline(train, mirrored).accuracy == pytest.approx(1.0)


def test_subsample_of_many_pairs(monkeypatch, caplog):
    from rlhf.reward import baselines

    monkeypatch.setattr(baselines, "_MAX_TRAIN_PAIRS", 5)
    train = [pair("kind", "rude")] * 9
    with caplog.at_level("INFO"):
        assert tfidf_baseline(train, [pair("kind", "rude")]).accuracy == 1.0
    assert "5 of 9" in caplog.text


def test_prompt_may_be_messages():
    messages = [{"role": "user", "content": "hi"}]
    assert length_baseline([pair("ab", "a", messages)], [pair("ab", "a", messages)]).accuracy == 1.0


@pytest.mark.parametrize("baseline", [length_baseline, tfidf_baseline])
@pytest.mark.parametrize(
    ("train", "test", "seen"),
    [
        ([], [LONGER], "train_pairs is empty"),
        ([LONGER], [], "test_pairs is empty"),
        ([LONGER], [{"chosen": "a"}], r"test_pairs\[0\]\['rejected'\] is None"),
        ([LONGER, pair(["a"], "b")], [LONGER], r"train_pairs\[1\]\['chosen'\] is \['a'\]"),
    ],
)
def test_bad_pairs_are_one_line(baseline, train, test, seen):
    with pytest.raises(UserError, match=seen) as error:
        baseline(train, test)
    assert "\n" not in str(error.value)


def test_pairs_without_words():
    with pytest.raises(UserError, match="no word repeats in 1 pairs"):
        tfidf_baseline([pair("...", "!!")], [LONGER])
