"""Filters drop what they say, and count it."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.config import Filter
from llmrec.data.filters import apply_filters, k_core, with_titles, without_duplicates
from llmrec.errors import UserError


def k_core_by_hand(pairs: list[tuple[str, str]], core: int) -> list[tuple[str, str]]:
    """One event too few anywhere and it goes, until nothing goes."""
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        poor = [pair for pair in pairs if users[pair[0]] < core or items[pair[1]] < core]
        if not poor:
            return pairs
        pairs = [pair for pair in pairs if pair != poor[0]]


def pairs_of(table: pl.DataFrame) -> list[tuple[str, str]]:
    return list(table.select("raw_user", "raw_item").iter_rows())


def test_the_core_is_iterative(events):
    # A chain: without item z, user 4 is poor; without user 4, item y; without item y, user 3. Users 5, 6 fall with z.
    square = [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]
    chain = [("3", "a"), ("3", "y"), ("4", "y"), ("4", "z"), ("5", "q"), ("6", "r")]
    table = events([(user, item, 0) for user, item in square + chain])
    one_pass = table.filter((pl.len().over("raw_user") >= 2) & (pl.len().over("raw_item") >= 2))
    assert set(pairs_of(one_pass)) > set(square)
    assert pairs_of(k_core(table, 2)) == square


@given(st.lists(st.tuples(st.sampled_from("123456"), st.sampled_from("abcde")), min_size=1, max_size=30, unique=True), st.integers(0, 4))
def test_the_core_is_that_of_the_definition(pairs, core):
    table = pl.DataFrame({"raw_user": [u for u, _ in pairs], "raw_item": [i for _, i in pairs]})
    assert pairs_of(k_core(table, core)) == k_core_by_hand(pairs, core)


@pytest.mark.parametrize(("keep", "expected"), [("first", [2, 3]), ("last", [0, 3]), ("keep", [0, 1, 2, 3])])
def test_of_duplicates_the_first_or_last_in_time_stays(events, keep, expected):
    table = events([("1", "a", 9), ("1", "a", 5), ("1", "a", 3), ("1", "b", 4)], place=pl.int_range(pl.len()))
    assert without_duplicates(table, keep)["place"].to_list() == expected


def test_among_equal_times_the_file_decides(events):
    table = events([("1", "a", 5), ("1", "a", 5)], place=pl.int_range(pl.len()))
    assert without_duplicates(table, "first")["place"].to_list() == [0]
    assert without_duplicates(table, "last")["place"].to_list() == [1]
    untimed = table.with_columns(timestamp=pl.lit(None, dtype=pl.Int64))
    assert without_duplicates(untimed, "last")["place"].to_list() == [1]


def test_untitled_items_are_named_or_dropped(events):
    table = events([("1", "a", 1), ("1", "b", 2), ("1", "c", 3)])
    titled = pl.Series(["a"])
    with pytest.raises(UserError, match="2 items with interactions have no title, the first is 'b'"):
        with_titles(table, titled, "error")
    assert pairs_of(with_titles(table, titled, "drop")) == [("1", "a")]


def test_every_reason_is_counted(events):
    table = events([("1", "a", 1), ("1", "a", 2), ("1", "b", 3), ("1", "x", 4), ("2", "a", 5), ("3", "c", 6)])
    rated = table.with_columns(rating=pl.Series([5.0, 5.0, 1.0, 5.0, 5.0, 5.0], dtype=pl.Float32))
    kept, dropped = apply_filters(rated, pl.Series(["a", "b", "c"]), Filter(untitled="drop", minimum_rating=2, core=1))
    assert dropped == {"untitled": 1, "duplicates": 1, "low_rating": 1, "core": 0}
    assert pairs_of(kept) == [("1", "a"), ("2", "a"), ("3", "c")]
    with pytest.raises(UserError, match=r"no interaction is left of 6 \(dropped: untitled 1, duplicates 1, low_rating 0, core 4\)"):
        apply_filters(rated, pl.Series(["a", "b", "c"]), Filter(untitled="drop", core=5))


def test_a_minimum_rating_needs_ratings(events):
    with pytest.raises(UserError, match="no ratings"):
        apply_filters(events([("1", "a", 1)]), pl.Series(["a"]), Filter(minimum_rating=3, core=0))
