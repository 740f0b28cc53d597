"""The pictures of an evaluation's report, by section, from what lies in its folder and in those it rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.data.sequences import Sequences
from llmrec.evaluation import bias, compare, data_plots, latency_plots, latency_table, letter_plots, order_plots, plots, training_plots
from llmrec.evaluation.drawing import Picture
from llmrec.evaluation.slices import Slice
from llmrec.stages import finished

Ranks = Mapping[str, np.ndarray]
"""System -> 1-based rank of each test target among the candidates, 0 where it is not there, (users,)."""


def results(table: compare.Table) -> list[Picture]:
    """The headline metrics."""
    return [Picture("metrics", "What each step bought, with 95 % intervals; no bar can pass the bound", plots.metric_bars(table))]


def bound(facts: Mapping[str, Any], ranks: Ranks, users: pl.DataFrame, retrieve: Path) -> list[Picture]:
    """What the candidates allow.

    Args:
        facts: metrics.json of the evaluation.
        ranks: by system.
        users: `user, target` in the same order.
        retrieve: folder of the retriever.
    """
    column = "target_rank_masked" if facts["protocol"]["history_masked"] else "target_rank"
    listed = pl.read_parquet(retrieve / "candidates.parquet", columns=["user", "split", "target", column])
    listed = listed.filter(pl.col("split") == "test").unique(["user", "target"])
    full = users.join(listed, on=["user", "target"], how="left", maintain_order="left")[column].to_numpy()
    caption = "Share of users whose target is in a list of k; right of the dotted line, what more candidates would bring"
    return [Picture("bound", caption, plots.two_stage_bound(ranks, candidates(facts), full))]


def candidates(facts: Mapping[str, Any]) -> int:
    """N of the bound "hr@N"."""
    (name,) = facts["bound"]
    return int(name.removeprefix("hr@"))


def where(facts: Mapping[str, Any], ranks: Ranks, cuts: Mapping[str, list[Slice]]) -> list[Picture]:
    """Whom the ranker helps, and whether its answers can be trusted."""
    caption = (
        "Change in NDCG@10 against the retriever, with 95 % intervals: users cut at the quartiles of their history's length, and of the "
        "training events of their target"
    )
    before_after = plots.target_ranks(ranks["retriever"], ranks["fused"], candidates(facts))
    found = [
        Picture("slices", caption, plots.help_and_hurt(cuts)),
        Picture("ranks", "Where the target stood before and after, among users whose target was retrieved", before_after),
    ]
    if facts.get("calibration"):
        caption = "Is the language model as right as it is sure? On the dotted line it is"
        found.append(Picture("calibration", caption, letter_plots.reliability(facts["calibration"])))
    if facts.get("position_bias"):
        said = bias.sentence(facts["position_bias"])
        found.append(Picture("position", said[:1].upper() + said[1:], letter_plots.position_bias(facts["position_bias"])))
    return found


def order(retrieve: Path) -> list[Picture]:
    """What `llmrec order` found of this retriever, if it was asked: whether the order of a history matters at all."""
    folder = retrieve.parents[1] / "order" / retrieve.name
    if not finished.reads(folder, retrieve):
        return []
    found = runs.read_metrics(folder)
    return [Picture("order", f"The retriever with histories in another order. {found['verdict']}", order_plots.orders(found))]


def training(facts: Mapping[str, Any], inputs: Mapping[str, Path]) -> list[Picture]:
    """The fusion weight, and the curves of every stage that logged some."""
    fusion = facts["fusion"]
    curve = plots.weight_curve(fusion["curve"], fusion["weight"])
    found = [Picture("fusion", "Validation NDCG@10 against the language model's weight in the fused ranking", curve)]
    for name, folder in inputs.items():
        if rows := training_log(folder):
            found.append(Picture(name, f"Training: {name}", training_plots.training_curves(rows)))
    return found


def training_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a folder's train_log.jsonl; none where there is no such file."""
    path = folder / "train_log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def data(sequences: Sequences, events: np.ndarray, lengths: np.ndarray, shown: int) -> list[Picture]:
    """What the models were trained and asked on.

    Args:
        sequences: all users' events.
        events: training events by item id; element 0 is padding.
        lengths: events before each evaluated user's target.
        shown: how many of them a prompt shows at most.
    """
    panels = data_plots.popularity(events[1:]) + data_plots.history_lengths(lengths, shown)
    return [Picture("data", "How unevenly events fall on items, and how long histories are", panels)]


def latency(dataset: Path) -> list[Picture]:
    """Pictures of the newest finished benchmark of a data set; none where there is none."""
    made = {path.parent: runs.read_stage(path.parent) or {} for path in dataset.glob("bench/*/stage.json") if path.parent.name[0] != "."}
    if not made:
        return []
    folder = max(made, key=lambda folder: (made[folder]["made"], folder.name))
    facts = runs.read_metrics(folder)
    split = latency_table.split_of(facts["models"])
    found = [
        Picture(
            "latency",
            f"Quality against the time of one user on his own, from the benchmark {folder.name}",
            [latency_plots.quality_against_latency(facts["models"], split)],
        )
    ]
    if "lengths" in facts:
        panels = [latency_plots.latency_against_length(facts["lengths"]), latency_plots.memory_against_length(facts["lengths"])]
        found.append(Picture("lengths", "What a longer history costs, with random weights", panels))
    return found
