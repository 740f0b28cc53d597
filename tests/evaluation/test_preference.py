import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.evaluation.metrics import summary
from llmrec.evaluation.preference import comparisons, liked_targets, pairwise_accuracy, rated_pairs, render, won

NAN = float("nan")


def test_pairs_are_two_items_of_a_user_rated_differently():
    """Users by rows: rated differently, alike, one not rated, the same item twice, and one who is asked in test alone."""
    items = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 2, 3, 4], np.int32)
    ratings = np.array([3, 5, 1, 3, 4, 4, 3, 4, NAN, 3, 4, 5, 3, 4], np.float32)
    split = np.array([*[TRAIN, VALID, TEST] * 4, TRAIN, TEST], np.int8)
    found = rated_pairs(Sequences(np.array([0, 3, 6, 9, 12, 14]), items, ratings, split, 4))
    assert (found.users.tolist(), found.items.tolist(), found.ratings.tolist(), found.ends.tolist()) == ([0], [[2, 3]], [[5, 1]], [1])


def test_pairwise_by_hand():
    scores = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 2.0]])
    of_users = won(scores, np.array([[5, 3], [5, 3], [2, 4], [2, 4]]))
    assert of_users.tolist() == [1, 0, 0.5, 1]
    standard_error = pytest.approx(np.std([1, 0, 0.5, 1], ddof=1) / 2)
    assert pairwise_accuracy(of_users) == {"users": 4, "accuracy": 2.5 / 4, "standard_error": standard_error, "ties": 1}


def test_ranks_serve_as_scores_when_they_are_turned_round():
    assert won(-np.array([[3, 9], [3, 9]]), np.array([[5.0, 1.0], [1.0, 4.0]])).tolist() == [1, 0]


def test_one_user_has_no_error():
    assert pairwise_accuracy(np.ones(1)) is None
    assert pairwise_accuracy(np.zeros(0)) is None


def test_a_broken_score_is_named():
    with pytest.raises(ValueError, match="row 1"):
        won(np.array([[1.0, 1.0], [1.0, NAN]]), np.array([[1.0, 2.0], [1.0, 2.0]]))


@given(st.integers(2, 30), st.integers(0, 999))
def test_turning_the_scores_round_turns_the_accuracy_round(users, seed):
    random = np.random.default_rng(seed)
    scores, ratings = random.integers(0, 3, (users, 2)), random.permuted(np.tile([1.0, 4.0], (users, 1)), axis=1)
    one = won(scores, ratings)
    assert (one + won(-scores, ratings) == 1).all()
    assert (won(scores[:, ::-1], ratings[:, ::-1]) == one).all()


def test_liked_targets_are_those_of_their_users():
    ratings = np.array([5.0, 4.0, 3.5, NAN, 1.0])
    ranks = {"retriever": np.array([1, 0, 2, 3, 4]), "orpo": np.array([5, 0, 1, 1, 1])}
    found = liked_targets(ranks, ratings, threshold=4)
    assert (found["users"], found["threshold"]) == (2, 4.0)
    assert found["overall"] == {name: summary(rank[:2]) for name, rank in ranks.items()}
    assert liked_targets(ranks, ratings, threshold=1)["users"] == 4
    assert liked_targets(ranks, ratings, threshold=6) is None
    assert liked_targets(ranks, np.full(5, NAN), threshold=1) is None


def test_what_preference_tuning_changed_is_tested_user_by_user():
    """ORPO wins 12 pairs that SFT loses and loses 2 that it wins: the permutation test is the sign test of 14 coins. Ranks do not move."""
    sft = np.repeat([0.0, 1.0, 1.0, 0.5], [12, 2, 6, 5])
    orpo = np.repeat([1.0, 0.0, 1.0, 0.5], [12, 2, 6, 5])
    of_systems = {"retriever": np.full(25, 0.5), "sft": sft, "orpo": orpo}
    same = dict.fromkeys(of_systems, np.array([1, 4, 0]))
    found = {(c["a"], c["b"], c["metric"]): c for c in comparisons(of_systems, same, 20_000, seed=0)}
    assert list(found) == [("orpo", b, metric) for b in ("sft", "retriever") for metric in ("pairwise", "liked ndcg@10")]
    changed = found["orpo", "sft", "pairwise"]
    assert changed["difference"] == pytest.approx(10 / 25)
    assert changed["p_permutation"] == pytest.approx(binomtest(12, 14).pvalue, abs=0.002)
    assert changed["p_holm"] == pytest.approx(3 * changed["p_permutation"])  # the second of four: 18 pairs to 2 against the retriever
    assert found["orpo", "sft", "liked ndcg@10"]["p_holm"] == 1


def test_what_is_not_there_is_not_compared():
    of_systems = {"retriever": np.array([1.0, 0.0]), "orpo": np.array([1.0, 1.0])}
    assert [(c["b"], c["metric"]) for c in comparisons(of_systems, {}, 100, seed=0)] == [("retriever", "pairwise")]  # no SFT, nothing liked
    assert comparisons({}, {}, 100, seed=0) == []
    shown = render({"pairwise": {"retriever": pairwise_accuracy(of_systems["retriever"])}, "comparisons": []})
    assert shown == "the better rated of two later items is scored higher (2 validation users): retriever 0.500"
