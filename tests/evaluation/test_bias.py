"""A ranker that looks at titles alone has no position bias, one that looks at letters alone has nothing else."""

import numpy as np
import pytest
from scipy.stats import chisquare

from llmrec.evaluation import bias

USERS, ORDERS, POOL = 400, 4, 10


@pytest.fixture(scope="module")
def shown():
    """Ten items for everyone, shown in four random orders; the target is one of them for three users of four."""
    random = np.random.default_rng(0)
    items = np.stack([random.permutation(50)[:POOL] + 1 for _ in range(USERS)]).astype(np.int32)
    order = np.stack([[random.permutation(POOL) for _ in range(ORDERS)] for _ in range(USERS)])
    targets = np.where(np.arange(USERS) % 4 == 0, 99, items[np.arange(USERS), random.integers(0, POOL, USERS)])
    return items, order, targets


def in_candidate_order(of_letters, order):
    """From scores of letters, (users, orders, letters), to scores of candidates: by loops, as a reader would do it."""
    found = np.zeros_like(of_letters)
    for user, orders in enumerate(order):
        for number, places in enumerate(orders):
            for letter, candidate in enumerate(places):
                found[user, number, candidate] = of_letters[user, number, letter]
    return found


def ndcg(scores, items, targets):
    gains = []
    for row, listed, target in zip(scores, items, targets, strict=True):
        ranked = [item for _, item in sorted(zip(-row, listed, strict=True))]
        gains.append(1 / np.log2(ranked.index(target) + 2) if target in ranked[:10] else 0.0)
    return np.mean(gains)


def test_a_ranker_that_looks_at_titles_alone(shown):
    items, order, targets = shown
    liking = np.random.default_rng(1).normal(size=(USERS, POOL))
    found = bias.position_bias(np.repeat(liking[:, None], ORDERS, axis=1), order, items, targets, np.ones(USERS, dtype=bool))
    assert found["same_top"] == 1
    assert found["ndcg@10_per_order"] == pytest.approx([ndcg(liking, items, targets)] * ORDERS)
    assert found["ndcg@10_averaged"] == pytest.approx(ndcg(liking, items, targets))
    assert found["ndcg@10_sd"] == pytest.approx(0)
    assert found["p"] > 0.01  # letters of the shuffled favourite are equally frequent
    counts = list(found["letters"].values())
    assert (found["chi_square"], found["p"]) == pytest.approx(tuple(chisquare(counts)))


def test_a_ranker_that_looks_at_letters_alone(shown):
    items, order, targets = shown
    letters = np.random.default_rng(2).normal(size=POOL)
    by_order = in_candidate_order(np.broadcast_to(letters, order.shape).copy(), order)
    found = bias.position_bias(by_order, order, items, targets, np.ones(USERS, dtype=bool))
    favourite = "ABCDEFGHIJ"[letters.argmax()]
    assert found["letters"] == {letter: USERS * ORDERS * (letter == favourite) for letter in "ABCDEFGHIJ"}
    assert found["p"] < 1e-9
    assert found["same_top"] < 0.05
    for number, value in enumerate(found["ndcg@10_per_order"]):
        assert value == pytest.approx(ndcg(by_order[:, number], items, targets))
    assert "same first choice in all orders for" in bias.sentence(found)
    assert f"{favourite} 100%" in bias.sentence(found)


def test_averaging_brings_back_what_letters_drown(shown):
    """A liking with a preference for letters on top: the mean of the orders ranks better than any of them."""
    items, order, targets = shown
    random = np.random.default_rng(3)
    liking = random.normal(size=(USERS, POOL)) + 2 * (items == targets[:, None])
    letters = in_candidate_order(np.broadcast_to(3 * random.normal(size=POOL), order.shape).copy(), order)
    found = bias.position_bias(liking[:, None] + letters, order, items, targets, np.ones(USERS, dtype=bool))
    assert found["ndcg@10_averaged"] > max(found["ndcg@10_per_order"])


