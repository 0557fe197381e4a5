"""Selection methods on planted structure, where the right choice is known."""

import numpy as np
import pytest

from rlhf.labels.features import embedding_differences, longer, word_differences
from rlhf.labels.selection import METHODS, NEEDS_MODEL, Pool, Selection, fit, prepared, select, sigmoid


def pool(pairs, labelled=(), **more) -> Pool:
    pairs = np.array(pairs, dtype=float)
    return Pool(pairs, np.array(labelled, dtype=float).reshape(-1, pairs.shape[1]), **more)


def some_pool(seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    return Pool(rng.normal(size=(60, 4)) / 2, rng.normal(size=(12, 4)) / 2)


@pytest.mark.parametrize("labels", [0, 12])
@pytest.mark.parametrize("method", METHODS)
def test_which_response_is_a_does_not_matter(method, labels):
    if method in NEEDS_MODEL and not labels:
        pytest.skip("needs labels")
    known = Pool(some_pool().pairs, some_pool().labelled[:labels])
    mirror = Pool(known.pairs * np.where(np.arange(60) % 3 == 0, -1.0, 1.0)[:, None], known.labelled)
    one, two = (select(method, each, 20, seed=3) for each in (known, mirror))
    assert one.rows.tolist() == two.rows.tolist()
    assert len(set(one.rows.tolist())) == 20
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_all_pairs_where_the_pool_has_fewer(method):
    known = some_pool()
    small = Pool(known.pairs[:5], known.labelled)
    assert sorted(select(method, small, 9, seed=0).rows.tolist()) == [0, 1, 2, 3, 4]


def repeated(kinds: int, each: int, labels: int = 12) -> Pool:
    """Pairs that say the same, as those of yes/no answers do, after one equal pair of responses (x = 0)."""
    some = some_pool(1)
    pairs = np.concatenate([np.zeros((1, 4)), np.repeat(some.pairs[:kinds], each, axis=0)])
    return Pool(pairs * np.where(np.arange(len(pairs)) % 3 == 0, -1.0, 1.0)[:, None], some.labelled[:labels])


@pytest.mark.parametrize("labels", [0, 12])
@pytest.mark.parametrize("count", [1, 7, 40, 99])
@pytest.mark.parametrize("method", METHODS)
def test_no_pair_is_selected_twice_where_many_say_the_same(method, count, labels):
    if method in NEEDS_MODEL and not labels:
        pytest.skip("needs labels")
    known = repeated(kinds=3, each=20, labels=labels)
    for seed in range(3):
        found = select(method, known, count, seed)
        assert len(set(found.rows.tolist())) == len(found.rows) == len(found.scores) == min(count, 61)
        assert found.rows.tolist() == select(method, known, count, seed).rows.tolist()


def test_mix_takes_another_of_each_kind_once_all_kinds_are_there():
    known = repeated(kinds=3, each=20)
    kinds = np.repeat([3, 0, 1, 2], [1, 20, 20, 20])
    for seed in range(5):
        found = kinds[select("mix", known, 31, seed).rows]
        assert np.bincount(found[found < 3]).tolist() == [10, 10, 10]


def test_a_method_that_repeats_itself_is_a_bug(monkeypatch):
    monkeypatch.setitem(METHODS, "same", lambda pool, count, rng: Selection(np.zeros(count, int), np.zeros(count)))
    with pytest.raises(AssertionError, match="same"):
        select("same", some_pool(), 2, seed=0)


def test_mix_without_labels_tells_no_side_by_which_is_a_where_lengths_are_equal():
    pairs = some_pool(2).pairs * [1, 1, 1, 0]  # the last column is the length
    mirror = pairs * np.where(np.arange(60) % 3 == 0, -1.0, 1.0)[:, None]
    for seed in range(3):
        one, two = (select("mix", pool(each), 20, seed).rows.tolist() for each in (pairs, mirror))
        assert one == two


def test_random_is_a_draw_by_the_seed():
    picked = [select("random", some_pool(), 10, seed).rows.tolist() for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    hits = np.bincount(np.concatenate([select("random", some_pool(), 10, seed).rows for seed in range(300)]))
    assert len(hits) == 60 and hits.min() > 20  # 50 expected of each


def test_uncertainty_takes_what_the_model_does_not_know():
    # The labels say: the first feature is good. Pairs that differ in it little are uncertain.
    known = pool([[3, 0], [0.1, 0], [-2, 0], [-0.3, 0], [1, 0]], labelled=[[1, 0]] * 20)
    found = select("uncertainty", known, 3, seed=0)
    assert found.rows.tolist() == [1, 3, 4]
    assert found.scores[0] < np.log(2) and list(found.scores) == sorted(found.scores, reverse=True)
    given = pool([[1, 0]] * 4, probabilities=np.array([0.9, 0.2, 0.55, 0.01]))
    assert select("uncertainty", given, 2, seed=0).rows.tolist() == [2, 1]


def test_disagreement_is_not_uncertainty():
    # Row 0: both models are undecided. Row 1: each is sure, of the opposite. Row 2: both are sure of the same.
    votes = np.array([[0.5, 0.95, 0.9], [0.5, 0.05, 0.9]])
    found = select("disagreement", pool([[1, 0]] * 3, ensemble=votes), 3, seed=0)
    assert found.rows[0] == 1
    # Mutual information by hand: H(0.5) - H(0.95) = 0.693147 - 0.198515.
    assert found.scores[0] == pytest.approx(0.494632, abs=1e-6)
    assert found.scores[1:] == pytest.approx([0, 0], abs=1e-12)


def test_disagreement_of_heads_on_resampled_labels():
    # Many labels on the first feature, two that contradict each other on the second: that is where the heads differ.
    labelled = [*[[1, 0]] * 40, [0, 1], [0, -1]]
    assert select("disagreement", pool([[1, 0], [0, 1]], labelled), 1, seed=0).rows.tolist() == [1]


def test_diversity_takes_one_of_each_kind():
    rng = np.random.default_rng(0)
    centres = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5]])
    kinds = np.repeat([0, 1, 2], [30, 5, 2])
    pairs = centres[kinds] + rng.normal(size=(37, 3)) / 10
    pairs[::2] *= -1  # a pair and its mirror are alike
    assert sorted(kinds[select("diversity", pool(pairs), 3, seed=0).rows]) == [0, 1, 2]
    labelled = [[-5, 0, 0], [0, 5, 0]]
    assert kinds[select("diversity", pool(pairs, labelled), 1, seed=0).rows].tolist() == [2]


