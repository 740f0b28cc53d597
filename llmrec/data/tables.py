"""Read what `prepare` wrote, and write lists into tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from llmrec.data.sequences import Sequences


def list_column(values: np.ndarray, real: np.ndarray) -> pl.Series:
    """One list per row of a padded matrix.

    Args:
        values: (rows, longest).
        real: which of them are no padding, (rows, longest) bool.
    """
    offsets = np.concatenate([[0], np.cumsum(real.sum(1))])
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values[real]))))


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
