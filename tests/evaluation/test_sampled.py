"""Sampled negatives: who is drawn, how often, and what models that know nothing get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import UserError
from llmrec.evaluation.sampled import NEGATIVES, measured, negatives


@given(st.integers(0, 10_000), st.integers(1, 12), st.sets(st.integers(1, 30), max_size=12), st.integers(1, 30), st.booleans())
def test_negatives_are_distinct_and_nothing_the_user_has(seed, count, own, target, popular):
    weights = np.arange(31.0) if popular else np.ones(31)
    if popular:
        weights[25:] = 0
    taken = np.array(sorted(own), dtype=np.int32)
    allowed = {item for item in range(1, 31) if weights[item] > 0} - own - {target}
    users, targets = np.array([3], dtype=np.int32), np.array([target], dtype=np.int32)
    if len(allowed) < count:
        with pytest.raises(UserError, match=f"only {len(allowed)} items can be drawn for user 3 "):
            negatives(users, targets, [taken], weights, count=count, seed=seed)
        return
    [drawn] = negatives(users, targets, [taken], weights, count=count, seed=seed).tolist()
    assert len(set(drawn)) == count
    assert set(drawn) <= allowed


def test_a_draw_depends_on_seed_user_and_target_alone():
    users, targets = np.array([0, 1, 1, 2], dtype=np.int32), np.array([5, 5, 6, 5], dtype=np.int32)
    taken = [np.array([5, 6])] * 4
    whole = negatives(users, targets, taken, np.ones(301), seed=4)
    part = negatives(users[2:], targets[2:], taken[2:], np.ones(301), seed=4)
    assert whole.shape == (4, NEGATIVES)
    np.testing.assert_array_equal(whole[2:], part)
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert (negatives(users, targets, taken, np.ones(301), seed=5) != whole).any()


def test_chances_are_in_proportion_to_the_weights():
    """The first of one draw: items 1, 2, 3 with weights 1, 2, 5; 4 is the target, 0 is padding."""
    weights = np.array([9.0, 1.0, 2.0, 5.0, 7.0])
    users = np.arange(4_000, dtype=np.int32)
    drawn = negatives(users, np.full(4_000, 4), [np.array([4])] * 4_000, weights, count=1)
    shares = np.bincount(drawn[:, 0], minlength=5) / 4_000
    np.testing.assert_allclose(shares, [0, 1 / 8, 2 / 8, 5 / 8, 0], atol=0.025)  # 3 standard deviations


def test_a_model_that_scores_all_alike_gets_what_chance_gives():
    found = measured(np.arange(7), np.zeros((7, 1 + NEGATIVES)))
    assert found["hr@10"] == pytest.approx(10 / 101)
    assert found["ndcg@10"] == pytest.approx(sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / 101)
    assert found["mrr@5"] == pytest.approx(sum(1 / rank for rank in range(1, 6)) / 101)


def test_random_scores_give_what_chance_gives():
    random = np.random.default_rng(0)
    found = measured(np.arange(20_000), random.standard_normal((20_000, 1 + NEGATIVES)))
    assert found["hr@10"] == pytest.approx(10 / 101, abs=0.0065)  # 3 standard deviations
    assert found["hr@1"] == pytest.approx(1 / 101, abs=0.0021)


def test_the_right_item_stands_first_among_the_columns():
    scores = np.zeros((2, 1 + NEGATIVES))
    scores[0, 0], scores[1, 1:13] = 1.0, 1.0  # rank 1, and rank 13 to 101
    found = measured(np.array([0, 1]), scores)
    assert found["hr@1"] == found["hr@10"] == 0.5
    assert found["hr@20"] == pytest.approx((1 + 8 / 89) / 2)


def test_every_user_counts_once():
    scores = np.zeros((4, 1 + NEGATIVES))
    scores[:3, 0] = 1.0  # three firsts of user 0
    scores[3, 1:50] = 1.0  # and a fiftieth of user 1
    assert measured(np.array([0, 0, 0, 1]), scores)["hr@10"] == 0.5


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="nan"):
        measured(np.array([0]), np.array([[0.0, np.nan]]))
