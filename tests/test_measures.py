"""What `evaluate` measures beside the table, on a few users whose answers can be counted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec.config import Evaluation
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.stages.measures import beyond, calibrations, check_scores, listed_pairs, preferences, ratings_of
from llmrec.stages.scoring import Questions

NAN = float("nan")


def sequences(*users, items=9):
    """Users as lists of (item, rating); the last two are the validation and the test target."""
    split = [label for user in users for label in [TRAIN] * (len(user) - 2) + [VALID, TEST]]
    events = [event for user in users for event in user]
    return Sequences(
        offsets=np.cumsum([0, *map(len, users)]),
        items=np.array([item for item, _ in events], dtype=np.int32),
        ratings=np.array([rating for _, rating in events], dtype=np.float32),
        split=np.array(split, dtype=np.int8),
        item_count=items,
    )


def questions(split, users, targets, items, rows=None):
    items = np.array(items, dtype=np.int32)
    asked = [[[1]]] * len(users) if rows is None else rows
    scores = np.where(items > 0, -np.arange(items.shape[1], dtype=np.float32), -np.inf)
    return Questions(split, np.array(users, dtype=np.int32), np.array(targets), items, scores, np.zeros(0), asked, Counter())


DATA = sequences(
    [(1, 3), (2, 3), (3, 5), (4, 1)],  # likes the validation item more
    [(1, 3), (5, 3), (3, 2), (4, 4)],  # the test item
    [(2, 3), (1, 3), (3, 4), (5, 4)],  # no difference
    [(2, 3), (5, 3), (4, 5), (3, 1)],  # the test item is not among the candidates
)
VALID_ASKED = questions("valid", [0, 1, 2, 3], [3, 3, 3, 4], [[3, 4, 6], [3, 4, 6], [3, 5, 6], [4, 6, 0]])
TEST_ASKED = questions("test", [0, 1, 2, 3], [4, 4, 5, 3], [[4, 6, 7], [6, 4, 7], [6, 7, 5], [6, 7, 8]])
ASKED = {"valid": VALID_ASKED, "test": TEST_ASKED}


def test_a_score_that_orders_nothing_is_named_by_the_users_own_id(tmp_path):
    pl.DataFrame({"user": range(4), "raw_id": list("abcd")}).write_parquet(tmp_path / "users.parquet")
    pl.DataFrame({"item": range(1, 10), "raw_id": [f"film-{n}" for n in range(1, 10)]}).write_parquet(tmp_path / "items.parquet")
    good = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, NAN]])
    check_scores({("orpo", "valid"): good}, ASKED, tmp_path)  # padding may be anything
    bad = good.copy()
    bad[2, 1] = np.inf
    with pytest.raises(UserError, match=r"orpo gives user c \(valid\) the score inf for item film-5.*orpo\.learning_rate"):
        check_scores({("sft", "test"): np.zeros((4, 3)), ("orpo", "valid"): bad}, ASKED, tmp_path)


def test_lists_are_the_first_ten_and_equal_scores_keep_the_retrievers_order():
    items = np.array([[*range(1, 13)], [12, 11, *[0] * 10]], dtype=np.int32)
    down, even = np.where(items > 0, -items, -np.inf), np.where(items > 0, 1.0, -np.inf)
    data = sequences([(1, 3), (1, 3), (2, 3), (3, 3)], [(1, 3), (2, 3), (3, 3), (4, 3)], items=12)
    found = beyond({"down": down, "even": even, "up": np.where(items > 0, items, -np.inf)}, items, data, [f"film {n}" for n in range(13)])
    assert found["down"] == found["even"]
    assert found["even"]["coverage@10"] == 1  # 1 to 10 and 12, 11
    assert found["up"]["coverage@10"] == 10 / 12
    assert found["even"]["popularity@10"] == pytest.approx(((2 + 1) / 10 + 0) / 2)  # item 1, taken twice by one user, has two users


def test_calibration_asks_who_was_asked_and_has_the_target():
    logprobs = {"orpo": np.log(np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.9, 0.05, 0.05]]))}
    found = calibrations(logprobs, TEST_ASKED)["orpo"]
    assert (found["users"], found["accuracy"]) == (3, pytest.approx(1 / 3))  # the fourth has no target among his
    refused = questions("test", [0, 1, 2, 3], TEST_ASKED.targets, TEST_ASKED.items, rows=[[[1]], [], [[1]], [[1]]])
    assert calibrations(logprobs, refused)["orpo"]["users"] == 2
    assert calibrations(logprobs, questions("test", [3], [3], [[6, 7, 8]])) == {}


SETTINGS = Evaluation(liked=4, resamples=100)


def test_preference_compares_the_two_items_where_both_are_candidates():
    pairs = listed_pairs(DATA, VALID_ASKED)
    assert (pairs.rows.tolist(), pairs.places.tolist(), pairs.ratings.tolist()) == ([0, 1], [[0, 1], [0, 1]], [[5, 1], [2, 4]])
    scores = {"retriever": np.zeros((4, 3)), "orpo": np.array([[2.0, 1.0, 0], [1.0, 2.0, 0], [0, 0, 0], [0, 0, 0]])}
    ranks = {"retriever": np.array([1, 3, 3, 0]), "orpo": np.array([1, 2, 3, 0])}
    ratings = ratings_of(DATA, TEST_ASKED)
    assert ratings.tolist() == [1, 4, 4, 1]
    found = preferences(pairs, scores, ratings, ranks, SETTINGS, seed=0)
    assert found["pairwise"]["orpo"] == {"users": 2, "accuracy": 1.0, "standard_error": 0.0, "ties": 0}
    assert found["pairwise"]["retriever"] == {"users": 2, "accuracy": 0.5, "standard_error": 0.0, "ties": 2}
    assert found["liked"]["users"] == 2
    assert found["liked"]["overall"]["orpo"]["mrr@10"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    pairwise, liked = found["comparisons"]
    assert (pairwise["b"], pairwise["metric"], pairwise["difference"]) == ("retriever", "pairwise", 0.5)
    assert (liked["metric"], liked["difference"]) == ("liked ndcg@10", pytest.approx((1 / np.log2(3) - 1 / 2) / 2))
    assert "liked" not in preferences(pairs, scores, ratings, ranks, replace(SETTINGS, liked=6), seed=0)


def test_a_refused_prompt_has_no_preference():
    """Its candidates keep the retriever's scores."""
    refused = questions("valid", VALID_ASKED.users, VALID_ASKED.targets, VALID_ASKED.items, rows=[[], [[1]], [[1]], [[1]]])
    assert listed_pairs(DATA, refused).rows.tolist() == [1]


def test_without_ratings_there_is_no_preference():
    unrated = sequences(*([(item, NAN) for item in range(1, 5)] for _ in range(4)))
    pairs = listed_pairs(unrated, VALID_ASKED)
    assert len(pairs.rows) == 0
    ranks = {"retriever": np.ones(4, dtype=int)}
    assert preferences(pairs, {"retriever": np.zeros((4, 3))}, ratings_of(unrated, TEST_ASKED), ranks, SETTINGS, seed=0) == {}
