"""Which files of a folder hold the interactions and which the titles, format by format."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrec.config import Source
from llmrec.errors import UserError

# Publishers' names; ml-100k also as the RecBole package carries it.
PUBLISHED = {
    "ml-100k": [("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item")],
    "ml-1m": [("ratings.dat", "movies.dat")],
    "ml-latest-small": [("ratings.csv", "movies.csv")],
}


@dataclass(frozen=True)
class RawFiles:
    """The files of one data set.

    Attributes:
        interactions: at least one; several are read one after the other, in the order of their names.
        items: at least one.
    """

    interactions: list[Path]
    items: list[Path]

    def __iter__(self) -> Iterator[Path]:
        return iter([*self.interactions, *self.items])


def expected(source: Source) -> list[tuple[str, str]]:
    """The (interactions, items) names or globs that a source may consist of; the first pair that is there is read.

    Raises:
        UserError: when the recipe names no files and its format has no names of its own.
    """
    if source.format in PUBLISHED:
        return PUBLISHED[source.format]
    for key, value in {"interactions": source.interactions, "items": source.items}.items():
        if value is None:
            raise UserError(f"source.{key} is not set: format {source.format} needs the path of the {key}, e.g. --source.{key} {key}.csv")
    return [(str(source.interactions), str(source.items))]


def locate(folder: Path, source: Source) -> RawFiles:
    """Find a source's files in a folder; a name also stands for the same file with `.gz` at its end.

    Raises:
        UserError: when a file is missing; it says which.
    """
    pairs = expected(source)
    for interactions, items in pairs:
        found = RawFiles(_matches(folder, interactions), _matches(folder, items))
        if found.interactions and found.items:
            return found
    missing = [name for name in pairs[0] if not _matches(folder, name)]
    there = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise UserError(
        f"{folder}: {' and '.join(missing)} not found (there: {there}). Put the file there, or correct the path in the dataset recipe"
    )


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Files for a name or glob; an absolute one leaves the folder aside."""
    path = folder / Path(pattern).expanduser()
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return [candidate]
    return sorted(
        Path(found) for found in glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True) if os.path.isfile(found)
    )
