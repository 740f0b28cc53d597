"""Order, leave-one-out, and how many targets hang on a tie."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.config import Split
from llmrec.data.split import ambiguous_targets, in_time_order, leave_one_out
from llmrec.errors import UserError


def table(triples) -> pl.DataFrame:
    user, item, timestamp = zip(*triples, strict=True)
    return pl.DataFrame(
        {"user": user, "item": item, "timestamp": timestamp}, schema={"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64}
    )


def items(frame: pl.DataFrame) -> list[int]:
    return frame["item"].to_list()


def test_ties_follow_the_rule():
    rows = table([(1, 7, 5), (0, 9, 2), (0, 4, 2), (0, 6, 2), (0, 8, 1)])
    assert items(in_time_order(rows, Split(ties="file_order"), 0)) == [8, 9, 4, 6, 7]
    assert items(in_time_order(rows, Split(ties="item_id"), 0)) == [8, 4, 6, 9, 7]
    orders = {tuple(items(in_time_order(rows, Split(ties="random"), seed))) for seed in range(40)}
    assert len(orders) == 6  # all orders of the three tied events
    assert items(in_time_order(rows, Split(ties="random"), 3)) == items(in_time_order(rows, Split(ties="random"), 3))


@pytest.mark.parametrize("ties", ["file_order", "item_id", "random"])
def test_without_times_the_file_is_the_order(ties):
    rows = table([(0, 9, None), (0, 4, None), (0, 6, None)])
    assert items(in_time_order(rows, Split(ties=ties), 0)) == [9, 4, 6]


def test_last_is_test_and_the_one_before_is_valid():
    rows = table([(0, item, item) for item in range(1, 6)] + [(1, item, item) for item in range(1, 5)])
    split = leave_one_out(rows, Split(minimum_events=5))["split"].to_list()
    assert split == ["train"] * 3 + ["valid", "test"] + ["train"] * 4


def test_a_user_needs_three_events():
    with pytest.raises(UserError, match="3 events"):
        leave_one_out(table([(0, 1, 1)]), Split(minimum_events=2))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=25))
def test_ambiguous_targets_are_those_that_some_rule_changes(triples):
    """A target is ambiguous exactly when ordering the ties backwards, or by chance, can move another event there."""
    rows = table(triples).with_columns(item=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))  # distinct events
    how = Split(minimum_events=3)
    ordered = leave_one_out(in_time_order(rows, how, 0), how)
    expected = {}
    for kind, place in (("test", -1), ("valid", -2)):
        expected[kind] = 0
        for (_,), mine in ordered.group_by("user"):
            times = mine["timestamp"].to_list()
            if len(times) >= 3:
                expected[kind] += times.count(times[place]) > 1
    assert ambiguous_targets(ordered) == expected


def test_missing_times_are_not_ambiguous():
    rows = leave_one_out(table([(0, item, None) for item in range(1, 6)]), Split())
    assert ambiguous_targets(rows) == {"test": 0, "valid": 0}
