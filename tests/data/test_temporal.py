"""The temporal split: two points in time, who is asked what, and that nothing trained on comes after anything asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmrec.config import Filter, Source, Split
from llmrec.data.prepare import prepare_tables
from llmrec.data.sequences import PAST, Sequences
from llmrec.data.split import Periods, ambiguous_targets, in_time_order, leave_one_out, periods, temporal
from llmrec.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEMA = {"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64}


def table(triples) -> pl.DataFrame:
    return in_time_order(pl.DataFrame(triples, schema=SCHEMA, orient="row"), Split(), 0)


def labels(frame: pl.DataFrame) -> dict[int, list[str]]:
    return {user: mine["split"].to_list() for (user,), mine in frame.group_by("user", maintain_order=True)}


# 20 events. Quantile .65 is place 12.35 from 0 in order of time: the later neighbour came at 16; .82 is place 15.58: 18.
BOUNDS = {"valid_quantile": 0.65, "test_quantile": 0.82}
FIVE_USERS = table(
    [(0, item, time) for item, time in enumerate([0, 1, 16, 17, 18, 19], 1)]  # in all three periods
    + [(1, item, time) for item, time in enumerate([2, 3, 4, 5], 1)]  # in training alone
    + [(2, item, time) for item, time in enumerate([6, 7, 8, 17], 1)]  # not in test
    + [(3, 1, 16), (3, 2, 19)]  # never in training
    + [(4, item, time) for item, time in enumerate([9, 10, 11, 19], 1)]  # not in validation
)


def test_five_users_asked_about_their_last_event_of_a_period():
    assert periods(FIVE_USERS, Split(**BOUNDS)) == Periods(16, 18)
    assert labels(temporal(FIVE_USERS, Split(**BOUNDS))) == {
        0: ["train", "train", "past", "valid", "past", "test"],
        1: ["train"] * 4,
        2: ["train", "train", "train", "valid"],
        3: ["past", "past"],
        4: ["train", "train", "train", "test"],
    }


def test_five_users_asked_about_every_event_of_a_period():
    assert labels(temporal(FIVE_USERS, Split(target="successive", **BOUNDS))) == {
        0: ["train", "train", "valid", "valid", "test", "test"],
        1: ["train"] * 4,
        2: ["train", "train", "train", "valid"],
        3: ["past", "past"],
        4: ["train", "train", "train", "test"],
    }


random_tables = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 30)), min_size=3, max_size=60)


# many tables leave a period empty
@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much])
@given(random_tables, st.sampled_from(["last", "successive"]), st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)).map(sorted))
def test_periods_do_not_mix_and_the_right_users_are_asked(triples, target, quantiles):
    """Against a plain reading of the definition, user by user."""
    events = table(triples)
    how = Split(target=target, valid_quantile=quantiles[0], test_quantile=quantiles[1])
    try:
        found = temporal(events, how)
    except UserError:
        assume(False)
    times = sorted(time for _, _, time in triples)
    valid_from, test_from = (times[int(np.ceil(q * (len(times) - 1) - 1e-9))] for q in quantiles)
    assert periods(events, how) == Periods(valid_from, test_from)

    time_of = {name: found.filter(pl.col("split") == name)["timestamp"] for name in ("train", "valid", "test")}
    assert time_of["train"].max() < valid_from <= time_of["valid"].min()
    assert time_of["valid"].max() < test_from <= time_of["test"].min()

    assert found.drop("split").equals(events)
    for user, split in labels(found).items():
        own = events.filter(pl.col("user") == user)["timestamp"].to_list()
        known = own[0] < valid_from
        expected = []
        for at, time in enumerate(own):
            name = "train" if time < valid_from else "valid" if time < test_from else "test"
            last = at + 1 == len(own) or (own[at + 1] >= test_from) != (time >= test_from)
            expected.append(name if name == "train" or (known and (last or target == "successive")) else "past")
        assert split == expected


# many tables leave a period empty
@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much])
@given(random_tables)
def test_what_is_trained_on_does_not_depend_on_what_comes_later(triples):
    """Other items after training ends: the same training part."""
    try:
        found = temporal(table(triples), Split())
    except UserError:
        assume(False)
    bounds = periods(table(triples), Split())
    other = temporal(table([(u, i if t < bounds.valid_from else i % 9 + 1, t) for u, i, t in triples]), Split())
    assert found.filter(pl.col("split") == "train").equals(other.filter(pl.col("split") == "train"))


@pytest.mark.parametrize(
    ("triples", "how", "message"),
    [
        ([(0, 1, 1), (0, 2, None), (0, 3, 3)], Split(), "1 of 3 have none: name the column in source.columns.timestamp"),
        ([(0, item, item) for item in range(1, 20)], Split(valid_quantile=0.9, test_quantile=0.8), "validation before test"),
        ([(0, item, item) for item in range(1, 20)], Split(test_quantile=1.0), "between 0 and 1"),
        ([(0, item, 7) for item in range(1, 20)], Split(), "leave no time"),
        ([(0, item, item) for item in range(1, 9)] + [(1, 1, 9), (1, 2, 10)], Split(), "no user has events both in the valid period"),
        ([(0, item, item) for item in range(1, 18)] + [(1, 1, 19), (1, 2, 20)], Split(), "no user has events both in the test period"),
    ],
)
def test_data_that_cannot_be_split_in_time(triples, how, message):
    with pytest.raises(UserError, match=message):
        temporal(table(triples), how)


def test_leave_one_out_has_one_target():
    with pytest.raises(UserError, match=r"set split\.kind to temporal"):
        leave_one_out(FIVE_USERS, Split(target="successive"))


def test_users_whose_targets_hang_on_a_tie():
    events = table([(0, item, item) for item in range(1, 17)] + [(0, 17, 17), (0, 18, 17), (0, 19, 19), (0, 20, 19)])
    assert periods(events, Split()) == Periods(17, 19)
    assert ambiguous_targets(temporal(events, Split())) == {"valid": 1, "test": 1}
    assert ambiguous_targets(temporal(events, Split(target="successive"))) == {"valid": 1, "test": 1}  # users, not cases
    assert ambiguous_targets(temporal(FIVE_USERS, Split(**BOUNDS))) == {"valid": 0, "test": 0}


def test_cases_have_all_that_came_before_as_history():
    frame = temporal(FIVE_USERS, Split(target="successive", **BOUNDS)).with_columns(rating=pl.lit(None, dtype=pl.Float32))
    sequences = Sequences.from_table(frame, item_count=6, user_count=5)
    cases = sequences.cases("test")
    assert cases.users.tolist() == [0, 0, 4]
    assert cases.targets.tolist() == [5, 6, 4]
    histories = [sequences.history(user, end).tolist() for user, end in zip(cases.users, cases.ends, strict=True)]
    assert histories == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3]]


def test_events_that_are_history_alone_are_not_trained_on():
    frame = temporal(FIVE_USERS, Split(**BOUNDS)).with_columns(rating=pl.lit(None, dtype=pl.Float32))
    sequences = Sequences.from_table(frame, item_count=6, user_count=5)
    assert (sequences.split == PAST).sum() == 4
    train = sequences.train_only()
    assert np.diff(train.offsets).tolist() == [2, 4, 3, 0, 3] == (sequences.train_ends() - sequences.offsets[:-1]).tolist()
    assert sequences.cases("valid").ends.tolist() == [3, 13]  # users 0 and 2


def test_statistics_say_where_the_periods_begin_and_what_became_of_the_events():
    how = Split(kind="temporal", valid_quantile=0.45, test_quantile=0.54)
    prepared = prepare_tables(Source(format="ml-1m"), Filter(core=0), how, FIXTURES / "ml-1m")
    facts, events = prepared.statistics, prepared.interactions
    bounds = periods(events, how)
    assert facts["periods"]["valid_from"] == bounds.valid_from
    seconds = np.datetime64(bounds.test_from, "ms").astype("datetime64[s]")
    assert facts["periods"]["test_from_date"] == f"{seconds}+00:00"
    assert facts["events"] == {name: events.filter(pl.col("split") == name).height for name in ("train", "valid", "test", "past")}
    assert sum(facts["events"].values()) == facts["interactions"]
    trained = set(events.filter(pl.col("split") == "train")["item"])
    asked = events.filter(pl.col("split") == "test")
    new = sum(item not in trained for item in asked["item"])
    assert facts["targets"]["test"] == {"users": 1, "targets": 1, "of_new_items": new}
    assert facts["evaluated_users"] == len(asked) == 1  # user 1: the others are seen before validation alone, or never there
    assert "periods" not in prepare_tables(Source(format="ml-1m"), Filter(core=0), Split(minimum_events=3), FIXTURES / "ml-1m").statistics
