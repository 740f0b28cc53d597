"""Raw files to the three tables everything else reads: interactions, items, users."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from llmrec.config import Filter, Source, Split
from llmrec.data import amazon, movielens, table_files
from llmrec.data.filters import apply_filters
from llmrec.data.rows import RawTables
from llmrec.data.split import ambiguous_targets, in_time_order, leave_one_out, periods, temporal
from llmrec.data.titles import clean


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        interactions: `user:int32, item:int32, rating:float32?, timestamp:int64? (milliseconds, UTC), split:str`, sorted by
            user, time and the tie rule. Users count from 0, items from 1.
        items: `item:int32, raw_id:str, title:str, domain:str, text:str?`, one row per item, by number.
        users: `user:int32, raw_id:str`, one row per user, by number.
        statistics: sizes, distributions and what was dropped; plain numbers and strings for metrics.json.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    statistics: dict[str, Any]


def prepare_tables(source: Source, filter: Filter, split: Split, folder: Path, seed: int = 0) -> Prepared:
    """Read, filter, number, order and split a data set.

    The same files and settings give the same tables: users and items are numbered by their sorted raw ids.

    Args:
        source: format and names of the files.
        filter: which interactions stay.
        split: tie rule, and which events are training, validation and test.
        folder: where the files are.
        seed: decides the order of ties under `ties: random`, nothing else.

    Raises:
        UserError: missing or unreadable file, bad row, untitled item, nothing left, no times for a temporal split.
    """
    raw = read_tables(source, folder, filter.on_bad_rows)
    titles = titled_items(raw)
    kept, dropped = apply_filters(raw.interactions, titles["raw_item"], filter)

    users = numbered(kept["raw_user"], "user", first=0)
    items = numbered(kept["raw_item"], "item", first=1)
    events = kept.join(users, on="raw_user", maintain_order="left").join(items, on="raw_item", maintain_order="left")
    parted = temporal if split.kind == "temporal" else leave_one_out
    ordered = parted(in_time_order(events, split, seed), split)
    interactions = ordered.select("user", "item", "rating", "timestamp", "split")
    return Prepared(
        interactions=interactions,
        items=items.join(titles, on="raw_item", maintain_order="left").select(
            "item", raw_id="raw_item", title="title", domain="domain", text="text"
        ),
        users=users.select("user", raw_id="raw_user"),
        statistics=statistics(interactions, len(items), {"bad_rows": raw.bad_rows, **dropped}, split),
    )


def read_tables(source: Source, folder: Path, on_bad_rows: Literal["error", "drop"]) -> RawTables:
    """Read a source's files with the reader of its format."""
    if source.format in ("csv", "parquet"):
        return table_files.read(folder, source, on_bad_rows)
    if source.format == "amazon-2023":
        return amazon.read(folder, source, on_bad_rows)
    return movielens.read(folder, source, on_bad_rows)


def titled_items(raw: RawTables) -> pl.DataFrame:
    """The items that occur in the interactions and have a title, each once, titles cleaned; of several titles the first."""
    occurring = raw.items.join(raw.interactions.select("raw_item").unique(), on="raw_item", how="semi", maintain_order="left")
    titles = pl.Series("title", [clean(title or "") for title in occurring["title"]], dtype=pl.String)
    return occurring.with_columns(titles).filter(pl.col("title") != "").unique("raw_item", keep="first", maintain_order=True)


def numbered(raw_ids: pl.Series, name: str, first: int) -> pl.DataFrame:
    """Number the distinct ids: by value when all are integers, else alphabetically.

    Returns:
        The ids under their old name, and `name:int32`, from `first`.
    """
    distinct = sorted(raw_ids.unique())
    if all(re.fullmatch(r"\d+", raw_id, re.ASCII) for raw_id in distinct):
        distinct.sort(key=int)
    return pl.DataFrame(
        {raw_ids.name: distinct, name: range(first, first + len(distinct))}, schema={raw_ids.name: pl.String, name: pl.Int32}
    )


def statistics(interactions: pl.DataFrame, item_count: int, dropped: dict[str, int], split: Split) -> dict[str, Any]:
    """What metrics.json of `prepare` says about the data.

    Args:
        interactions: as in `Prepared`.
        item_count: number of items.
        dropped: interactions dropped, by reason.
        split: as it was made.
    """
    lengths = interactions.group_by("user").len()["len"]
    ratings = interactions["rating"].drop_nulls().round(1).value_counts(sort=False).sort("rating")
    first, last = interactions["timestamp"].min(), interactions["timestamp"].max()
    return {
        "users": len(lengths),
        "items": item_count,
        "interactions": len(interactions),
        "density": len(interactions) / (len(lengths) * item_count),
        "history_length": {f"p{int(q * 100)}": int(lengths.quantile(q, "lower") or 0) for q in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)}
        | {"mean": lengths.mean()},
        "ratings": {f"{rating:.1f}": count for rating, count in ratings.iter_rows()},
        "dropped": dropped,
        "evaluated_users": interactions.filter(pl.col("split") == "test")["user"].n_unique(),
        "ambiguous_targets": ambiguous_targets(interactions),
        "ties": split.ties,
        "first_event": _date(first),
        "last_event": _date(last),
    } | (_temporal(interactions, split) if split.kind == "temporal" else {})


def _temporal(interactions: pl.DataFrame, split: Split) -> dict[str, Any]:
    """Where the periods begin, what became of the events, and what the targets are: those of new items nobody can have learnt."""
    bounds = periods(interactions, split)
    events = dict(interactions["split"].value_counts().iter_rows())
    trained = interactions.filter(pl.col("split") == "train")["item"].unique()
    targets = {}
    for name in ("valid", "test"):
        asked = interactions.filter(pl.col("split") == name)
        known = asked["item"].is_in(trained.implode()).sum()
        targets[name] = {"users": asked["user"].n_unique(), "targets": len(asked), "of_new_items": len(asked) - known}
    dates = {"valid_from_date": _date(bounds.valid_from), "test_from_date": _date(bounds.test_from)}
    return {
        "periods": {"valid_from": bounds.valid_from, "test_from": bounds.test_from, **dates},
        "events": {name: events.get(name, 0) for name in ("train", "valid", "test", "past")},
        "targets": targets,
    }


def _date(milliseconds: Any) -> str | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
