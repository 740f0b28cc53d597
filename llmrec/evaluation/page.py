"""A page as one file that needs nothing else: rendered from a template, every value escaped.

Pictures are inside the file; there are no scripts and no outside addresses, and the page's own content security policy forbids
them. Titles come from strangers: jinja2 escapes every value, `_plain` does the rest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llmrec.evaluation.compare import duration, p_value
from llmrec.evaluation.drawing import Picture, svg, swatch


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Render a template of this package to a file, which is whole or absent.

    Raises:
        OSError: when the file cannot be written.
    """
    html = _environment().get_template(template).render(values)
    beside = path.with_name(path.name + ".part")
    beside.write_text(html, encoding="utf-8")
    os.replace(beside, path)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read), autoescape=True, finalize=_plain, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "p_value": p_value, "number": _number}
    environment.filters |= {"flat": _flat, "breakable": _breakable, "panels": _panels, "swatch": swatch}
    return environment


def _read(name: str) -> str:
    return (resources.files("llmrec.evaluation") / name).read_text("utf-8")


def _panels(picture: Picture) -> list[Markup]:
    """A picture's panels as SVG. matplotlib escapes the words in them; `_plain` must not do it again."""
    return [Markup(printable(svg(panel, f"{picture.name}-{number}"))) for number, panel in enumerate(picture.panels)]


def _plain(value: Any) -> Any:
    """Make a value printable text before it is escaped.

    Control characters, direction overrides and lone surrogates become spaces. The colon of an address is written as
    an entity: readers see the address, and nothing that looks for links finds one.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return Markup(escape(printable(value)).replace("://", Markup("&#58;//")))
    return value


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots and underscores."""
    return Markup(_plain(name)).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def printable(text: str) -> str:
    """Text with a space for every character that cannot be seen or turns the direction of others."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as a list of ("a.b", value)."""
    rows: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _number(value: Any) -> str:
    """A value as a reader wants it: 100,000 and 0.0631, and yes, none and words as they are written in recipes."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_number(v) for v in value)
    return str(value)
