"""Orders of equal timestamps: against all orders, one by one."""

from itertools import pairwise, permutations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.config import Split
from llmrec.data.sequences import Sequences
from llmrec.data.split import ambiguous_targets, leave_one_out
from llmrec.evaluation.ambiguity import ambiguous_cases, bounds, exchanged_history, rank_range
from llmrec.evaluation.metrics import per_user, summary

SPLIT = Split(minimum_events=3)


def table(*users):
    """Interactions of users given as lists of (item, time)."""
    rows = [(user, item, time) for user, events in enumerate(users) for item, time in events]
    schema = {"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64}
    return leave_one_out(pl.DataFrame(rows, schema=schema, orient="row"), SPLIT).with_columns(rating=pl.lit(None, pl.Float32))


SURE = [(1, 10), (2, 20), (3, 30), (4, 40)]
TIED = [(5, 10), (1, 20), (2, 30), (3, 30), (4, 30)]  # the last three share a second
VALID_TIED = [(5, 10), (1, 20), (2, 20), (3, 30)]


@st.composite
def histories(draw):
    """Users with rising times, many of them equal."""
    users = []
    for _ in range(draw(st.integers(1, 3))):
        items = draw(st.lists(st.integers(1, 9), min_size=3, max_size=5, unique=True))
        times = sorted(draw(st.lists(st.integers(1, 3), min_size=len(items), max_size=len(items))))
        users.append(list(zip(items, times, strict=True)))
    return users


def test_by_hand():
    found = ambiguous_cases(table(SURE, TIED, VALID_TIED), "test")
    assert found.columns == ["user", "end", "target", "possible", "position"]
    assert found.rows() == [(1, 8, 4, 4, 8), (1, 8, 4, 2, 6), (1, 8, 4, 3, 7)]
    valid = ambiguous_cases(table(SURE, TIED, VALID_TIED), "valid")
    assert valid.filter(pl.col("user") == 1)["possible"].to_list() == [3, 2, 4]  # the test item, too, may have come before
    assert valid.filter(pl.col("user") == 2).rows() == [(2, 11, 2, 2, 11), (2, 11, 2, 1, 10)]


def test_without_timestamps_nothing_is_ambiguous():
    assert ambiguous_cases(table(TIED).with_columns(timestamp=pl.lit(None, pl.Int64)), "test").is_empty()


def test_an_item_taken_twice_in_a_second_is_the_same_target():
    assert ambiguous_cases(table([(1, 10), (2, 20), (3, 30), (3, 30)]), "test").is_empty()


@settings(max_examples=25)
@given(histories())
def test_possible_targets_are_those_of_all_orders(users):
    """Every order of events that keeps the times rising, tried."""
    interactions = table(*users)
    for split, at in (("test", -1), ("valid", -2)):
        found = ambiguous_cases(interactions, split)
        for user, events in enumerate(users):
            orders = (order for order in permutations(events) if all(a[1] <= b[1] for a, b in pairwise(order)))
            targets = {order[at][0] for order in orders}
            listed = found.filter(pl.col("user") == user)["possible"].to_list()
            assert sorted(listed) == (sorted(targets) if len(targets) > 1 else [])
            assert not listed or listed[0] == events[at][0]
        assert found["user"].n_unique() == ambiguous_targets(interactions)[split]


@settings(max_examples=25)
@given(histories())
def test_the_exchanged_history_and_its_target_are_the_same_events(users):
    interactions = table(*users)
    sequences = Sequences.from_table(interactions, 9, len(users))
    for user, end, target, possible, position in ambiguous_cases(interactions, "test").rows():
        before = sequences.history(user, end)
        history = exchanged_history(sequences, user, end, position)
        assert sorted([*history, possible]) == sorted([*before, target])
        assert sequences.items[position] == possible
        assert (history != before).sum() == (possible != target)


def test_a_possible_target_after_the_actual_one_leaves_the_history():
    interactions = table(TIED)
    sequences = Sequences.from_table(interactions, 9, 1)
    assert exchanged_history(sequences, 0, 3, 4).tolist() == [5, 1, 2]
    assert exchanged_history(sequences, 0, 4, 2).tolist() == [5, 1, 4, 3]
    assert sequences.items.tolist() == [5, 1, 2, 3, 4]


def test_bounds_by_hand():
    possible = pl.DataFrame({"end": [8, 8, 8, 12, 12], "rank": [3, 1, 20, 0, 2]})
    users, ends, ranks = np.array([0, 1, 2, 3]), np.array([3, 8, 12, 20]), np.array([1, 3, 2, 0])
    best, worst = rank_range(ends, ranks, possible)
    assert (best.tolist(), worst.tolist()) == ([1, 1, 2, 0], [1, 20, 0, 0])
    found = bounds(users, ends, ranks, possible)
    assert found["users"] == 2
    assert found["low"] == summary(np.array([1, 20, 0, 0]))
    assert found["high"] == summary(np.array([1, 1, 2, 0]))


def test_a_user_with_several_cases_counts_as_their_mean():
    possible = pl.DataFrame({"end": [3, 3], "rank": [1, 9]})
    found = bounds(np.array([0, 0, 1]), np.array([3, 4, 9]), np.array([1, 1, 1]), possible)
    assert found["users"] == 1
    assert found["low"]["hr@5"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["high"]["hr@5"] == 1


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(0, 999))
def test_no_order_leaves_the_bounds_and_some_reach_them(cases, seed):
    random = np.random.default_rng(seed)
    ranks = random.integers(0, 12, cases)
    choices = [[int(rank), *random.integers(0, 12, random.integers(0, 3)).tolist()] for rank in ranks]
    rows = [(end, rank) for end, of_case in enumerate(choices) if len(of_case) > 1 for rank in of_case]
    possible = pl.DataFrame(rows, schema={"end": pl.Int64, "rank": pl.Int32}, orient="row")
    found = bounds(np.arange(cases), np.arange(cases), ranks, possible)
    means = {name: [] for name in per_user(ranks)}
    for order in np.stack(np.meshgrid(*choices, indexing="ij"), axis=-1).reshape(-1, cases):
        for name, value in summary(order).items():
            means[name].append(value)
    for name, values in means.items():
        assert found["low"][name] == pytest.approx(min(values))
        assert found["high"][name] == pytest.approx(max(values))
