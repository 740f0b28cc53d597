"""Raw interactions as they are read: lines to string columns, strings to numbers, and the line number of what is wrong.

Everything is read as text first and cast afterwards, so that an error can name the file, the line and the value.
"""

from __future__ import annotations

import difflib
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import polars as pl

from llmrec.errors import UserError

NO_SEPARATOR = "\x01"  # a byte that text files do not hold: makes polars read whole lines


@dataclass(frozen=True)
class RawTables:
    """What a reader returns.

    Attributes:
        interactions: `raw_user:str, raw_item:str, rating:float32?, timestamp:int64? (milliseconds, UTC), row:int64 (line of the
            file, from 1), file:str`, in the order of the files.
        items: `raw_item:str, title:str?, domain:str, text:str?`; an item may occur twice.
        bad_rows: number of rows that were dropped because they could not be read.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    bad_rows: int = 0


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong while a file is read into one line for the user.

    Raises:
        UserError: empty, undecodable, damaged or unreadable file.
    """
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise UserError(f"{path} is empty: put the complete file there") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged or incomplete; delete it and fetch it again") from error
    except pl.exceptions.ComputeError as error:
        reason = str(error).splitlines()[0]
        if "utf" in reason.lower():
            raise UserError(f"{path} line {_undecodable_line(path)} is not UTF-8 text: save the file as UTF-8") from error
        raise UserError(f"{path} cannot be read ({reason}): it is damaged or incomplete; delete it and fetch it again") from error


def _undecodable_line(path: Path) -> int:
    with open_bytes(path) as file:
        return next((number for number, line in enumerate(file, start=1) if "\ufffd" in line.decode("utf-8", errors="replace")), 1)


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, unpacking `.gz`."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def read_lines(path: Path, encoding: Literal["utf-8", "latin-1"] = "utf-8") -> pl.DataFrame:
    """A text file as `line:str, row:int64` (from 1), blank lines left out.

    Raises:
        UserError: see `reading`.
    """
    with reading(path):
        content: Path | bytes = path
        if encoding == "latin-1":
            with open_bytes(path) as file:
                content = file.read().decode("latin-1").encode()
        lines = pl.read_csv(
            content,
            separator=NO_SEPARATOR,
            quote_char=None,
            has_header=False,
            infer_schema=False,
            new_columns=["line"],
            truncate_ragged_lines=True,
        )
    numbered = lines.select("line", pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("row")).drop_nulls("line")
    if numbered.is_empty():
        raise UserError(f"{path} is empty: put the complete file there")
    return numbered


def read_fields(
    path: Path,
    separator: str,
    wanted: dict[str, str],
    layout: list[str] | None = None,
    encoding: Literal["utf-8", "latin-1"] = "utf-8",
) -> pl.DataFrame:
    """Split every line at a separator; no quoting.

    Args:
        path: a text file, plain or `.gz`.
        separator: one or more characters.
        wanted: our column name -> name in `layout`.
        layout: the fields of a line, in order; None takes them from the first line.
        encoding: of the file.

    Returns:
        The wanted columns as strings, `row`, `file`, and `problem`: null, or what is wrong with the number of fields.

    Raises:
        UserError: unreadable file, or a wanted column that is not there.
    """
    lines = read_lines(path, encoding)
    if layout is None:
        layout, lines = lines["line"][0].split(separator), lines[1:]
    for name in wanted.values():
        require_column(name, layout, path)
    fields = pl.col("line").str.count_matches(separator, literal=True) + 1
    parts = lines.with_columns(pl.col("line").str.split(separator), fields=fields)
    return parts.select(
        *(pl.col("line").list.get(layout.index(name), null_on_oob=True).alias(ours) for ours, name in wanted.items()),
        "row",
        file=pl.lit(path.name),
        problem=pl.when(pl.col("fields") != len(layout)).then(pl.format("{} fields instead of " + str(len(layout)), "fields")),
    )


def require_column(name: str, columns: list[str], path: Path) -> None:
    """Check that a column is there.

    Raises:
        UserError: it lists the columns and the nearest name.
    """
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
        hint = f"; nearest: '{near[0]}'" if near else ""
        raise UserError(f"{path}: no column '{name}' (there: {', '.join(columns)}{hint}). Correct source.columns or the file")


def checked(rows: pl.DataFrame, layout: str, on_bad_rows: Literal["error", "drop"], milliseconds: bool) -> tuple[pl.DataFrame, int]:
    """Cast the string columns of an interaction table.

    A row is bad when it has the wrong number of fields, an empty user or item, a rating that is no finite number or a
    timestamp that is no number or lies before 1970 (Amazon's data has such rows).

    Args:
        rows: `raw_user, raw_item, row, file`, and where the source has them `rating`, `timestamp`, `problem`.
        layout: the columns of the file, for the message.
        on_bad_rows: stop at the first, or drop and count.
        milliseconds: unit of the timestamps; False for seconds.

    Returns:
        The interactions as in `RawTables`, and the number of rows dropped.

    Raises:
        UserError: for a bad row; it names file, line and value.
    """
    problem = pl.coalesce(
        pl.col("problem") if "problem" in rows.columns else pl.lit(None, dtype=pl.String),
        pl.when(_is_empty("raw_user")).then(pl.lit("the user is empty")),
        pl.when(_is_empty("raw_item")).then(pl.lit("the item is empty")),
    )
    rating: pl.Expr = pl.lit(None, dtype=pl.Float64)
    if "rating" in rows.columns:
        rating = pl.col("rating").str.strip_chars().cast(pl.Float64, strict=False)
        is_bad = rating.is_null() | ~rating.is_finite()
        problem = pl.coalesce(problem, pl.when(is_bad).then(pl.format("rating '{}' is not a number", pl.col("rating").fill_null(""))))
    timestamp: pl.Expr = pl.lit(None, dtype=pl.Int64)
    if "timestamp" in rows.columns:
        text = pl.col("timestamp").str.strip_chars()
        # Integers first: a detour over floats would be harmless at 64 bits and is not at 32.
        timestamp = pl.coalesce(text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False))
        shown = pl.col("timestamp").fill_null("")
        problem = pl.coalesce(
            problem,
            pl.when(timestamp.is_null()).then(pl.format("timestamp '{}' is not a number", shown)),
            pl.when(timestamp < 0).then(pl.format("timestamp '{}' is before 1970", shown)),
        )
    typed = rows.select(
        "raw_user",
        "raw_item",
        rating.cast(pl.Float32).alias("rating"),
        (timestamp * (1 if milliseconds else 1000)).alias("timestamp"),
        "row",
        "file",
        problem.alias("problem"),
    )
    bad = typed.filter(pl.col("problem").is_not_null())
    if len(bad) and on_bad_rows == "error":
        first = bad.row(0, named=True)
        raise UserError(
            f"{first['file']} line {first['row']}: {first['problem']} (columns: {layout}). "
            "Fix or delete the line, or pass --filter.on_bad_rows drop to skip such rows and count them"
        )
    return typed.filter(pl.col("problem").is_null()).drop("problem"), len(bad)


def _is_empty(column: str) -> pl.Expr:
    return pl.col(column).is_null() | (pl.col(column).str.strip_chars() == "")
