"""Targets that another order of equal timestamps would change, and how far that can move the metrics.

Of events that share a timestamp nobody knows which came first, and a target that shares its timestamp could have been any item of
that group. The tie rule of `prepare` picks one order; here every possible target is asked for, and each case takes its worst and its
best, independently of the others: the lowest and the highest mean over which of the tied events is the target.

For another target the events are exchanged, nothing else: the actual target takes its place in the history (`exchanged_history`).
The order of the other tied events, and the model, which was trained in the given order, stay as they are: a model that reads the order
could move further with them, so these are no bounds over all orders. A model asked with the history as it was would find the possible
target in it, as something the user has had: ranks of another question.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import polars as pl

from llmrec.data.sequences import Sequences
from llmrec.evaluation.metrics import summary


class Ambiguity(TypedDict):
    """What goes into metrics.json as "ambiguity", by split."""

    users: int
    """With at least one ambiguous target."""
    low: dict[str, float]
    """Metric -> mean over all evaluated users, each with the tied event as target that is worst for it."""
    high: dict[str, float]
    """Each with the one that is best for it."""


def ambiguous_cases(interactions: pl.DataFrame, split: str) -> pl.DataFrame:
    """The possible targets of every case whose target depends on the order of equal timestamps.

    Args:
        interactions: `user, item, timestamp, split`, sorted by user and time, as `prepare` writes it.
        split: "valid" or "test".

    Returns:
        `user, end:int64, target, possible, position:int64`, one row per case and possible target, the actual one among them; users
        and items have the types of `interactions`. `end` is the row of the case's target, as in `Sequences.cases`, and `position`
        the row of the possible one. Cases whose target is certain have no rows; events without timestamps are certain.
    """
    events = interactions.select("user", "timestamp", "split", possible="item", position=pl.int_range(pl.len(), dtype=pl.Int64))
    judged = events.filter((pl.col("split") == split) & pl.col("timestamp").is_not_null())
    tied = judged.select("user", "timestamp", end="position", target="possible").join(events, on=["user", "timestamp"])
    own_first = tied.sort("end", pl.col("position") != pl.col("end"), "position")
    distinct = own_first.unique(["end", "possible"], keep="first", maintain_order=True)
    return distinct.filter(pl.len().over("end") > 1).select("user", "end", "target", "possible", "position")


def exchanged_history(sequences: Sequences, user: int, end: int, position: int) -> np.ndarray:
    """The history before `end` had the event at `position` come last: it and the actual target have changed places.

    Args:
        sequences: all users' events.
        user: whose.
        end: row of the actual target.
        position: row of the possible one. Later than `end`, it was not in the history, which then stays as it is.

    Returns:
        Items, oldest first, (events before `end`,) int32.
    """
    history = sequences.history(user, end)
    if position >= end:
        return history
    history = history.copy()
    history[position - sequences.offsets[user]] = sequences.items[end]
    return history


def rank_range(ends: np.ndarray, ranks: np.ndarray, possible: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank of each case over its possible targets.

    Args:
        ends: row of each case's target, (cases,), each once.
        ranks: rank of each case's actual target, (cases,); 0 where it is not among the candidates.
        possible: `end, rank` of possible targets, ranks likewise; cases that are not asked about are passed over.

    Returns:
        Two (cases,) int32; 0 only where the worst, or even the best, is not among the candidates.
    """
    far = np.iinfo(np.int32).max  # a target that is not there is worse than any that is
    place = pl.when(pl.col("rank") == 0).then(far).otherwise(pl.col("rank"))
    cases = pl.DataFrame({"end": ends, "rank": ranks}, schema={"end": pl.Int64, "rank": pl.Int32})
    others = possible.select(pl.col("end").cast(pl.Int64), pl.col("rank").cast(pl.Int32))
    ranges = pl.concat([cases, others]).group_by("end").agg(best=place.min(), worst=place.max())
    found = cases.join(ranges, on="end", maintain_order="left")
    best, worst = (found[name].to_numpy() for name in ("best", "worst"))
    return np.where(best == far, 0, best).astype(np.int32), np.where(worst == far, 0, worst).astype(np.int32)


def bounds(users: np.ndarray, ends: np.ndarray, ranks: np.ndarray, possible: pl.DataFrame) -> Ambiguity:
    """How low and how high each metric's mean can be, over which of the tied events is each case's target.

    Args:
        users: whose each case is, (cases,); with several cases a user counts as their mean.
        ends: row of each case's target, (cases,), each once.
        ranks: rank of each case's actual target, (cases,); 0 where it is not among the candidates.
        possible: `ambiguous_cases` with the column `rank` added: of each possible target after `exchanged_history`.
    """
    best, worst = rank_range(ends, ranks, possible)
    unsure = users[np.isin(ends, possible["end"].to_numpy())]
    return Ambiguity(users=len(np.unique(unsure)), low=summary(worst, users=users), high=summary(best, users=users))
