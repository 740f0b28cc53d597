import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.calibration import calibration, probabilities


def drawn(users, sharpness, seed=0, candidates=20):
    """Probabilities, and targets drawn by them: a ranker that is right about itself."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(candidates, sharpness), users)
    items = np.tile(np.arange(1, candidates + 1), (users, 1))
    targets = (p.cumsum(axis=1) > random.random((users, 1))).argmax(axis=1) + 1
    return p, items, targets


def test_by_hand():
    p = np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.6, 0.4, 0.0]])
    items = np.array([[4, 5, 6], [7, 8, 0], [4, 5, 0]])
    found = calibration(p, items, np.array([5, 7, 4]), bins=2)
    assert (found["users"], found["accuracy"]) == (3, pytest.approx(2 / 3))
    assert found["confidence"] == pytest.approx(2 / 3)
    # by confidence: .5 (wrong) and .6 (right), then .9 (right)
    assert found["bins"] == [
        {"users": 2, "confidence": pytest.approx(0.55), "accuracy": 0.5},
        {"users": 1, "confidence": pytest.approx(0.9), "accuracy": 1.0},
    ]
    assert found["ece"] == pytest.approx((2 * 0.05 + 1 * 0.1) / 3)
    squares = [0.25 + 0.49 + 0.04, 0.01 + 0.01, 0.16 + 0.16]
    assert found["brier"] == pytest.approx(sum(squares) / 3)
    assert found["brier_uniform"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_a_ranker_that_knows_itself_has_no_calibration_error():
    p, items, targets = drawn(100_000, 0.3)
    found = calibration(p, items, targets)
    assert found["ece"] < 0.01
    assert found["brier"] < found["brier_uniform"]
    assert all(abs(b["accuracy"] - b["confidence"]) < 0.02 for b in found["bins"])


def test_overconfidence_shows_in_every_measure():
    p, items, targets = drawn(20_000, 0.3)
    sharper = p**3 / (p**3).sum(axis=1, keepdims=True)
    honest, boasting = calibration(p, items, targets), calibration(sharper, items, targets)
    assert boasting["ece"] > 0.1 > 0.03 > honest["ece"]
    assert boasting["brier"] > honest["brier"]
    assert boasting["accuracy"] == honest["accuracy"]
    assert all(b["confidence"] > b["accuracy"] for b in boasting["bins"][1:-1])


def test_equal_probabilities_are_right_as_often_as_chance():
    _, items, targets = drawn(50, 1.0)
    found = calibration(np.full((50, 20), 0.05), items, targets)
    assert found["accuracy"] == pytest.approx(0.05)
    assert found["ece"] == pytest.approx(0)
    assert found["brier"] == pytest.approx(found["brier_uniform"]) == pytest.approx(0.95)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_bins_share_out_all_users_evenly_and_rise(users, bins, seed):
    found = calibration(*drawn(users, 0.5, seed), bins=bins)
    sizes = [b["users"] for b in found["bins"]]
    assert sum(sizes) == users
    assert len(sizes) == min(bins, users)
    assert max(sizes) - min(sizes) <= 1
    confidence = [b["confidence"] for b in found["bins"]]
    assert confidence == sorted(confidence)
    assert sum(b["users"] * b["accuracy"] for b in found["bins"]) == pytest.approx(users * found["accuracy"])
    assert 0 <= found["ece"] <= 1
    assert 0 <= found["brier"] <= 2


def test_probabilities_are_those_of_the_candidates_alone():
    logprobs = np.array([[-50.0, -50.0 + np.log(3), -np.inf], [-1.0, -1.0, -1.0]])
    p = probabilities(logprobs, np.array([[4, 5, 0], [4, 5, 6]]))
    assert p == pytest.approx(np.array([[0.25, 0.75, 0], [1 / 3] * 3]))


@pytest.mark.parametrize(
    ("p", "target", "message"),
    [
        ([[0.5, 0.5]], [9], "target among"),
        ([[0.5, 0.6]], [4], "sum to 1"),
        ([[1.5, -0.5]], [4], "sum to 1"),
        (np.zeros((0, 2)), [], "users"),
    ],
)
def test_refuses_what_is_no_question(p, target, message):
    items = np.tile([4, 5], (len(p), 1))
    with pytest.raises(ValueError, match=message):
        calibration(np.array(p), items, np.array(target))
