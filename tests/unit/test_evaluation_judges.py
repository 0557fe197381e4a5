"""The sentiment judge on a small made-up language where the right answer is known."""

import logging
import sys

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.evaluation import judges
from rlhf.evaluation.judges import JudgeSettings, SentimentJudge

GOOD, BAD = ["wonderful", "moving", "好看"], ["dull", "awful", "难看"]


def reviews(n=200):
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(n)]
    filler = ["the film", "a story", "这 部", "it is"]
    words = [rng.choice(GOOD if label else BAD) for label in labels]
    texts = [f"{rng.choice(filler)} <br /> {word} {rng.choice(filler)}" for word in words]
    return texts, labels


@pytest.fixture
def judge(tmp_path):
    return SentimentJudge.fit(*reviews(), cache_dir=tmp_path)


def test_scores_are_probabilities_of_good(judge):
    good, bad, empty = judge(["p"] * 3, ["a moving story", "a dull story", ""])
    assert good > 0.8
    assert bad < 0.2
    assert 0.3 < empty < 0.7


def test_chinese_without_spaces(judge):
    good, bad = judge(["p"] * 2, ["这部电影好看", "这部电影难看"])
    assert good > 0.6 > 0.4 > bad


def test_the_prompt_is_not_read(judge):
    assert judge(["wonderful moving"], ["a story"]) == judge(["awful dull"], ["a story"])


def test_matches_scikit_learn(judge):
    """The judge rebuilt from arrays must score as the fitted pipeline that it was."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = reviews()
    order = np.random.default_rng(0).permutation(200)[20:]
    vectorizer = TfidfVectorizer(
        preprocessor=judges._clean,
        token_pattern=judges.WORD_PATTERN,
        ngram_range=(1, 2),
        sublinear_tf=True,
        min_df=2,
    )
    features = vectorizer.fit_transform([texts[i] for i in order])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, np.array(labels)[order])
    probes = ["a moving film", "awful", "the story it is wonderful"]
    expected = model.predict_proba(vectorizer.transform(probes))[:, 1]
    np.testing.assert_allclose(
        judge([""] * 3, probes), expected, rtol=1e-4
    )  # the solver meets the columns in another order


def test_vocabulary_keeps_the_terms_of_most_texts():
    texts = ["b b b a", "a b", "a c <br /> C", "d e"]
    # In texts: a 3, b 2; "b b", c, d and e in one only. The tags and repetitions within a text do not count.
    assert judges._vocabulary(texts, JudgeSettings(min_df=2)) == ["a", "b"]
    assert judges._vocabulary(texts, JudgeSettings(min_df=1, max_features=4)) == ["a", "b", "a b", "a c"]


def test_held_out_accuracy_is_that_of_unseen_texts(tmp_path):
    judge = SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert (judge.held_out_accuracy, judge.held_out_short_accuracy, judge.held_out_n) == (1.0, 1.0, 20)
    texts, labels = reviews()
    shuffled = np.random.default_rng(1).permutation(labels).tolist()
    noise = SentimentJudge.fit(texts, shuffled, cache_dir=tmp_path)
    assert noise.held_out_accuracy < 0.9  # labels carry no information; on fitted texts it would be higher
    short = SentimentJudge.fit(texts, labels, tmp_path, JudgeSettings(short_words=1))
    assert short.held_out_short_accuracy < 0.9 < short.held_out_accuracy  # the first word tells nothing


def test_second_fit_comes_from_the_cache(tmp_path, monkeypatch):
    first = SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"judge-{first.fingerprint}.npz"]

    def no_fit(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(judges, "_fit_arrays", no_fit)
    second = SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert second(["p"], ["a moving story"]) == first(["p"], ["a moving story"])
    assert second.held_out_accuracy == first.held_out_accuracy


def test_fingerprint_depends_on_everything_that_shapes_the_fit(monkeypatch):
    import sklearn

    texts, labels = reviews(20)
    base = judges._fingerprint(texts, labels, JudgeSettings())
    others = [
        judges._fingerprint([texts[0] + "x", *texts[1:]], labels, JudgeSettings()),
        judges._fingerprint(texts, labels[::-1], JudgeSettings()),
        judges._fingerprint(texts, labels, JudgeSettings(seed=1)),
        judges._fingerprint(["ab", "c"], [0, 1], JudgeSettings()),
        judges._fingerprint(["a", "bc"], [0, 1], JudgeSettings()),
    ]
    monkeypatch.setattr(sklearn, "__version__", "0.0")
    others.append(judges._fingerprint(texts, labels, JudgeSettings()))
    assert len({base, *others}) == 7


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "other arrays"])
def test_damaged_cache_is_fitted_again_with_a_warning(tmp_path, caplog, damage):
    first = SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "other arrays":
        np.savez(path, something=np.zeros(3))
    else:
        broken = {
            "truncated": whole[:middle],
            "flipped": whole[:60] + bytes(255 - byte for byte in whole[60:middle]) + whole[middle:],
            "empty": b"",
            "text": b"not an archive",
        }
        path.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        again = SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert "is damaged" in caplog.text
    assert again(["p"], ["a dull story"]) == first(["p"], ["a dull story"])
    caplog.clear()
    SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert caplog.text == ""  # the file was replaced by a whole one


def test_unwritable_cache_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    judge = SentimentJudge.fit(*reviews(), cache_dir=tmp_path / "file" / "sub")
    assert "cannot be written" in caplog.text
    assert judge(["p"], ["a moving story"])[0] > 0.8


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails)
    SentimentJudge.fit(*reviews(), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_default_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert judges.default_cache_dir() == tmp_path / "rlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert judges.default_cache_dir() == tmp_path / ".cache" / "rlhf"


def test_vader_typed_values():
    pytest.importorskip("vaderSentiment")
    # From VADER's README: "VADER is smart, handsome, and funny." has compound 0.8316.
    scores = judges.vader_judge(["bad"] * 2, ["VADER is smart, handsome, and funny.", "table"])
    assert scores == [pytest.approx(0.8316, abs=1e-4), 0.0]


def test_missing_vader_names_the_remedy(monkeypatch):
    judges._vader_analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[tiny\]"):
        judges.vader_judge(["p"], ["r"])


@pytest.mark.parametrize(
    ("texts", "labels", "seen"),
    [
        (["a"] * 20, [1] * 19, "20 texts and 19 labels"),
        (["a"] * 3, [1, 0, 1], "got 3 labelled texts"),
        (["a b"] * 20, [1] * 20, "labels are 1;"),
        (["a b"] * 20, [-1, 1] * 10, "labels are -1, 1;"),
        (["..."] * 20, [0, 1] * 10, "no word occurs in 2"),
    ],
)
def test_bad_training_data_is_one_line(texts, labels, seen, tmp_path):
    with pytest.raises(UserError, match=seen) as error:
        SentimentJudge.fit(texts, labels, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_unpaired_prompts_are_refused(judge):
    with pytest.raises(UserError, match="1 prompts and 2 responses"):
        judge(["p"], ["a", "b"])
    assert judge([], []) == []
