"""Histories in other orders: what changes places and what does not, and what the table makes of the ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation import drawing, order, order_plots


@given(st.lists(st.integers(1, 99), max_size=12), st.integers(1, 8), st.sampled_from(order.VARIANTS), st.integers(0, 9))
def test_the_same_events_in_the_window_and_the_older_ones_untouched(history, window, how, seed):
    found = order.rearranged(np.array(history, dtype=np.int32), how, window, np.random.default_rng(seed)).tolist()
    older = max(0, len(history) - window)
    assert found[:older] == history[:older]
    assert sorted(found[older:]) == sorted(history[older:])
    if how == "reversed":
        assert found[older:] == history[older:][::-1]
    if how == "last kept":
        assert found[-1:] == history[-1:]


def test_as_it_is_stays_and_shuffles_differ():
    history = np.arange(1, 30)
    random = np.random.default_rng(0)
    assert (order.rearranged(history, order.AS_IT_IS, 20, random) == history).all()
    one, other = (order.rearranged(history, "shuffled", 20, random) for _ in range(2))
    assert (one != other).any()
    assert (one[:9] == history[:9]).all()


def ranks(shuffled=(20, 20)):
    """Two users, the second with two cases; the first loses his place when shuffled."""
    return {
        order.AS_IT_IS: [np.array([1, 2, 20])],
        "shuffled": [np.array([shuffled[0], 2, 20]), np.array([shuffled[1], 2, 20])],
        "last kept": [np.array([1, 2, 20]), np.array([3, 2, 20])],
        "reversed": [np.array([20, 20, 20])],
    }


def test_every_user_and_every_order_counts_alike():
    found = order.table(ranks(shuffled=(3, 20)), np.array([4, 7, 7]), resamples=100)
    second = (1 / np.log2(3) + 0) / 2
    assert found["users"] == 2
    assert found["variants"][order.AS_IT_IS]["ndcg@10"] == pytest.approx((1 + second) / 2)
    assert found["variants"]["shuffled"]["ndcg@10"] == pytest.approx(((0.5 + 0) / 2 + second) / 2)
    assert found["per_order"]["shuffled"] == pytest.approx([(0.5 + second) / 2, second / 2])
    differences = {(c["a"], c["metric"]): c["difference"] for c in found["comparisons"]}
    assert differences["shuffled", "hr@10"] == pytest.approx(((1 + 0) / 2 - 1) / 2)
    assert differences["reversed", "hr@10"] == pytest.approx(-(1 + 0.5) / 2)


def many(shuffled, kept):
    """A hundred users with these ranks instead of their first places."""
    places = {order.AS_IT_IS: 1, "shuffled": shuffled, "last kept": kept, "reversed": shuffled}
    return order.table({name: [np.full(100, place)] for name, place in places.items()}, np.arange(100), resamples=200)


@pytest.mark.parametrize(("shuffled", "kept", "words"), [(3, 1, "100% of that comes back"), (1, 1, "Not shown"), (3, 3, "0% of that")])
def test_the_verdict_says_what_the_test_says(shuffled, kept, words):
    assert words in order.verdict(many(shuffled, kept))
    text = order.render(many(shuffled, kept))
    assert all(name in text for name in (order.AS_IT_IS, *order.VARIANTS))


def test_the_verdict_goes_by_the_corrected_test_not_by_the_interval():
    found = many(3, 1)
    for comparison in found["comparisons"]:
        comparison["p_holm"] = 0.07
    assert "Not shown" in order.verdict(found)
    assert "p 0.070 (Holm)" in order.verdict(found)


def test_shuffled_histories_can_be_the_better_ones():
    found = order.table({name: [np.full(50, place)] for name, place in (("as it is", 3), ("shuffled", 1), ("last kept", 1))}, np.arange(50))
    assert "Order misleads" in order.verdict(found)


def test_the_picture_has_a_bar_for_every_order(tmp_path):
    drawing.png(tmp_path / "order.png", order_plots.orders(many(3, 1)))
    assert (tmp_path / "order.png").stat().st_size > 5_000
    text = drawing.svg(order_plots.orders(many(3, 1))[0], "order")
    assert all(name in text for name in (order.AS_IT_IS, *order.VARIANTS))