def test_who_was_not_asked_chose_no_letter(shown):
    items, order, targets = shown
    asked = np.arange(USERS) < 100
    liking = np.repeat(np.random.default_rng(1).normal(size=(USERS, 1, POOL)), ORDERS, axis=1)
    found = bias.position_bias(liking, order, items, targets, asked)
    assert found["users"] == 100
    assert sum(found["letters"].values()) == 100 * ORDERS
    assert found["ndcg@10_averaged"] == pytest.approx(ndcg(liking[:, 0], items, targets))  # of all
    with pytest.raises(ValueError, match="nobody was asked"):
        bias.position_bias(liking, order, items, targets, np.zeros(USERS, dtype=bool))


def test_short_pools_offer_their_first_letters_alone(shown):
    """Half of the users have four candidates: A to D are chosen more often, and rightly so."""
    _, order, targets = shown
    items, order = shown[0].copy(), order.copy()
    liking = np.random.default_rng(1).normal(size=(USERS, POOL))
    items[::2, 4:], liking[::2, 4:] = 0, -np.inf
    for user in range(0, USERS, 2):
        order[user] = [[*np.random.default_rng([user, number]).permutation(4), *range(4, POOL)] for number in range(ORDERS)]
    found = bias.position_bias(np.repeat(liking[:, None], ORDERS, axis=1), order, items, targets, np.ones(USERS, dtype=bool))
    assert found["letters"]["A"] > 2 * found["letters"]["J"]
    assert found["p"] > 0.01
    expected = [USERS * ORDERS * (0.5 / 4 + 0.5 / 10)] * 4 + [USERS * ORDERS * 0.5 / 10] * 6
    assert found["chi_square"] == pytest.approx(chisquare(list(found["letters"].values()), expected).statistic)


def test_one_order_has_letters_and_no_spread(shown):
    items, order, targets = shown
    liking = np.random.default_rng(1).normal(size=(USERS, 1, POOL))
    found = bias.position_bias(liking, order[:, :1], items, targets, np.ones(USERS, dtype=bool))
    assert (found["orders"], found["same_top"], found["ndcg@10_sd"]) == (1, None, None)
    assert len(found["ndcg@10_per_order"]) == 1
    assert "--evaluation.orders" in bias.sentence(found)
    own = bias.position_bias(liking, order[:, :1], items, targets, np.ones(USERS, dtype=bool), shuffled=False)
    assert (own["chi_square"], own["p"]) == (None, None)
    assert "chi-square" not in bias.sentence(own)


def test_equal_scores_are_no_preference_for_the_first_letter(shown):
    items, order, targets = shown
    everyone = np.ones(USERS, dtype=bool)
    found = bias.position_bias(np.zeros((USERS, ORDERS, POOL)), order, items, targets, everyone)
    assert list(found["letters"].values()) == pytest.approx([USERS * ORDERS / POOL] * POOL)
    assert (found["p"], found["tied"]) == (pytest.approx(1), 1)
    assert found["same_top"] == pytest.approx(POOL / POOL**ORDERS)  # one of ten, drawn four times
    assert "in 100.0% of answers several share the first place" in bias.sentence(found)


def test_two_letters_that_always_share_the_first_place_are_chosen_half_the_time_each(shown):
    items, order, targets = shown
    best_two = np.isin(np.arange(POOL), [2, 5]).astype(float)
    by_order = in_candidate_order(np.broadcast_to(best_two, order.shape).copy(), order)
    by_order[: USERS // 2] += in_candidate_order(np.broadcast_to(np.arange(POOL) == 5, order.shape).copy(), order)[: USERS // 2]
    found = bias.position_bias(by_order, order, items, targets, np.ones(USERS, dtype=bool))
    assert found["letters"] == {letter: USERS * ORDERS * {"C": 0.25, "F": 0.75}.get(letter, 0) for letter in "ABCDEFGHIJ"}
    assert found["tied"] == 0.5
