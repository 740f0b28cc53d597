"""report.html: everything one evaluation has to say, in a single file that needs nothing else.

Pictures are inside the file; there are no scripts, no links and no outside addresses, and the page's own content
security policy forbids them. Titles come from strangers: jinja2 escapes every value, `_plain` does the rest.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llmrec.evaluation.compare import Table, duration, headings, p_value
from llmrec.evaluation.metrics import KS


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


@dataclass(frozen=True)
class Cost:
    """What a stage took."""

    stage: str
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Context:
    """What the report shows, from top to bottom. Mappings may be nested; they are shown as "a.b" = value."""

    title: str
    """E.g. "ml-100k: 2mamba4rec + llamarec-smollm2-135m"."""
    verdict: str
    """From `compare.verdict`."""
    table: Table
    """From `compare.table`."""
    plots: Mapping[str, Path]
    """Caption -> PNG file."""
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


def write_report(path: Path, context: Context) -> None:
    """Write the report as one HTML file.

    Raises:
        OSError: when a picture cannot be read or the file not be written.
    """
    environment = jinja2.Environment(
        autoescape=True, finalize=_plain, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"flat": _flat, "duration": duration, "p_value": p_value, "number": _number}
    template = environment.from_string((resources.files("llmrec.evaluation") / "report.html.j2").read_text("utf-8"))
    pictures = {caption: base64.b64encode(png.read_bytes()).decode() for caption, png in context.plots.items()}
    parts = headings(context.table)
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in KS]
    html = template.render(c=context, pictures=pictures, parts=parts, names=names)
    beside = path.with_name(path.name + ".part")
    beside.write_text(html, encoding="utf-8")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    """Make a value printable text before it is escaped.

    Control characters, direction overrides and lone surrogates become spaces. The colon of an address is written as
    an entity: readers see the address, and nothing that looks for links finds one.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        visible = "".join(c if c.isprintable() or c == "\n" else " " for c in value)
        return Markup(escape(visible).replace("://", Markup("&#58;//")))
    return value


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as a list of ("a.b", value)."""
    rows: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _number(value: Any) -> str:
    """A value as a reader wants it: 100,000 and 0.0631, and true, none and words as they are written in recipes."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_number(v) for v in value)
    return str(value)
