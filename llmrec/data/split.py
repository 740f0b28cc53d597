"""Order in time and the leave-one-out split: the last event of a user is the test target, the one before it the validation target.

Most MovieLens users have events with equal timestamps, so the order among those decides what is tested. The rule is a
setting, and the number of users for whom it matters is reported.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec.config import Split
from llmrec.errors import UserError


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
        UserError: when `minimum_events` would leave a user without training events.
    """
    if settings.minimum_events < 3:
        raise UserError(
            f"split.minimum_events is {settings.minimum_events}: a user needs 3 events at least, one each to train, validate and test"
        )
    from_end = pl.int_range(pl.len() - 1, -1, -1).over("user")
    is_judged = pl.len().over("user") >= settings.minimum_events
    label = pl.when(is_judged & (from_end == 0)).then(pl.lit("test")).when(is_judged & (from_end == 1)).then(pl.lit("valid"))
    return ordered.with_columns(split=label.otherwise(pl.lit("train")))


def ambiguous_targets(ordered: pl.DataFrame) -> dict[str, int]:
    """Number of users whose test or validation target another tie rule could change.

    The test target is ambiguous when the event before it has the same timestamp, the validation target when
    one of its two neighbours has. Events without timestamps are never ambiguous.

    Args:
        ordered: the output of `leave_one_out`.

    Returns:
        Users by kind of target: `{"test": …, "valid": …}`.
    """
    tied_before = (pl.col("timestamp") == pl.col("timestamp").shift(1).over("user")).fill_null(False)
    tied_after = (pl.col("timestamp") == pl.col("timestamp").shift(-1).over("user")).fill_null(False)
    tied = ordered.select("split", before=tied_before, after=tied_after)
    return {
        "test": tied.filter((pl.col("split") == "test") & pl.col("before")).height,
        "valid": tied.filter((pl.col("split") == "valid") & (pl.col("before") | pl.col("after"))).height,
    }
