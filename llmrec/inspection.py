"""The commands that are no stages: what exists, what this machine offers, tables that cannot be true, and those that read finished runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from llmrec import machine, runs

OPTIONAL = {
    "bitsandbytes": "4-bit base models: pip install 'llmrec[quant]'",
    "mamba_ssm": "Mamba kernels on a GPU: pip install 'llmrec[cuda]'",
    "causal_conv1d": "Mamba kernels on a GPU: pip install 'llmrec[cuda]'",
    "fla": "flash-linear-attention kernels on a GPU: pip install 'llmrec[cuda]'",
    "liger_kernel": "fused Llama kernels on a GPU: pip install 'llmrec[cuda]'",
    "trackio": "experiment tracking: pip install 'llmrec[track]'",
}
Unit = Literal["percent", "fraction"]


def list_runs(root: str) -> list[dict[str, Any]]:
    """Print the finished runs below `root` as a table, and return them for the JSON line."""
    from rich.console import Console
    from rich.table import Table

    found = []
    for path in sorted(Path(root).glob("*/*/**/stage.json")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        made = runs.read_stage(path.parent)
        if made:
            keys = ("headline", "seconds", "peak_memory_mb", "made")
            found.append({"folder": str(path.parent)} | {key: made[key] for key in keys})
    if found:
        table = Table("run", "headline", "seconds", "peak MB", "made", box=None)
        for run in sorted(found, key=lambda run: run["made"]):
            headline = ", ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value:,}" for name, value in run["headline"].items()
            )
            table.add_row(run["folder"], headline, f"{run['seconds']:.0f}", str(run["peak_memory_mb"]), run["made"])
        Console(width=None if os.isatty(1) else 160).print(table)
    else:
        print(f"no finished runs in {root}: begin with `llmrec prepare`")
    return found


def doctor() -> dict[str, Any]:
    """Print what this machine offers and what is missing, and return it for the JSON line."""
    import torch

    from llmrec import assets
    from llmrec.rankers.backbone import best_dtype
    from llmrec.ssm import kernels

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cache = assets.cache_folder()
    present = sorted(f"{path.parent.name}/{path.name}" for path in cache.glob("*/*") if path.is_dir())
    missing = {name: remedy for name, remedy in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "memory_mb": memory,
        "gpus": gpus,
        "dtype": str(best_dtype()).removeprefix("torch."),
        "cache": {"folder": str(cache), "has": present},
        "data": os.environ.get("LLMREC_DATA"),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "kernels": kernels.usable(),
        "missing": missing,
    }
    print("  ".join(f"{name} {version}" for name, version in machine.versions().items()))
    print(f"{facts['cpu']}, {facts['cores']} cores, {memory:,} MB memory, language models compute in {facts['dtype']}")
    print(f"GPUs: {', '.join(gpus) or 'none (everything runs on the CPU)'}")
    print(f"state-space kernels: {', '.join(f'{name} {found}' for name, found in facts['kernels'].items())}")
    print(f"cache: {cache} has {', '.join(present) or 'nothing yet'}; LLMREC_DATA: {facts['data'] or 'not set'}")
    for name, remedy in missing.items():
        print(f"not installed: {name:<15}{remedy}")
    return facts


def check_table(path: str, unit: str | None) -> dict[str, Any]:
    """Print the impossible rows of a table of results, and return them for the JSON line."""
    from rich.console import Console
    from rich.table import Table

    from llmrec.evaluation import printed_tables

    table = printed_tables.read(Path(path), unit)
    found = printed_tables.impossible(table.rows)
    shown = Table("line", "row", "cannot be", box=None)
    for row, contradiction in found:
        shown.add_row(str(row.line), ", ".join(row.names), str(contradiction))
    if found:
        Console(width=None if os.isatty(1) else 160, markup=False, highlight=False).print(shown)
        print("(with one right item per user, and the same users behind every metric of a row)")
    skipped = f"; not checked: {', '.join(table.skipped)}" if table.skipped else ""
    print(f"{len(found)} of {len(table.rows)} rows are impossible; checked: {', '.join(table.columns)}{skipped}; {table.unit}")
    impossible = [
        {"line": row.line, "row": list(row.names), "reason": str(contradiction), "cells": {c.name: str(c.value) for c in row.cells}}
        | {"column": contradiction.cell.name, "low": contradiction.low, "high": contradiction.high}
        for row, contradiction in found
    ]
    return {"command": "check-table", "rows": len(table.rows), "unit": table.unit, "impossible": impossible}


@dataclass(frozen=True)
class Command:
    """A command that is no stage.

    Attributes:
        add_arguments: gives a parser the command's options.
        run: from what was given to what is printed as the JSON line, and the exit code.
        teaches: what `--help` says beyond the command's line in the overview, if anything.
    """

    add_arguments: Callable[[ArgumentParser], object]
    run: Callable[[Namespace], tuple[Any, int]]
    teaches: str | None = None


def _compare_arguments(parser: ArgumentParser) -> None:
    from llmrec.stages.compare import add_arguments

    add_arguments(parser)


def _compare(options: Namespace) -> tuple[Any, int]:
    from llmrec.stages.compare import compare

    shape = {"form": options.format, "out": options.out, "against": options.against, "mix": options.mix}
    return compare(options.folders, options.metrics, options.ranking, **shape), 0


def _audit(options: Namespace) -> tuple[Any, int]:
    from llmrec.stages.audit import audit

    verdicts = audit(options.folder)
    return verdicts, 1 if verdicts["leaks"] else 0


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders of finished runs of evaluate or retrieve")
    parser.add_argument(
        "--out", metavar="FILE", help="the page; else report.html in the run's folder, or in the one that several have in common"
    )


def _report(options: Namespace) -> tuple[Any, int]:
    from llmrec.stages.report import report

    return report(options.folders, options.out), 0


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.csv", help="a header, then a line per system; also with ; tab or | between the fields")
    parser.add_argument("--unit", type=Unit | None, help="of the numbers; else the column `unit`, else percent if one is above 1")


def _check(options: Namespace) -> tuple[Any, int]:
    found = check_table(options.file, options.unit)
    return found, 1 if found["impossible"] else 0


COMMANDS = {
    "report": Command(
        _report_arguments,
        _report,
        "Make the report of one evaluation again, with what was measured since, such as a benchmark; or, of several runs, one page with "
        "their systems in a table, their verdicts, and curves laid over each other.",
    ),
    "audit": Command(lambda parser: parser.add_argument("folder", metavar="RUN", help="folder of a finished run of any stage"), _audit),
    "compare": Command(
        _compare_arguments,
        _compare,
        "Runs of retrieve or evaluate in one table, each tested against the first over the same users. Runs that differ by their seed "
        "alone become one row, mean ± standard deviation; runs measured by different protocols are refused.",
    ),
    "check-table": Command(
        _check_arguments,
        _check,
        "Find the rows of a table of results that cannot be true: with one right item per user HR@k, NDCG@k and MRR@k, at one cut-off and "
        "several, bound each other. Rounding is allowed for: a row is named only when no ranking at all gives it. Columns are known by "
        "name (hr@10, recall@10, ndcg@10, mrr@10, any case); others name the row. Exit code 1 when a row is impossible.",
    ),
    "runs": Command(
        lambda parser: parser.add_argument("--runs", default="runs", help="folder of the run folders"),
        lambda options: (list_runs(options.runs), 0),
    ),
    "doctor": Command(lambda parser: None, lambda options: (doctor(), 0)),
}
"""Every command that is no stage, by its name. What a command needs is imported when it is asked for."""
