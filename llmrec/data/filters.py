"""Which interactions stay: every filter is a function from table to table, and `apply_filters` counts what each one drops."""

from __future__ import annotations

from typing import Literal

import polars as pl

from llmrec.config import Filter
from llmrec.errors import UserError


def apply_filters(interactions: pl.DataFrame, titled: pl.Series, settings: Filter) -> tuple[pl.DataFrame, dict[str, int]]:
    """Drop untitled items, duplicates, low ratings and what is outside the core, in this order.

    Args:
        interactions: `raw_user, raw_item, rating, timestamp, …` in file order.
        titled: ids of the items that have a title.
        settings: see `Filter`.

    Returns:
        The rest, in file order, and the number of interactions dropped for each reason.

    Raises:
        UserError: an item without title under `untitled: error`, ratings asked for that are not there, nothing left.
    """
    dropped = {}
    before = interactions
    table = with_titles(before, titled, settings.untitled)
    dropped["untitled"] = len(before) - len(table)

    before = table
    table = without_duplicates(before, settings.duplicates)
    dropped["duplicates"] = len(before) - len(table)

    before = table
    if settings.minimum_rating is not None:
        if before["rating"].is_null().all():
            raise UserError(f"filter.minimum_rating is {settings.minimum_rating}, but the data has no ratings: set it to null")
        table = before.filter(pl.col("rating") >= settings.minimum_rating)
    dropped["low_rating"] = len(before) - len(table)

    before = table
    table = k_core(before, settings.core)
    dropped["core"] = len(before) - len(table)
    if table.is_empty():
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        raise UserError(
            f"no interaction is left of {len(interactions)} (dropped: {counts}): lower --filter.core or --filter.minimum_rating"
        )
    return table, dropped


def with_titles(interactions: pl.DataFrame, titled: pl.Series, untitled: Literal["error", "drop"]) -> pl.DataFrame:
    """Interactions with titled items only.

    Raises:
        UserError: under "error", when an item has no title.
    """
    has_title = interactions["raw_item"].is_in(titled.implode())
    missing = interactions.filter(~has_title)["raw_item"].unique(maintain_order=True)
    if len(missing) and untitled == "error":
        raise UserError(
            f"{len(missing)} items with interactions have no title, the first is '{missing[0]}': "
            "add their titles, or pass --filter.untitled drop to leave them out and count them"
        )
    return interactions.filter(has_title)


def without_duplicates(interactions: pl.DataFrame, keep: Literal["first", "last", "keep"]) -> pl.DataFrame:
    """One event per (user, item): the first or last in time, in file order among equal times. "keep" keeps all."""
    if keep == "keep":
        return interactions
    in_time = interactions.with_row_index("order").sort("timestamp", maintain_order=True)
    return in_time.unique(["raw_user", "raw_item"], keep=keep, maintain_order=True).sort("order").drop("order")


def k_core(interactions: pl.DataFrame, core: int) -> pl.DataFrame:
    """The largest part in which every user and every item has at least `core` events.

    Repeated until nothing changes: dropping an item takes events from users, and the other way round.
    """
    while True:
        kept = interactions.filter((pl.len().over("raw_user") >= core) & (pl.len().over("raw_item") >= core))
        if len(kept) == len(interactions):
            return kept
        interactions = kept
