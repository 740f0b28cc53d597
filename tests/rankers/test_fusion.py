import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmrec.errors import UserError
from llmrec.evaluation.metrics import rank_of_target, summary
from llmrec.rankers.fusion import GRID, choose_weight, fuse, standardise

FLOATS = st.floats(-1e6, 1e6, width=32)
PAIRS = arrays.arrays(np.float32, st.tuples(st.just(2), st.integers(1, 5), st.integers(1, 8)), elements=FLOATS)


def items(scores):
    return np.tile(np.arange(1, scores.shape[1] + 1), (len(scores), 1))


def order(scores):
    """Each candidate's rank, ties as high as they can be: equal exactly when the orders are."""
    return (scores[:, None, :] > scores[:, :, None]).sum(axis=2)


@given(PAIRS)
def test_the_ends_of_the_scale_are_the_two_systems(scores):
    retriever, ranker = scores
    assert (order(fuse(retriever, ranker, items(ranker), 0)) == order(retriever)).all()
    assert (order(fuse(retriever, ranker, items(ranker), 1)) == order(ranker)).all()


@given(PAIRS, st.floats(0.05, 0.95))
def test_candidates_both_prefer_stay_ahead(scores, weight):
    retriever, ranker = scores.round(-2)  # far enough apart to survive rounding
    fused = fuse(retriever, ranker, items(ranker), weight)
    agreed = (retriever[:, :, None] > retriever[:, None, :]) & (ranker[:, :, None] > ranker[:, None, :])
    assert (fused[:, :, None] > fused[:, None, :])[agreed].all()


def test_standardise_by_hand():
    scores = np.array([[1.0, 3.0, 99.0], [7.0, 7.0, 7.0], [0.1, 0.1, 0.1], [5.0, 9.0, 9.0]])
    candidates = np.array([[1, 2, 0], [1, 2, 3], [1, 2, 3], [1, 0, 0]])
    assert standardise(scores, candidates).tolist() == [[-1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


@given(PAIRS)
def test_standardised_scores_have_mean_0_and_deviation_1_or_0(scores):
    z = standardise(scores[0], items(scores[0]))
    assert np.allclose(z.mean(axis=1), 0, atol=1e-6)
    assert (np.isclose(z.std(axis=1), 1, atol=1e-6) | (z.std(axis=1) == 0)).all()


def test_shift_and_scale_of_a_system_do_not_matter():
    retriever, ranker = np.random.default_rng(0).normal(size=(2, 50, 20))
    fused = fuse(retriever, ranker, items(ranker), 0.3)
    assert np.allclose(fused, fuse(5 * retriever - 3, 0.1 * ranker + 7, items(ranker), 0.3))


def test_padding_changes_nothing():
    retriever, ranker = np.random.default_rng(0).normal(size=(2, 10, 5))
    padded = [np.pad(s, ((0, 0), (0, 3)), constant_values=np.nan) for s in (retriever, ranker)]
    candidates = np.pad(items(ranker), ((0, 0), (0, 3)))
    assert np.allclose(fuse(*padded, candidates, 0.4)[:, :5], fuse(retriever, ranker, items(ranker), 0.4))


def made(skill_retriever, skill_ranker, users=400):
    """Two systems whose scores are noise plus so much for the target."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(2, users, 20))
    candidates, targets = items(noise[0]), random.integers(1, 21, users)
    right = candidates == targets[:, None]
    return noise[0] + skill_retriever * right, noise[1] + skill_ranker * right, candidates, targets


def test_a_useless_ranker_gets_little_and_a_useless_retriever_leaves_all():
    assert choose_weight(*made(2, 0))[0] <= 0.15
    assert choose_weight(*made(0, 2))[0] >= 0.85
    assert 0.25 <= choose_weight(*made(1.5, 1.5))[0] <= 0.75


def test_the_chosen_weight_is_the_best_of_the_curve_and_beats_both_systems():
    retriever, ranker, candidates, targets = made(1, 1)
    weight, curve = choose_weight(retriever, ranker, candidates, targets)
    assert [w for w, _ in curve] == GRID.tolist()
    assert GRID[0] == 0
    assert GRID[-1] == 1
    assert dict(curve)[weight] == max(value for _, value in curve)
    alone = [summary(rank_of_target(s, candidates, targets))["ndcg@10"] for s in (retriever, ranker)]
    assert [curve[0][1], curve[-1][1]] == alone
    assert dict(curve)[weight] > max(alone)


def test_of_equal_weights_the_smallest_is_taken():
    scores = np.random.default_rng(0).normal(size=(30, 20))
    assert choose_weight(scores, scores, items(scores), np.full(30, 4))[0] == 0
    assert choose_weight(scores, np.zeros_like(scores), items(scores), np.full(30, 4))[0] == 0


def test_a_gain_by_rounding_is_no_gain():
    """The ranker shuffles the retriever's ranks among users: the same NDCG@10 but for the order of summation."""
    random = np.random.default_rng(0)
    targets = random.integers(1, 11, 100)
    candidates = np.tile(np.arange(1, 21), (100, 1))
    curves = []
    for _ in range(20):
        shuffled = random.permutation(targets)
        ranker = -((candidates - targets[:, None] + shuffled[:, None] - 1) % 20)  # puts target t at rank `shuffled`
        weight, curve = choose_weight(-candidates, ranker, candidates, targets, grid=np.array([0.0, 1.0]))
        curves.append(curve)
        assert weight == 0
    assert any(alone > retriever for (_, retriever), (_, alone) in curves)  # rounding did favour the ranker


def test_broken_scores_and_no_users_are_errors():
    retriever, ranker, candidates, targets = made(1, 1, users=3)
    ranker[1, 2] = np.nan
    with pytest.raises(ValueError, match="row 1"):
        choose_weight(retriever, ranker, candidates, targets)
    with pytest.raises(UserError, match="valid_users"):
        choose_weight(retriever[:0], ranker[:0], candidates[:0], targets[:0])


def test_fusion_loads_neither_torch_nor_tables():
    code = "import sys, llmrec.rankers.fusion; assert not {'torch', 'polars', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
