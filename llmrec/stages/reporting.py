"""The report of an evaluation, made from what lies in its folder and in those it rests on: at its end, or again by `llmrec report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.data.tables import load_sequences, load_statistics, load_titles
from llmrec.evaluation import compare
from llmrec.evaluation.drawing import png
from llmrec.evaluation.report import Context, Cost, write_report
from llmrec.evaluation.slices import slices
from llmrec.stages import pictures, samples

MEASURES = ("preference", "beyond_accuracy", "ties", "calibration", "position_bias")
"""What metrics.json may have beside the table."""


def write(folder: Path, inputs: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """Write report.html, and its pictures as PNG files, into an evaluation's folder.

    Args:
        folder: has metrics.json, per_user.parquet, rankings.parquet and, of rankers that write titles, queries.parquet.
        inputs: folder of each stage that the evaluation read.
        config: its settings, as in stage.json.
    """
    context = context_of(folder, inputs, config)
    for picture in [one for section in context.pictures.values() for one in section]:
        png(folder / f"{picture.name}.png", picture.panels)
    write_report(folder / "report.html", context)


def context_of(folder: Path, inputs: Mapping[str, Path], config: Mapping[str, Any]) -> Context:
    """What the report of an evaluation shows; arguments as in `write`."""
    facts = read_json(folder / "metrics.json")
    table: compare.Table = {key: facts[key] for key in compare.Table.__annotations__}  # type: ignore[assignment]
    ranks, users = target_ranks(folder)
    sequences = load_sequences(inputs["prepare"])
    shelf = samples.Shelf(load_titles(inputs["prepare"]), sequences, config["prompt"]["history"])
    ends = np.array([shelf.ends[case] for case in users.select("user", "target").iter_rows()])
    lengths = ends - sequences.offsets[users["user"].to_numpy()]
    events = sequences.training_counts()
    known = {"history length": lengths, "popularity of the target": events[users["target"].to_numpy()]}
    cuts = {name: slices(ranks, values, resamples=config["evaluation"]["resamples"], seed=config["seed"]) for name, values in known.items()}
    made = {name: runs.read_stage(its_folder) or {} for name, its_folder in inputs.items()}
    written = "catalogue" in facts
    return Context(
        title=title(inputs),
        verdict=facts["verdict"],
        table=table,
        pictures={
            "results": pictures.results(table),
            "bound": pictures.bound(facts, ranks, users, inputs["retrieve"]),
            "cost": pictures.latency(inputs["prepare"].parent),
            "where": pictures.where(facts, ranks, cuts) + pictures.order(inputs["retrieve"]),
            "training": pictures.training(facts, inputs),
            "data": pictures.data(sequences, events, lengths, config["prompt"]["history"]),
        },
        samples=samples.samples(samples.draw(pl.read_parquet(folder / "rankings.parquet"), config["seed"]), shelf),
        pairs=read_json(inputs["pairs"] / "metrics.json"),
        costs=[Cost(name, stage["seconds"], stage["peak_memory_mb"]) for name, stage in made.items()],
        protocol=facts["protocol"],
        data=load_statistics(inputs["prepare"]),
        weights=made["orpo"]["origin"].get("weights", config["base"]["id"]),
        recipe={name: stage["settings"] for name, stage in made.items()},
        latency=facts["latency"],
        slices=cuts,
        measures={name: facts[name] for name in MEASURES if facts.get(name)},
        catalogue=facts["catalogue"] if written else None,
        catalogue_cost=cost_of_queries(facts["catalogue"]) if written else "",
        query_samples=samples.query_samples(pl.read_parquet(folder / "queries.parquet"), shelf) if written else [],
    )


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def title(inputs: Mapping[str, Path]) -> str:
    """What an evaluation is called: "ml-100k: 2mamba4rec.llamarec-smollm2-135m"."""
    return f"{inputs['prepare'].parent.name}: {inputs['orpo'].name}"


def target_ranks(folder: Path) -> tuple[dict[str, np.ndarray], pl.DataFrame]:
    """Ranks of the test targets by system, and `user, target` in the same order."""
    ranks = pl.read_parquet(folder / "per_user.parquet").filter(pl.col("split") == "test")
    users = pl.read_parquet(folder / "rankings.parquet", columns=["user", "split", "target"]).filter(pl.col("split") == "test")
    columns = {system: compare.rank_column(system) for system in compare.SYSTEMS}
    return {system: ranks[column].to_numpy() for system, column in columns.items() if column in ranks.columns}, users.drop("split")


def cost_of_queries(facts: Mapping[str, Any]) -> str:
    """How fast queries are written, in a line, from "catalogue" of metrics.json."""
    speed = ", ".join(f"{name} {tokens:,.0f}" for name, tokens in facts["tokens_per_second"].items())
    return f"queries: {compare.duration(facts['seconds_per_user'])} for a user on his own; tokens/s of a process, prompts included: {speed}"
