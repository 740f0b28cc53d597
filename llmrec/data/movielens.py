"""MovieLens as GroupLens publishes it (https://grouplens.org/datasets/movielens/), and ml-100k as the RecBole package carries it.

Timestamps are seconds and are read as integers: as 32-bit floats, RecBole's own reading, they move in steps of 64 s
and another film becomes the last one for 149 of ml-100k's 943 users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl

from llmrec.config import Source
from llmrec.data.files import locate
from llmrec.data.rows import RawTables, checked, read_fields, reading, require_column
from llmrec.data.titles import readable

DOMAIN = "movies"
INTERACTION = ["user", "item", "rating", "time"]
# u.item: five fields, then a 0/1 flag per genre.
GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"]
GENRES += ["Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
U_ITEM = ["item", "title", "release", "video", "url", *GENRES]


def read(folder: Path, source: Source, on_bad_rows: Literal["error", "drop"] = "error") -> RawTables:
    """Read a MovieLens folder.

    Args:
        folder: the folder that holds the publisher's files.
        source: `format` says which MovieLens it is.
        on_bad_rows: stop at the first unreadable row, or drop and count.

    Raises:
        UserError: missing or unreadable file, bad row.
    """
    files = locate(folder, source)
    path, items_path = files.interactions[0], files.items[0]
    separator, layout, names = {
        "u.data": ("\t", INTERACTION, INTERACTION),
        "ratings.dat": ("::", INTERACTION, INTERACTION),
        "ratings.csv": (",", None, ["userId", "movieId", "rating", "timestamp"]),
        "ml-100k.inter": ("\t", None, ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]),
    }[path.name.removesuffix(".gz")]
    wanted = dict(zip(["raw_user", "raw_item", "rating", "timestamp"], names, strict=True))
    rows = read_fields(path, separator, wanted, layout)
    interactions, bad_rows = checked(rows, separator.replace("\t", "<tab>").join(names), on_bad_rows, milliseconds=False)
    return RawTables(interactions, _read_items(items_path), bad_rows)


def _read_items(path: Path) -> pl.DataFrame:
    """The films of any of the four files: `raw_item, title, domain, text` (text: the genres)."""
    name = path.name.removesuffix(".gz")
    if name == "u.item":
        wanted = {"raw_item": "item", "title": "title", **{genre: genre for genre in GENRES}}
        films = read_fields(path, "|", wanted, U_ITEM, encoding="latin-1")
        flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
        films = films.with_columns(text=pl.concat_str(flags, separator=", ", ignore_nulls=True))
    elif name == "ml-100k.item":
        wanted = {"raw_item": "item_id:token", "title": "movie_title:token_seq", "year": "release_year:token", "text": "class:token_seq"}
        films = read_fields(path, "\t", wanted)
        has_year = pl.col("year").str.contains(r"^\d{4}$")
        films = films.with_columns(
            title=pl.when(has_year).then(pl.format("{} ({})", "title", "year")).otherwise(pl.col("title")),
            text=pl.col("text").str.replace_all(" ", ", ", literal=True),
        )
    elif name == "movies.dat":
        wanted = {"raw_item": "item", "title": "title", "text": "genres"}
        films = read_fields(path, "::", wanted, ["item", "title", "genres"], encoding="latin-1")
        films = films.with_columns(text=pl.col("text").str.replace_all("|", ", ", literal=True))
    else:  # movies.csv quotes titles that hold a comma
        with reading(path):
            films = pl.read_csv(path, infer_schema=False)
        for column in ("movieId", "title", "genres"):
            require_column(column, films.columns, path)
        films = films.rename({"movieId": "raw_item"}).with_columns(text=pl.col("genres").str.replace_all("|", ", ", literal=True))
    titles = pl.Series("title", [None if title is None else readable(title) for title in films["title"]], dtype=pl.String)
    return films.with_columns(titles, domain=pl.lit(DOMAIN)).select("raw_item", "title", "domain", "text")
