"""The table of several runs as text for a terminal, as Markdown, LaTeX or CSV.

Numbers are fractions with four decimals, beside the standard deviation where a row has several seeds. A star says that the row differs
from the one tested against. CSV is for programs: all digits, and every test in columns of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Literal

from llmrec.evaluation.compare import direction, p_value
from llmrec.evaluation.side_by_side import RESAMPLES, Row, SideBySide, text
from llmrec.evaluation.significance import SIGNIFICANT

Format = Literal["text", "markdown", "latex", "csv"]
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
)


def render(table: SideBySide, form: Format = "text") -> str:
    """The table in one of four forms, protocol and tests in words below it (in CSV as columns)."""
    return {"text": _text, "markdown": _markdown, "latex": _latex, "csv": _csv}[form](table)


def _text(table: SideBySide) -> str:
    header, *body = _grid(table)
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = ["  ".join(field.ljust(width) for field, width in zip(line, widths, strict=True)).rstrip() for line in [header, *body]]
    return "\n".join([*lines, "", *_tests(table), *_notes(table)])


def _tests(table: SideBySide) -> list[str]:
    """A line for each comparison, below a heading."""
    width = max((len(comparison["a"]) for comparison in table.comparisons), default=0)
    lines = [
        f"{c['a']:<{width}} - {table.against}  {c['metric'].upper():<8} {c['difference']:+.4f} [{c['ci95'][0]:+.4f}, {c['ci95'][1]:+.4f}]"
        f"  p {p_value(c['p_holm'])}"
        for c in table.comparisons
    ]
    return ["differences, their 95 % intervals, and p after Holm's correction", *lines, ""] if lines else []


def _markdown(table: SideBySide) -> str:
    escaped = [[field.replace("|", "\\|").replace("*", "\\*") for field in line] for line in _grid(table)]
    first = len(escaped[0]) - len(table.metrics)
    rule = ["---"] * first + ["---:"] * len(table.metrics)
    lines = [f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]]]
    return "\n".join([*lines, "", *(note.replace("*", "\\*", 1) + "  " for note in _notes(table))])


def _latex(table: SideBySide) -> str:
    header, *body = [[field.translate(LATEX).replace("±", r"$\pm$") for field in line] for line in _grid(table)]
    columns = "l" * (len(header) - len(table.metrics)) + "r" * len(table.metrics)
    return "\n".join(
        [
            *(f"% {note}" for note in _notes(table)),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            " & ".join(header) + r" \\",
            r"\hline",
            *(" & ".join(line) + r" \\" for line in body),
            r"\hline",
            r"\end{tabular}",
        ]
    )


def _csv(table: SideBySide) -> str:
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    of_tests = ("difference", "low", "high", "p_permutation", "p_holm")
    columns = [f"{metric}{kind}" for metric in table.metrics for kind in ("", " sd", *(f" {name}" for name in of_tests))]
    lines.writerow(["name", "seeds", *table.shared, *table.differing, *columns])
    for row in table.rows:
        fields: list[object] = [row.name, " ".join(map(str, row.seeds))]
        fields += [text(row.card, field) for field in (*table.shared, *table.differing)]
        for metric in table.metrics:
            tested = table.comparison(row, metric)
            fields += [row.values[metric].mean, row.values[metric].deviation]
            fields += (
                [tested["difference"], *tested["ci95"], tested["p_permutation"], tested["p_holm"]] if tested else [None] * len(of_tests)
            )
        lines.writerow(fields)
    return out.getvalue().rstrip("\n")


def _grid(table: SideBySide) -> list[list[str]]:
    """Header and rows as text."""
    several = any(len(row.runs) > 1 for row in table.rows)
    header = ["", *table.differing, *(["seeds"] if several else []), *(metric.upper() for metric in table.metrics)]
    lines = [header]
    for row in table.rows:
        fields = [row.name, *(text(row.card, field) for field in table.differing), *([str(len(row.runs))] if several else [])]
        lines.append(fields + [_value(table, row, metric) for metric in table.metrics])
    return lines


def _value(table: SideBySide, row: Row, metric: str) -> str:
    found, tested = row.values[metric], table.comparison(row, metric)
    spread = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    return f"{found.mean:.4f}{spread}{'*' if tested and direction(tested) else ''}"


def _notes(table: SideBySide) -> Sequence[str]:
    notes = [f"protocol: {'; '.join(f'{field} {text(table.shared, field)}' for field, value in table.shared.items() if value is not None)}"]
    if any(len(row.runs) > 1 for row in table.rows):
        notes.append("± standard deviation over seeds, that is over runs that differ by nothing else; users' values are averaged over them")
    if table.comparisons:
        notes.append(
            f"* differs from {table.against}: paired permutation test over users, {RESAMPLES:,} resamples, p below {SIGNIFICANT} after "
            f"Holm's correction for {len(table.comparisons)} comparisons"
        )
    elif len(table.rows) > 1:
        notes.append("no tests: the runs were not measured alike, asked different users, or lie without their per_user.parquet")
    return notes
