"""One page about several runs: a table of those that were measured alike, each verdict with the way to its own report, curves overlaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmrec.evaluation.compare import direction
from llmrec.evaluation.drawing import Picture
from llmrec.evaluation.page import write_page
from llmrec.evaluation.report import MARKS
from llmrec.evaluation.side_by_side import Row, SideBySide


@dataclass(frozen=True)
class Conclusion:
    """What an evaluation concluded."""

    run: str
    """Its name."""
    verdict: str
    link: str | None
    """Address of its report relative to this page, quoted; None where there is none."""


@dataclass(frozen=True)
class Group:
    """Runs that were measured alike."""

    protocol: Mapping[str, str]
    """Fields of the protocol in which this group differs from another one, in words."""
    table: SideBySide
    picture: Picture | None
    """Its HR@k, where the ranks are known."""


@dataclass(frozen=True)
class RunsContext:
    """What the page shows."""

    title: str
    groups: list[Group]
    shared: Mapping[str, str]
    """Fields of the protocol that all groups share, in words."""
    verdicts: list[Conclusion]
    trainings: Picture | None


def write_runs_report(path: Path, context: RunsContext) -> None:
    """Write the page as one HTML file.

    Raises:
        OSError: when the file cannot be written.
    """
    write_page(path, "runs.html.j2", {"c": context, "mark": mark})


def mark(table: SideBySide, row: Row, metric: str) -> str:
    """How a row differs from the one that all are tested against: "▲" better, "▼" worse, "" not shown to, or not tested."""
    comparison = table.comparison(row, metric)
    return "" if comparison is None else MARKS[direction(comparison)]
