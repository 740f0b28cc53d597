"""What finished runs measured, system by system: the rows that tables of several runs are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.errors import UserError
from llmrec.evaluation.compare import rank_column
from llmrec.evaluation.side_by_side import Measured
from llmrec.stages import RETRIEVER

Ranking = Literal["headline", "masked", "legacy"]
UNIMPORTANT = ("seed", "runs")


def read(folder: Path, ranking: Ranking = "headline") -> list[Measured]:
    """The systems of a finished run of `retrieve` (one) or `evaluate` (retriever, language models, fusion).

    Args:
        folder: of the run.
        ranking: of `retrieve`: headline (all items), masked (all but the user's history) or legacy (sampled negatives; no single
            users). `evaluate` has one ranking alone.

    Raises:
        UserError: the folder is no such run or was not ranked so, or its metrics.json is damaged.
    """
    made = runs.read_stage(folder)
    if made is None or made["stage"] not in ("retrieve", "evaluate"):
        what = "is no finished run" if made is None else f"is a run of {made['stage']}"
        raise UserError(f"{folder} {what}: give folders of retrieve or evaluate, as `llmrec runs` lists them")
    facts = _facts(folder)
    if made["stage"] == "retrieve":
        return [_retriever(folder, made, facts, ranking)]
    if ranking != "headline":
        raise UserError(f"{folder} is a run of evaluate, which has no {ranking} ranking: give runs of retrieve")
    return _systems(folder, made, facts)


def _retriever(folder: Path, made: Mapping[str, Any], facts: Mapping[str, Any], ranking: Ranking) -> Measured:
    card, none = facts["protocol"], np.array([], np.int32)
    if ranking == "headline":
        means, (users, ranks) = facts["test"], _ranks(folder / "per_user.parquet", "rank")
    elif ranking == "masked":
        means, (users, ranks) = facts["test_masked"], _ranks(folder / "candidates.parquet", "target_rank_masked")
        card = card | {"history_masked": True}
    elif "legacy" in facts:
        card, means, users, ranks = facts["legacy"]["protocol"], facts["legacy"]["test"], none, none
    else:
        raise UserError(f"{folder} was not measured against sampled negatives: make it with --retrieval.legacy uniform")
    return Measured(folder, _seedless(folder.name), made["seed"], _without_seed(made["settings"]), card, _numbers(means), users, ranks)


def _systems(folder: Path, made: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Measured]:
    config, found = made["config"], []
    for system, means in facts["overall"].items():
        name, settings = f"{_seedless(folder.name)}: {system}", config
        if system == "retriever":  # runs that share a retriever share its row, whatever ranks after it
            name = f"{Path(config['retriever']).name.removesuffix('.yaml')}: retriever"
            settings = {key: config[key] for key in RETRIEVER if key in config}
        users, ranks = _ranks(folder / "per_user.parquet", rank_column(system))
        card = facts["protocol"]
        found.append(Measured(folder, name, made["seed"], _without_seed(settings), card, _numbers(means), users, ranks))
    return found


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the run again with --force") from error


def _ranks(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Who was asked in the test split, in the file's order, and a column of ranks; both empty where that is not there."""
    try:
        table = pl.read_parquet(path) if path.is_file() else pl.DataFrame()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the run again with --force") from error
    if column not in table.columns:
        return np.array([], np.int32), np.array([], np.int32)
    test = table.filter(pl.col("split") == "test")
    return test["user"].to_numpy(), test[column].to_numpy()


def _seedless(name: str) -> str:
    return re.sub(r"\.seed\d+$", "", name)


def _without_seed(settings: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in settings.items() if key not in UNIMPORTANT}, sort_keys=True)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
