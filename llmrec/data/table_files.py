"""Your own interactions and titles: csv or parquet, one file or many, with your own column names.

Rating and timestamp may be missing. Without timestamps the order of the rows is the order in time.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

import polars as pl

from llmrec.config import Source
from llmrec.data.files import locate
from llmrec.data.rows import RawTables, checked, open_bytes, reading, require_column
from llmrec.errors import UserError

DOMAIN = "items"
YEAR_10000 = 253_402_300_800_000  # milliseconds


def read(folder: Path, source: Source, on_bad_rows: Literal["error", "drop"] = "error") -> RawTables:
    """Read csv or parquet tables.

    Args:
        folder: what relative paths of the source are relative to.
        source: paths or globs, and the names of the columns. Timestamps are `source.timestamp_unit` since 1970, ISO 8601
            text, or dates and times of parquet.
        on_bad_rows: stop at the first unreadable row, or drop and count.

    Raises:
        UserError: missing or unreadable file, missing column, bad row.
    """
    files = locate(folder, source)
    names = source.columns
    wanted = {"raw_user": names.user, "raw_item": names.item, "rating": names.rating, "timestamp": names.timestamp}
    present = {ours: name for ours, name in wanted.items() if name is not None}
    tables, bad_rows = [], 0
    for path in files.interactions:
        rows = _read_table(path, source.format, present)
        first_line = 2 if source.format == "csv" else 1  # below the header
        numbered = rows.with_columns(row=pl.int_range(first_line, pl.len() + first_line, dtype=pl.Int64), file=pl.lit(path.name))
        not_blank = numbered.filter(~pl.all_horizontal(pl.col(name).is_null() for name in present))
        milliseconds = source.timestamp_unit == "ms"
        if names.timestamp is not None and _is_calendar(not_blank["timestamp"]):
            not_blank, milliseconds = not_blank.with_columns(_as_milliseconds(not_blank["timestamp"])), True
        as_text = not_blank.with_columns(pl.col(list(present)).cast(pl.String))
        good, bad = checked(as_text, ", ".join(present.values()), on_bad_rows, milliseconds)
        if not milliseconds and (good["timestamp"] > YEAR_10000).any():
            raise UserError(
                f"{path.name}: column '{names.timestamp}' reaches beyond the year 9999 when it is read as seconds. "
                "Milliseconds? Then say source.timestamp_unit: ms in the dataset recipe"
            )
        tables.append(good)
        bad_rows += bad
    titles = [_read_table(path, source.format, {"raw_item": names.item, "title": names.title}) for path in files.items]
    items = pl.concat(titles).select(pl.all().cast(pl.String), domain=pl.lit(DOMAIN), text=pl.lit(None, dtype=pl.String))
    return RawTables(pl.concat(tables), items, bad_rows)


def _read_table(path: Path, file_format: str, wanted: dict[str, str]) -> pl.DataFrame:
    """The wanted columns of one file under our names."""
    if file_format == "parquet":
        with reading(path):
            table = pl.scan_parquet(path)
            columns = table.collect_schema().names()
        _require(wanted, columns, path)
        return table.select(pl.col(name).alias(ours) for ours, name in wanted.items()).collect()
    try:
        with reading(path):
            rows = pl.read_csv(path, infer_schema=False)
    except UserError:
        _refuse_long_record(path)
        raise
    _require(wanted, rows.columns, path)
    return rows.select(pl.col(name).alias(ours) for ours, name in wanted.items())


def _require(wanted: dict[str, str], columns: list[str], path: Path) -> None:
    for name in wanted.values():
        require_column(name, columns, path)


def _refuse_long_record(path: Path) -> None:
    """Find the record with more fields than the header, after the fast reader has failed.

    Raises:
        UserError: it names the line.
    """
    with open_bytes(path) as file:
        records = csv.reader(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline=""))
        fields = len(next(records, []))
        for record in records:
            if len(record) > fields:
                raise UserError(f"{path} line {records.line_num}: {len(record)} fields instead of {fields}. Quote fields that hold a comma")


def _is_calendar(times: pl.Series) -> bool:
    """Whether the times are dates rather than numbers: date types of parquet, ISO 8601 text."""
    return times.dtype.is_temporal() or (times.dtype == pl.String and bool(times.str.contains(r"^\d{4}-\d\d-\d\d").any()))


def _as_milliseconds(times: pl.Series) -> pl.Series:
    """Dates as text of milliseconds since 1970, UTC; what is no date stays as it is, for `checked` to name."""
    if times.dtype.is_temporal():
        return times.dt.epoch("ms").cast(pl.String)
    parsed = times.str.to_datetime(strict=False, time_unit="ms", time_zone="UTC").dt.epoch("ms").cast(pl.String)
    return parsed.fill_null(times)
