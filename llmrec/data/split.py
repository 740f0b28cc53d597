"""Order in time, and which events are training, validation and test: leave-one-out, or two points in time for everybody.

Leave-one-out asks about each user's last event (test) and the one before it (validation). Users end at different times, so
models train on events that come after other users' targets. The temporal split trains on no such future: events before one point in
time are training, those up to another validation, the rest test ("Time to Split", arXiv 2507.16289). Only the filters before it look
ahead: who and what has enough events is counted over all periods.

Most MovieLens users have events with equal timestamps, so the order among those decides what is tested. The rule is a
setting, and the number of users for whom it matters is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from llmrec.config import Split
from llmrec.errors import UserError


@dataclass(frozen=True)
class Periods:
    """Where the periods of a temporal split begin, in the unit of the timestamps; events at that very time are in them.

    Attributes:
        valid_from: training ends before it.
        test_from: validation ends before it.
    """

    valid_from: int
    test_from: int


def in_time_order(interactions: pl.DataFrame, settings: Split, seed: int) -> pl.DataFrame:
    """Sort by user, time and the tie rule.

    Args:
        interactions: `user, item, timestamp, …` in file order. Without timestamps the file order is the order in time.
        settings: `ties` is file_order (RecBole), item_id (by item number; LRURec) or random.
        seed: of the random rule.
    """
    tie = {
        "file_order": pl.int_range(pl.len()),
        "item_id": pl.col("item"),
        "random": pl.lit(pl.Series(np.random.default_rng(seed).permutation(len(interactions)))),
    }[settings.ties if interactions["timestamp"].null_count() == 0 else "file_order"]
    return interactions.with_columns(tie=tie).sort("user", "timestamp", "tie", maintain_order=True).drop("tie")


def leave_one_out(ordered: pl.DataFrame, settings: Split) -> pl.DataFrame:
    """Add the column `split`: train, valid or test.

    Raises:
        UserError: when `minimum_events` would leave a user without training events, or for a target of the temporal split.
    """
    if settings.minimum_events < 3:
        raise UserError(
            f"split.minimum_events is {settings.minimum_events}: a user needs 3 events at least, one each to train, validate and test"
        )
    if settings.target != "last":
        raise UserError(f"split.target is {settings.target}, but leave-one-out asks about one event per user: set split.kind to temporal")
    from_end = pl.int_range(pl.len() - 1, -1, -1).over("user")
    is_judged = pl.len().over("user") >= settings.minimum_events
    label = pl.when(is_judged & (from_end == 0)).then(pl.lit("test")).when(is_judged & (from_end == 1)).then(pl.lit("valid"))
    return ordered.with_columns(split=label.otherwise(pl.lit("train")))


def periods(ordered: pl.DataFrame, settings: Split) -> Periods:
    """The points in time of the temporal split: quantiles of all timestamps, of two neighbours the later.

    Raises:
        UserError: an event without timestamp, quantiles out of order, or too few different timestamps to part three periods.
    """
    if not 0 < settings.valid_quantile < settings.test_quantile < 1:
        raise UserError(
            f"split.valid_quantile is {settings.valid_quantile:g} and split.test_quantile {settings.test_quantile:g}: "
            "they must lie between 0 and 1, validation before test"
        )
    times = ordered["timestamp"]
    if times.null_count():
        raise UserError(
            f"split.kind temporal needs a time for every event, and {times.null_count():,} of {len(times):,} have none: "
            "name the column in source.columns.timestamp, or set split.kind to leave_one_out"
        )
    first, valid_from, test_from = (int(times.quantile(q, "higher") or 0) for q in (0.0, settings.valid_quantile, settings.test_quantile))
    if not first < valid_from < test_from:
        raise UserError(
            f"the timestamps from {first} on leave no time for training, validation and test between the quantiles "
            f"{settings.valid_quantile:g} ({valid_from}) and {settings.test_quantile:g} ({test_from}): move split.valid_quantile or "
            "split.test_quantile"
        )
    return Periods(valid_from, test_from)


def temporal(ordered: pl.DataFrame, settings: Split) -> pl.DataFrame:
    """Add the column `split`: train, valid, test, or past for events that are history of later targets and nothing else.

    Users with events before validation begins, and events in a period, are asked in it: about the last of these, or with target
    successive about all of them. Users without training events are asked nothing.

    Args:
        ordered: the output of `in_time_order`.
        settings: `target` and the quantiles.

    Raises:
        UserError: as `periods`, or when there is nobody to ask in a period.
    """
    bounds = periods(ordered, settings)
    time = pl.col("timestamp")
    period = pl.when(time < bounds.valid_from).then(pl.lit("train")).when(time < bounds.test_from).then(pl.lit("valid"))
    placed = ordered.with_columns(split=period.otherwise(pl.lit("test")))
    is_known = (pl.col("split") == "train").any().over("user")
    is_asked = pl.lit(True) if settings.target == "successive" else pl.col("split").is_last_distinct().over("user")
    asked = placed.with_columns(
        split=pl.when((pl.col("split") == "train") | (is_known & is_asked)).then(pl.col("split")).otherwise(pl.lit("past"))
    )
    for name, quantile in (("valid", settings.valid_quantile), ("test", settings.test_quantile)):
        if name not in asked["split"]:
            raise UserError(
                f"no user has events both in the {name} period, which begins at quantile {quantile:g} of the timestamps, and before "
                "validation begins: move split.valid_quantile or split.test_quantile"
            )
    return asked


def ambiguous_targets(ordered: pl.DataFrame) -> dict[str, int]:
    """Number of users of whom another tie rule could change a test or validation target, or what comes before it.

    A target is ambiguous when one of its two neighbours has the same timestamp. Where it is the last event of its period
    another event could stand there; of successive targets another order changes the histories. Events without timestamps are
    never ambiguous.

    Args:
        ordered: the output of `leave_one_out` or `temporal`.

    Returns:
        Users by kind of target: `{"test": …, "valid": …}`.
    """
    time = pl.col("timestamp")
    tied = ((time == time.shift(1).over("user")) | (time == time.shift(-1).over("user"))).fill_null(False)
    users = ordered.filter(tied & pl.col("split").is_in(["test", "valid"])).group_by("split").agg(pl.col("user").n_unique())
    return {"test": 0, "valid": 0} | dict(users.iter_rows())
