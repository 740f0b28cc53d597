"""report.html: everything one evaluation has to say, for the person who decides, in one file (see `page`).

From top to bottom: the verdict, the table, the bound, the cost; where the ranker helps and hurts; the training; users to look at;
and the fine print. What was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec.evaluation.catalogue import COLUMNS, CatalogueTable
from llmrec.evaluation.compare import Comparison, Table, direction, headings
from llmrec.evaluation.drawing import Picture
from llmrec.evaluation.metrics import KS
from llmrec.evaluation.page import write_page
from llmrec.evaluation.slices import Slice

MAIN = ("ndcg@10", "hr@10", "mrr@10")
MARKS = {1: "▲", -1: "▼", 0: ""}
"""What stands beside a number that is shown to be better, or worse, than the one it is tested against (see `compare.direction`)."""


@dataclass(frozen=True)
class Candidate:
    """One line of a sample user's candidate list. Ranks are 1-based, within the list."""

    title: str
    retriever_rank: int
    ranker_rank: int
    fused_rank: int
    probability: float
    """The language model's, among the candidates."""
    is_target: bool


@dataclass(frozen=True)
class Sample:
    """A user to look at."""

    user: str
    history: list[str]
    """Titles, oldest first."""
    candidates: list[Candidate]

    @property
    def target(self) -> Candidate | None:
        """The candidate that came next."""
        return next((candidate for candidate in self.candidates if candidate.is_target), None)


@dataclass(frozen=True)
class WrittenQuery:
    """A query, and its log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True)
class QuerySample:
    """A user for whom queries were written."""

    user: str
    history: list[str]
    """Titles, oldest first."""
    target: str
    queries: list[WrittenQuery]
    """Best first."""
    items: list[tuple[str, bool]]
    """Titles that the queries found, and whether each is the target's."""


@dataclass(frozen=True)
class Cost:
    """What a stage took."""

    stage: str
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Context:
    """What the report shows. Mappings may be nested; they are shown as "a.b" = value. What is empty is left out."""

    title: str
    """E.g. "ml-100k: 2mamba4rec + llamarec-smollm2-135m"."""
    verdict: str
    """From `compare.verdict`."""
    table: Table
    """From `compare.table`."""
    pictures: Mapping[str, list[Picture]]
    """By the section they stand in: "results", "bound", "cost", "where", "training", "data"."""
    samples: list[Sample]
    pairs: Mapping[str, Any]
    """Statistics of the preference pairs."""
    costs: list[Cost]
    protocol: Mapping[str, Any]
    """The protocol card as a dict."""
    data: Mapping[str, Any]
    """Statistics of the data."""
    weights: str
    """Where the base model's weights come from."""
    recipe: Mapping[str, Any]
    """The resolved configuration."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """"retriever_seconds" and "ranker_seconds" for one user on his own."""
    slices: Mapping[str, list[Slice]] = field(default_factory=dict)
    """What users are cut by -> `slices.slices`."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """"preference", "beyond_accuracy", "ties", "calibration" and "position_bias" of metrics.json, those that are there."""
    catalogue: CatalogueTable | None = None
    """From `catalogue.table`, of a ranker that writes queries."""
    catalogue_cost: str = ""
    """Its speed, in a line."""
    query_samples: list[QuerySample] = field(default_factory=list)


def write_report(path: Path, context: Context) -> None:
    """Write the report as one HTML file.

    Raises:
        OSError: when the file cannot be written.
    """
    values = {
        "c": context,
        "parts": headings(context.table),
        "main": MAIN,
        "names": [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in KS],
        "marks": marks(context.table["comparisons"]),
        "corrected": any("p_holm" in comparison for comparison in context.table["comparisons"]),
        "catalogue_names": COLUMNS,
    }
    write_page(path, "report.html.j2", values)


def marks(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], str]:
    """Which numbers of the table differ from the retriever's, after Holm's correction for the number of comparisons.

    Returns:
        (system, metric) -> "▲" better or "▼" worse. Empty where the comparisons were not corrected.
    """
    tested = {(c["a"], c["metric"]): MARKS[direction(c)] for c in comparisons if c["b"] == "retriever"}
    return {place: mark for place, mark in tested.items() if mark}
