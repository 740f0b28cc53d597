"""Read what `prepare` wrote, and write lists into tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import DTypeLike

from llmrec.data.sequences import Sequences


def list_column(values: np.ndarray, real: np.ndarray) -> pl.Series:
    """One list per row of a padded matrix.

    Args:
        values: (rows, longest).
        real: which of them are no padding, (rows, longest) bool.
    """
    offsets = np.concatenate([[0], np.cumsum(real.sum(1))])
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values[real]))))


def padded(lists: Sequence[Sequence[float]], filler: float = 0, *, width: int | None = None, dtype: DTypeLike = np.int32) -> np.ndarray:
    """The other way round: lists of different lengths as a matrix, (lists, width), of item ids where nothing else is said.

    Args:
        lists: none longer than `width`.
        filler: what stands behind the short ones.
        width: None: that of the longest.
        dtype: of the matrix.
    """
    rows = np.full((len(lists), max(map(len, lists), default=0) if width is None else width), filler, dtype)
    for row, values in zip(rows, lists, strict=True):
        row[: len(values)] = values
    return rows


def load_sequences(folder: Path) -> Sequences:
    """All users' events from a `prepare` folder."""
    interactions = pl.read_parquet(folder / "interactions.parquet")
    counts = {name: pl.scan_parquet(folder / f"{name}.parquet").select(pl.len()).collect().item() for name in ("items", "users")}
    return Sequences.from_table(interactions, counts["items"], counts["users"])


def load_titles(folder: Path) -> list[str]:
    """Titles by item id; element 0 is padding."""
    return ["", *pl.read_parquet(folder / "items.parquet", columns=["item", "title"]).sort("item")["title"]]


def load_statistics(folder: Path) -> dict[str, Any]:
    """The data set's statistics."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