def test_mix_takes_uncertain_pairs_of_different_kinds():
    # Kinds 0 and 1 are uncertain in different directions, kind 2 is known for sure.
    pairs = [[0, 2, 0]] * 10 + [[0, 0, 2]] * 3 + [[20, 0, 0]] * 20
    kinds = np.repeat([0, 1, 2], [10, 3, 20])
    labelled = [[20, 0, 0]] * 30
    for seed in range(5):
        assert {0, 1} <= set(kinds[select("mix", pool(pairs, labelled), 3, seed).rows].tolist())


def test_information_is_the_greedy_fall_of_the_pools_variance():
    # A second implementation: A inverted anew for every candidate.
    known = some_pool(4)
    weights = fit(known.labelled)

    def fisher(x):
        p = sigmoid(x @ weights)
        return (x * (p * (1 - p))[:, None]).T @ x

    spread = known.pairs.T @ known.pairs / 60
    a = np.eye(4) + fisher(known.labelled)
    rows, scores = [], []
    for _ in range(8):
        falls = [
            -np.inf
            if row in rows
            else np.trace(spread @ (np.linalg.inv(a) - np.linalg.inv(a + fisher(known.pairs[[row]]))))
            for row in range(60)
        ]
        rows.append(int(np.argmax(falls)))
        scores.append(max(falls))
        a += fisher(known.pairs[[rows[-1]]])
    found = select("information", known, 8, seed=0)
    assert found.rows.tolist() == rows
    np.testing.assert_allclose(found.scores, scores, rtol=1e-8)


def test_fit_is_penalised_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    labelled = np.random.default_rng(1).normal(size=(50, 3)) + np.array([0.5, 0, 0])
    both = np.concatenate([labelled, -labelled])
    other = LogisticRegression(C=2.0 / 2, fit_intercept=False, tol=1e-10, max_iter=1000)
    other.fit(both, [1] * 50 + [0] * 50)
    np.testing.assert_allclose(fit(labelled, variance=2.0), other.coef_[0], atol=1e-5)
    assert fit(np.zeros((0, 3))).tolist() == [0, 0, 0]


def test_prepared_features_have_one_scale_and_the_length():
    rng = np.random.default_rng(2)
    pairs, lengths = rng.normal(size=(200, 150)) * 40, rng.normal(size=200)
    x = prepared(pairs, lengths)
    assert x.shape == (200, 129)
    assert (x**2).sum(axis=1).mean() == pytest.approx(1)
    assert abs(np.corrcoef(x[:, -1], lengths)[0, 1]) == pytest.approx(1)
    np.testing.assert_allclose(prepared(-pairs, -lengths), -x)
    assert not prepared(np.zeros((3, 2)), np.zeros(3)).any()


def test_features_are_differences_of_the_responses():
    pairs = [
        {"prompt": "q", "response_a": "aaa", "response_b": "b"},
        {"prompt": "q", "response_a": "b", "response_b": ""},
    ]
    assert longer(pairs) == pytest.approx(np.log([4 / 2, 2 / 1]))
    seen = []

    def embed(texts):
        seen.extend(texts)
        return np.array([[len(text), 1.0] for text in texts])

    assert embedding_differences(pairs, embed).tolist() == [[2, 0], [1, 0]]
    assert sorted(seen) == ["", "aaa", "b"]  # each text once
    film = {"response_a": "good film", "response_b": "bad film"}
    other = {"response_a": "好", "response_b": "坏"}
    words = word_differences([film, other])
    assert np.linalg.norm(words[1]) == pytest.approx(2)  # words and characters: two unit vectors, nothing in common
    mirrored = word_differences([film | {"response_a": "bad film", "response_b": "good film"}, other])
    np.testing.assert_allclose(mirrored[0], -words[0], atol=1e-9)
    assert 1 < np.linalg.norm(words[0]) < 2
