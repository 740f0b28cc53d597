"""`llmrec report`: the report of one evaluation made again, with what was measured since, or one page about several runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from llmrec import measured, runs
from llmrec.errors import UserError
from llmrec.evaluation import plots, side_by_side, training_plots
from llmrec.evaluation.drawing import Picture
from llmrec.evaluation.report import write_report
from llmrec.evaluation.runs_report import Conclusion, Group, RunsContext, write_runs_report
from llmrec.evaluation.side_by_side import Measured, text
from llmrec.stages import finished, pictures, reporting

CURVE = 20  # HR@k is drawn up to this k


def report(folders: list[str], out: str | None) -> dict[str, Any]:
    """Write the page, and return where it is for the JSON line.

    Args:
        folders: finished runs of `evaluate` or `retrieve`.
        out: the page; else report.html in the folder of a single evaluation, or in the folder that the runs have in common.

    Raises:
        UserError: a folder is no such run, what it rests on is gone, or the page cannot be written.
    """
    paths = [Path(folder) for folder in dict.fromkeys(folders)]
    made = {path: runs.read_stage(path) for path in paths}
    alone = len(paths) == 1 and (made[paths[0]] or {}).get("stage") == "evaluate"
    page = Path(out) if out else (paths[0] if alone else _common(paths)) / "report.html"
    if page.is_dir():
        raise UserError(f"--out {page} is a folder: name a file in it, such as {page / 'report.html'}")
    try:
        if alone:
            _one(paths[0], page if out else None)
        else:
            _several(paths, page)
    except OSError as error:
        raise UserError(f"{page} cannot be written: {error.strerror} ({error.filename}). Choose another file with --out") from error
    print(f"report: {page}")
    return {"command": "report", "runs": [str(path) for path in paths], "report": str(page)}


def inputs_of(folder: Path) -> dict[str, Path]:
    """The folder of each stage that a finished evaluation read."""
    return {finished.stage_of(path): path for path in finished.inputs_of(folder)}


def _one(folder: Path, page: Path | None) -> None:
    settings = (runs.read_stage(folder) or {})["config"]
    if page is None:
        reporting.write(folder, inputs_of(folder), settings)
    else:
        write_report(page, reporting.context_of(folder, inputs_of(folder), settings))


def _several(paths: list[Path], page: Path) -> None:
    groups: dict[str, list[Measured]] = {}
    for system in [system for path in paths for system in measured.read(path)]:
        groups.setdefault(str(system.card), []).append(system)
    cards = [group[0].card for group in groups.values()]
    fields = list(dict.fromkeys(field for card in cards for field in card))
    shared = [field for field in fields if len({text(card, field) for card in cards}) == 1]
    verdicts, trainings = [], {}
    for path in paths:
        if (runs.read_stage(path) or {})["stage"] == "evaluate":
            name = str(path.relative_to(_common(paths)))
            verdicts.append(Conclusion(name, runs.read_metrics(path)["verdict"], _link(path / "report.html", page)))
            trainings[name] = pictures.training_log(inputs_of(path)["orpo"])
    panels = training_plots.overlaid_curves(list(trainings.values()))
    context = RunsContext(
        title=f"{len(paths)} runs side by side" if len(paths) > 1 else paths[0].name,
        groups=[
            _group(systems, {field: text(card, field) for field in fields if field not in shared}, number)
            for number, (systems, card) in enumerate(zip(groups.values(), cards, strict=True))
        ],
        shared={field: text(cards[0], field) for field in shared},
        verdicts=verdicts,
        trainings=Picture("orpo", "Preference tuning", panels, tuple(trainings)) if panels else None,
    )
    write_runs_report(page, context)


def _group(systems: list[Measured], protocol: dict[str, str], number: int) -> Group:
    rows = side_by_side.over_all_seeds(systems)
    drawn = [row for row in rows if all(len(run.ranks) for run in row.runs)]
    curves = [np.mean([plots.hit_rates(run.ranks, CURVE) for run in row.runs], axis=0) for row in drawn]
    caption = "Share of users whose target is among the first k"
    picture = Picture(f"hit-rates-{number}", caption, plots.hit_rate_curves(curves), tuple(row.name for row in drawn)) if drawn else None
    return Group(protocol, side_by_side.table(rows), picture)


def _link(report_of_run: Path, page: Path) -> str | None:
    """The way from the page to a run's own report, quoted so that no folder's name reads as a scheme."""
    if not report_of_run.is_file():
        return None
    return quote(os.path.relpath(report_of_run.resolve(), page.resolve().parent))


def _common(paths: list[Path]) -> Path:
    """The folder that all runs lie in."""
    return Path(os.path.commonpath([path.parent for path in paths]))
