"""Amazon Reviews 2023 (https://amazon-reviews-2023.github.io): 5-core rating csv and item metadata as json lines, plain or `.gz`.

The published csv has a header, the one that the publisher's own scripts write has none; both are read. Timestamps are
milliseconds. Some are negative, some titles are empty or null, some items occur twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import polars as pl

from llmrec.config import Source
from llmrec.data.files import locate
from llmrec.data.rows import RawTables, checked, open_bytes, read_fields, read_lines, reading
from llmrec.errors import UserError

INTERACTION = ["user_id", "parent_asin", "rating", "timestamp"]
META = {"parent_asin": pl.String, "title": pl.String, "main_category": pl.String}


def read(folder: Path, source: Source, on_bad_rows: Literal["error", "drop"] = "error") -> RawTables:
    """Read one category.

    Args:
        folder: the folder that holds both files.
        source: `interactions` and `items` name them, without `.gz`.
        on_bad_rows: stop at the first unreadable row, or drop and count.

    Raises:
        UserError: missing or unreadable file, bad row, malformed json line.
    """
    files = locate(folder, source)
    wanted = dict(zip(["raw_user", "raw_item", "rating", "timestamp"], INTERACTION, strict=True))
    tables = []
    for path in files.interactions:
        with reading(path), open_bytes(path) as file:
            has_header = b"parent_asin" in file.readline()
        tables.append(read_fields(path, ",", wanted, None if has_header else INTERACTION))
    interactions, bad_rows = checked(pl.concat(tables), ",".join(INTERACTION), on_bad_rows, milliseconds=True)
    return RawTables(interactions, pl.concat([_read_meta(path) for path in files.items]), bad_rows)


def _read_meta(path: Path) -> pl.DataFrame:
    """Only the three columns are kept while reading: the Beauty file has gigabytes of details."""
    category = path.name.split(".")[0].removeprefix("meta_").replace("_", " ")
    with reading(path):
        try:
            items = pl.scan_ndjson(path, schema=META).collect()
        except pl.exceptions.ComputeError:
            _refuse_bad_line(path)
            raise
    return items.select(
        pl.col("parent_asin").alias("raw_item"),
        "title",
        pl.col("main_category").fill_null(category).alias("domain"),
        text=pl.lit(None, dtype=pl.String),
    )


def _refuse_bad_line(path: Path) -> None:
    """Find out which line is no json object, after the fast reader has failed.

    Raises:
        UserError: it names the line, or the file when it is damaged.
    """
    for line, row in read_lines(path).iter_rows():
        try:
            is_item = isinstance(json.loads(line), dict)
        except ValueError:
            is_item = False
        if not is_item:
            raise UserError(f"{path} line {row}: not a json object. Delete the line, or fetch the file again")
