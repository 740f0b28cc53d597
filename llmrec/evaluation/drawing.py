"""How pictures are made: panels drawn by matplotlib, as one PNG file or each as SVG for a page.

A panel is a function that draws on axes. In a page the SVG takes the page's colours: ink becomes `currentColor`, the colours of the
systems become CSS variables, so that one picture serves light and dark. Text stays text. Okabe and Ito's colours, which colour-blind
readers can tell apart (https://jfly.uni-koeln.de/color). Figures are made without pyplot: no global state and no display.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Panel = Callable[[Axes], None]

COLOURS = {"retriever": "#7f7f7f", "sft": "#56b4e9", "orpo": "#0072b2", "fused": "#d55e00"}
MARKERS = {"retriever": "o", "sft": "s", "orpo": "^", "fused": "D"}
SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
BLUE, ORANGE, GREY = COLOURS["orpo"], COLOURS["fused"], COLOURS["retriever"]
GRID = "#dddddd"
SIZE = (4.2, 3.0)  # inches; as wide as a phone, so that text is not scaled down there
STYLE: dict[Any, Any] = {
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

# what a page calls the colours; the template gives each a value for light and one for dark
VARIABLES = {"#000000": "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(dict.fromkeys([*COLOURS.values(), *SERIES]))
}


@dataclass(frozen=True)
class Picture:
    """One picture of a page: panels that stand together under a caption. `name` is unique in the page and the stem of its PNG file."""

    name: str
    caption: str
    panels: list[Panel]
    lines: tuple[str, ...] = ()
    """Names of the lines that are drawn with `look`, where the page is to tell which is which."""


def png(path: Path, panels: Sequence[Panel]) -> None:
    """Draw the panels two a row into one PNG file, which is whole or absent.

    Raises:
        ValueError: when there are no panels.
    """
    if not panels:
        raise ValueError("a picture needs at least one panel")
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    width = 4.0 if columns == 2 else 6.0
    beside = path.with_name(path.name + ".part")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, 3.4 * rows), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(rows, columns, number))
        figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)


def svg(panel: Panel, name: str) -> str:
    """Draw one panel as an <svg> element to stand inside a page.

    Args:
        panel: what to draw.
        name: of this picture in its page; its inner ids are derived from it, so that no two pictures share one.
    """
    written = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        panel(figure.add_subplot())
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue())


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of the n-th of many lines: colours in turn, then again with other dashes."""
    return SERIES[number % len(SERIES)], ("solid", "dashed", "dotted")[number // len(SERIES) % 3]


def swatch(number: int) -> str:
    """The look of the n-th line as a CSS border."""
    colour, dashes = look(number)
    return f"{dashes} {VARIABLES[colour]}"


def _inline(document: str) -> str:
    """The <svg> element of an SVG document: no outside addresses, only the ids that are referred to, the page's colours."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    (box,) = re.findall(r'viewBox="([^"]*)"', element)
    element = re.sub(r"^<svg[^>]*>", f'<svg viewBox="{box}" fill="currentColor" aria-hidden="true">', element)
    element = element.replace("xlink:href", "href")
    wanted = set(re.findall(r'(?:url\(|href=")#([\w-]+)', element))
    element = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in wanted else "", element)
    element = re.sub(r'style="[^"]*"', lambda match: re.sub("#[0-9a-f]{6}", _variable, match[0]), element)
    return re.sub(r"\n\s*", "\n", element).strip()


def _variable(colour: re.Match[str]) -> str:
    return VARIABLES.get(colour[0], colour[0])
