import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmrec.evaluation.metrics import KS, by_user, expected, per_user, rank_of_target, summary, tie_range, ties

THEIRS = {"hr": ir_measures.Success, "ndcg": ir_measures.nDCG, "mrr": ir_measures.RR, "recall": ir_measures.R}

RANKS = arrays.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, 40))


def test_by_hand():
    values = per_user(np.array([1, 3, 11, 0]), ks=(1, 10))
    assert values["hr@1"].tolist() == [1, 0, 0, 0]
    assert values["hr@10"].tolist() == [1, 1, 0, 0]
    assert values["ndcg@10"].tolist() == [1, 0.5, 0, 0]  # 1 / log2(4)
    assert values["mrr@10"].tolist() == [1, pytest.approx(1 / 3), 0, 0]


def by_ir_measures(right, scores, ks):
    """Metric -> value of each user, by trec_eval, of items ranked by scores that are all different.

    Args:
        right: set of columns per user.
        scores: (users, items).
    """
    qrels = [ir_measures.Qrel(str(user), str(item), 1) for user, items in enumerate(right) for item in items]
    run = [ir_measures.ScoredDoc(str(user), str(item), score) for user, row in enumerate(scores) for item, score in enumerate(row.tolist())]
    names = {str(measure @ k): f"{name}@{k}" for name, measure in THEIRS.items() for k in ks}
    found = {name: np.zeros(len(right)) for name in names.values()}
    for value in ir_measures.iter_calc([measure @ k for measure in THEIRS.values() for k in ks], qrels, run):
        found[names[str(value.measure)]][int(value.query_id)] = value.value
    return found


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 9999))
def test_agrees_with_trec_eval(users, items, seed):
    random = np.random.default_rng(seed)
    scores = random.permuted(np.tile(np.arange(items, dtype=float), (users, 1)), axis=1)
    targets = random.integers(0, items, users)
    ours = per_user(rank_of_target(scores, np.tile(np.arange(1, items + 1), (users, 1)), targets + 1))
    theirs = by_ir_measures([{int(target)} for target in targets], scores, KS)
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], abs=1e-12)
        if name.startswith("hr"):
            assert values == pytest.approx(theirs[name.replace("hr", "recall")], abs=1e-12)


def test_a_user_with_several_cases_counts_once():
    found = summary(np.array([1, 1, 0, 2]), ks=(1,), users=np.array([7, 7, 7, 9]))
    assert found["hr@1"] == pytest.approx((2 / 3 + 0) / 2)
    assert summary(np.array([1, 0]), users=np.array([4, 3])) == summary(np.array([1, 0]))
    assert by_user(np.array([1.0, 4.0, 2.0]), np.array([9, 7, 9])).tolist() == [4, 1.5]  # users ascending


def test_ties_by_hand_of_users_with_several_cases():
    """User 3's second target stands third to twelfth, user 5's is sure at the second place."""
    best, worst, users = np.array([1, 3, 2]), np.array([1, 12, 2]), np.array([3, 3, 5])
    second, tied = 1 / math.log2(3), sum(1 / math.log2(place + 1) for place in range(3, 11)) / 10
    assert ties(best, worst, users) == {
        "tied_users": 1,
        "hr@10": [1, 0.75],
        "expected_hr@10": pytest.approx((1.8 / 2 + 1) / 2),
        "ndcg@10": [pytest.approx((0.75 + second) / 2), pytest.approx((0.5 + second) / 2)],
        "expected_ndcg@10": pytest.approx(((1 + tied) / 2 + second) / 2),
    }


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


def test_the_tie_range_by_hand():
    candidates = np.array([[5, 6, 7, 8]] * 4 + [[5, 6, 0, 0]])
    scores = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 9.0]])
    best, worst = tie_range(scores, candidates, np.array([5, 6, 8, 9, 6]))
    assert best.tolist() == [1, 2, 1, 0, 1]
    assert worst.tolist() == [4, 3, 1, 0, 2]


def test_the_expectation_is_of_the_metric_not_of_the_mean_rank():
    found = expected(np.array([1, 2, 0]), np.array([3, 2, 0]), ks=(2,))
    assert found["hr@2"].tolist() == [pytest.approx(2 / 3), 1, 0]
    assert found["mrr@2"].tolist() == [pytest.approx((1 + 1 / 2) / 3), 0.5, 0]
    assert found["ndcg@2"].tolist() == [pytest.approx((1 + 1 / math.log2(3)) / 3), pytest.approx(1 / math.log2(3)), 0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_the_expectation_is_the_mean_over_all_places_in_the_tie(scores, data):
    """Against every order of the items with the target's score."""
    target = data.draw(st.integers(0, len(scores) - 1))
    row = np.array([scores], float)
    best, worst = tie_range(row, np.arange(1, len(scores) + 1)[None], np.array([target + 1]))
    above, level = sum(s > scores[target] for s in scores), sum(s == scores[target] for s in scores)
    places = np.arange(above + 1, above + level + 1)
    assert (best[0], worst[0]) == (places[0], places[-1])
    assert rank_of_target(row, np.arange(1, len(scores) + 1)[None], np.array([target + 1]))[0] == places[-1]
    of_all, found = per_user(places), expected(best, worst)
    assert list(found) == list(of_all)
    for name, values in of_all.items():
        assert found[name][0] == pytest.approx(values.mean())
        assert per_user(worst)[name][0] - 1e-12 <= found[name][0] <= per_user(best)[name][0] + 1e-12


@given(RANKS)
def test_without_ties_the_expectation_is_the_metric(rank):
    found = expected(rank, rank)
    for name, values in per_user(rank).items():
        assert (found[name] == values).all()


@pytest.mark.parametrize(("best", "worst"), [([3], [2]), ([0], [2]), ([1, 1], [1])])
def test_refuses_what_is_no_tie(best, worst):
    with pytest.raises(ValueError, match="optimistic rank"):
        expected(np.array(best), np.array(worst))
