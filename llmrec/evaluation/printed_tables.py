"""Tables of results as people print them, one system per row, and which of their rows are impossible.

Metric columns are known by their names, HR@10, hit@10, HT@10, recall@10, R@10, NDCG@10, N@10, MRR@10 in any case; with one right item
per user recall is the hit rate. A column `unit` says percent or fraction, row by row. All else that is not numbers names the row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from llmrec.errors import UserError
from llmrec.evaluation.feasibility import LAST_RANK, Cell, Contradiction, contradiction

NAMES = {"hr": "hr", "ht": "hr", "hit": "hr", "hits": "hr", "recall": "hr", "r": "hr", "ndcg": "ndcg", "n": "ndcg", "mrr": "mrr"}
COLUMN = re.compile(rf"({'|'.join(NAMES)})\s*@\s*(\d+)\s*(\(?%\)?)?", re.IGNORECASE)
MARKUP = re.compile(r"</?\w+>|\\\w+\{|[{}*†‡$\s]")
SPREAD = re.compile(r"(±|\\pm|\+/?-).*|\([^()]*\)$")
DASHES = "-–—−:"  # with the colons of a Markdown rule
EMPTY = {"", "n/a", "na", "nan", "none", "null"}
UNITS = ("percent", "fraction")
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Row:
    """A row of the file: where it stands, what names it, and its metrics."""

    line: int
    names: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PrintedTable:
    """What was read.

    Attributes:
        rows: all rows with at least one metric.
        unit: how the numbers were read, in words.
        columns: the metric columns, as named in the file.
        skipped: columns of other metrics with a cut-off.
    """

    rows: tuple[Row, ...]
    unit: str
    columns: tuple[str, ...]
    skipped: tuple[str, ...]


def read(path: Path, unit: str | None = None) -> PrintedTable:
    """Read a table with a header line; fields are parted by comma, semicolon, tab or bar, whichever the header has most of.

    Numbers may carry bold marks, stars, a percent sign and a spread (0.093 ± 0.002, of which the mean is taken). Empty cells and
    dashes are skipped.

    Args:
        path: the file, UTF-8.
        unit: "percent" or "fraction". None: what the column `unit` says; without one percent if any number is above 1.

    Raises:
        UserError: a file that cannot be read, no metric column, a row too long or short, a cell that is not a number.
    """
    header, lines = _lines(path)
    known = {name: match for name in header if (match := COLUMN.fullmatch(name))}
    if not known:
        raise UserError(
            f"{path}: no column is a metric with a cut-off ({', '.join(header)}): name them hr@10, recall@10, ndcg@10, mrr@10 …"
        )
    for name, match in known.items():
        if not 1 <= int(match[2]) <= LAST_RANK:
            raise UserError(f"{path}: column '{name}': the cut-off must lie between 1 and {LAST_RANK}")
    if doubled := next((name for name in header if header.count(name) > 1 and name in known), None):
        raise UserError(f"{path}: the column '{doubled}' is there twice: rename or delete one")
    printed = {(line, name): _number(fields[name], path, line, name) for line, fields in lines for name in known}
    of_row, said = _units(
        path, header, lines, unit, any(value is not None and value > 1 and not marked for value, marked in printed.values())
    )
    labels = [
        name for name in header if name not in known and name.lower() != "unit" and any(_is_text(fields[name]) for _, fields in lines)
    ]
    rows = []
    for line, fields in lines:
        cells = [
            Cell(name, NAMES[match[1].lower()], int(match[2]), value, of_row[line] == "percent" or marked or bool(match[3]))
            for name, match in known.items()
            for value, marked in [printed[line, name]]
            if value is not None
        ]
        if cells:
            rows.append(Row(line, tuple(fields[name] for name in labels if fields[name]), tuple(cells)))
    skipped = tuple(name for name in header if name not in known and re.fullmatch(r".+@\s*\d+", name))
    return PrintedTable(tuple(rows), said, tuple(known), skipped)


def impossible(rows: Sequence[Row]) -> list[tuple[Row, Contradiction]]:
    """The rows that no ranking can have given, with the cells that contradict each other."""
    judged = ((row, contradiction(row.cells)) for row in rows)
    return [(row, found) for row, found in judged if found is not None]


def _lines(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and (line number, column -> text) of each row below it that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count))
            numbered = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read as a csv file: {reason}. Give a UTF-8 text with a header line") from error
    numbered = [(line, fields) for line, fields in numbered if any(fields)]
    if len(numbered) < 2:
        raise UserError(f"{path} has no rows: it needs a header line and one line per system")
    (_, header), *body = numbered
    for line, fields in body:
        if len(fields) != len(header):
            raise UserError(
                f"{path} line {line}: {len(fields)} fields where the header has {len(header)}: quote fields that hold the delimiter, "
                "and leave cells without a number empty"
            )
    return header, [(line, dict(zip(header, fields, strict=True))) for line, fields in body]


def _number(text: str, path: Path, line: int, column: str) -> tuple[Decimal | None, bool]:
    """The number in a cell, None in an empty one, and whether it carries a percent sign."""
    plain = SPREAD.sub("", MARKUP.sub("", text))
    percent = plain.endswith(("%", "\\%"))
    plain = plain.rstrip("%\\")
    if plain.strip(DASHES).lower() in EMPTY:
        return None, percent
    try:
        value = Decimal(plain)
    except InvalidOperation:
        value = Decimal("inf")
    if not value.is_finite() or not -100 <= value.adjusted() <= 100:
        raise UserError(
            f"{path} line {line}, column '{column}': '{text}' is not a number: write it like 0.093 or 9.3, or leave the cell empty"
        )
    return value, percent


def _is_text(text: str) -> bool:
    plain = MARKUP.sub("", text).rstrip("%").replace(",", "")
    try:
        Decimal(plain)
    except InvalidOperation:
        return plain.strip(DASHES).lower() not in EMPTY
    return False


def _units(
    path: Path, header: list[str], lines: list[tuple[int, dict[str, str]]], unit: str | None, above_one: bool
) -> tuple[dict[int, str], str]:
    """The unit of each line's numbers, and how it was found out."""
    column = next((name for name in header if name.lower() == "unit"), None)
    if unit is None and column is not None:
        for line, fields in lines:
            if fields[column].lower() not in UNITS:
                raise UserError(f"{path} line {line}, column '{column}': '{fields[column]}' is neither percent nor fraction")
        return {line: fields[column].lower() for line, fields in lines}, "percent or fraction as the column unit says"
    guessed = "percent" if above_one else "fraction"
    why = f"read as {guessed}, as {'some are' if above_one else 'none is'} above 1 (say otherwise with --unit)"
    return dict.fromkeys((line for line, _ in lines), unit or guessed), why if unit is None else f"read as {unit}"
