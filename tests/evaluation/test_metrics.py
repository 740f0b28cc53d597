import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmrec.evaluation.metrics import KS, per_user, rank_of_target, summary

RANKS = arrays.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, 40))


def test_by_hand():
    values = per_user(np.array([1, 3, 11, 0]), ks=(1, 10))
    assert values["hr@1"].tolist() == [1, 0, 0, 0]
    assert values["hr@10"].tolist() == [1, 1, 0, 0]
    assert values["ndcg@10"].tolist() == [1, 0.5, 0, 0]  # 1 / log2(4)
    assert values["mrr@10"].tolist() == [1, pytest.approx(1 / 3), 0, 0]


def test_agrees_with_trec_eval():
    random = np.random.default_rng(1)
    users, items, targets = 40, 30, random.integers(1, 31, 40)
    scores = random.random((users, items))
    candidates = np.tile(np.arange(1, items + 1), (users, 1))
    ours = summary(rank_of_target(scores, candidates, targets))
    qrels = [ir_measures.Qrel(str(u), str(t), 1) for u, t in enumerate(targets)]
    run = [ir_measures.ScoredDoc(str(u), str(i + 1), scores[u, i]) for u in range(users) for i in range(items)]
    names = {"hr": ir_measures.Success, "ndcg": ir_measures.nDCG, "mrr": ir_measures.RR}
    measures = {f"{name}@{k}": measure @ k for name, measure in names.items() for k in KS}
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    assert ours == pytest.approx({name: theirs[measure] for name, measure in measures.items()}, abs=1e-12)


@given(RANKS)
def test_a_hit_is_worth_more_than_its_gain(rank):
    values = per_user(rank)
    for k in KS:
        hr, ndcg, mrr = values[f"hr@{k}"], values[f"ndcg@{k}"], values[f"mrr@{k}"]
        assert (hr >= ndcg).all()
        assert (ndcg >= mrr).all()
        assert (mrr >= hr / k).all()
    for name in ("hr", "ndcg", "mrr"):
        assert (np.diff([values[f"{name}@{k}"] for k in KS], axis=0) >= 0).all()


@given(RANKS)
def test_means_obey_the_single_positive_bounds(rank):
    """NDCG lies between the chord and the envelope of 1/rank -> 1/log2(rank + 1) (a point set that is concave)."""
    means = summary(rank, ks=(10,))
    h, n, m = means["hr@10"], means["ndcg@10"], means["mrr@10"]
    if h > 0:
        x = np.array([1 / r for r in range(10, 0, -1)])
        y = np.array([1 / math.log2(r + 1) for r in range(10, 0, -1)])
        assert n <= h * np.interp(m / h, x, y) + 1e-12
        assert n >= h * np.interp(m / h, x[[0, -1]], y[[0, -1]]) - 1e-12


@pytest.mark.parametrize("rank", [np.array([-1]), np.array([1.0]), np.array([[1]])])
def test_refuses_what_is_no_rank(rank):
    with pytest.raises(ValueError, match="integers >= 0"):
        per_user(rank)


def test_no_users_is_an_error():
    with pytest.raises(ValueError, match="no users"):
        summary(np.array([], int))


def test_ties_count_against_the_target():
    candidates = np.array([[5, 6, 7, 8]] * 3)
    scores = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert rank_of_target(scores, candidates, np.array([5, 6, 8])).tolist() == [4, 3, 1]


def test_padding_is_no_candidate():
    candidates = np.array([[5, 6, 0, 0], [5, 6, 0, 0]])
    scores = np.array([[1.0, 2.0, np.nan, np.inf], [1.0, 2.0, 9.0, 9.0]])
    assert rank_of_target(scores, candidates, np.array([5, 6])).tolist() == [2, 1]


def test_absent_target_has_rank_zero():
    assert rank_of_target(np.array([[1.0, 2.0]]), np.array([[5, 6]]), np.array([9])).tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_score_is_named(bad):
    scores = np.array([[1.0, 2.0], [1.0, bad]])
    with pytest.raises(ValueError, match="row 1: the score of candidate 6"):
        rank_of_target(scores, np.array([[5, 6], [5, 6]]), np.array([5, 5]))


@given(st.data())
def test_rank_does_not_depend_on_the_order_of_candidates(data):
    n = data.draw(st.integers(1, 12))
    scores = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), float)
    order = np.array(data.draw(st.permutations(range(n))))
    items = np.arange(1, n + 1)
    target = np.array([data.draw(st.integers(1, n))])
    rank = rank_of_target(scores[None], items[None], target)
    assert rank == rank_of_target(scores[None, order], items[None, order], target)
    others_not_below = sum(scores[i] >= scores[target[0] - 1] for i in range(n) if i != target[0] - 1)
    assert rank[0] == 1 + others_not_below
