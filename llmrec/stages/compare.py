"""`llmrec compare`: finished runs in one table, each tested against one of them over the same users."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from llmrec import measured
from llmrec.errors import UserError
from llmrec.evaluation import side_by_side, table_formats
from llmrec.evaluation.table_formats import Format
from llmrec.measured import Ranking


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders, as `llmrec runs` lists them")
    parser.add_argument("--metrics", default="hr@10,ndcg@10,mrr@10", help="columns, by their names in metrics.json")
    parser.add_argument(
        "--ranking", type=Ranking, default="headline", help="of retrieve: all items, without the user's history, or sampled negatives"
    )
    parser.add_argument("--format", type=Format, default="text", help="csv has the tests and all digits")
    parser.add_argument("--out", help="write the table to this file")
    parser.add_argument("--against", metavar="RUN[:SYSTEM]", help="what to test against, e.g. runs/ml-1m/evaluate/NAME:sft; else the first")
    parser.add_argument("--mix", action="store_true", help="allow runs measured by different protocols: what differs becomes columns")


def compare(
    folders: list[str], metrics: str, ranking: Ranking, *, form: Format, out: str | None, against: str | None, mix: bool
) -> dict[str, Any]:
    """Print runs side by side, or write the table to a file, and return it for the JSON line."""
    base, _, system = (against or folders[0]).partition(":")
    found = {folder: measured.read(Path(folder), ranking) for folder in dict.fromkeys([*folders, base])}
    rows = side_by_side.over_all_seeds([run for systems in found.values() for run in systems])
    asked = [run for run in found[base] if not system or run.name.endswith(f": {system}")]
    if not asked:
        raise UserError(f"--against {against}: {base} has no system '{system}': it has {', '.join(run.name for run in found[base])}")
    name = next(row.name for row in rows if any(run.name == asked[0].name and run.made_by == asked[0].made_by for run in row.runs))
    table = side_by_side.table(rows, [metric.strip().lower() for metric in metrics.split(",")], against=name, mix=mix)
    text = table_formats.render(table, form)
    if out is None:
        print(text)
    else:
        try:
            Path(out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    lines = [
        {
            "name": row.name,
            "runs": [str(run.folder) for run in row.runs],
            "seeds": row.seeds,
            "metrics": {metric: asdict(row.values[metric]) for metric in table.metrics},
            "protocol": {field: side_by_side.text(row.card, field) for field in table.differing},
        }
        for row in table.rows
    ]
    shared = {"protocol": table.shared, "against": table.against, "comparisons": table.comparisons}
    return {"command": "compare", "rows": lines} | shared
