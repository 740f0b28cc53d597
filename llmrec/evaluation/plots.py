"""The pictures of the report, as PNG files.

Okabe and Ito's colours, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color), and different
markers or hatches where colour alone would carry the meaning. Figures are made without pyplot: no global state and no display.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmrec.evaluation.compare import Table

COLOURS = {"retriever": "#7f7f7f", "sft": "#56B4E9", "orpo": "#0072B2", "fused": "#D55E00"}
BLUE, ORANGE, GREY = COLOURS["orpo"], COLOURS["fused"], COLOURS["retriever"]

# What TRL logs, and what it is called here; a plot has one panel for each that was logged.
CURVES = {
    "loss": "loss",
    "nll_loss": "NLL of the chosen answer",
    "log_odds_chosen": "log odds ratio, chosen to rejected",
    "rewards/margins": "margin (beta x log-probabilities)",
    "rewards/accuracies": "share of pairs in the right order",
    "valid_ndcg@10": "NDCG@10 on validation prompts",
}


def metric_bars(path: Path, table: Table) -> None:
    """HR@10 and NDCG@10 of every system over all users, with 95 % intervals, and the bound the candidates set on both."""
    figure, axes = _panels(2)
    bound = next(iter(table["bound"].values()))
    for ax, metric in zip(axes, ("hr@10", "ndcg@10"), strict=True):
        systems = list(table["overall"])
        means = np.array([table["overall"][name][metric] for name in systems])
        intervals = np.array([table["intervals"]["overall"][name][metric] for name in systems])
        labels = [f"{name}\n{mean:.4f}" for name, mean in zip(systems, means, strict=True)]
        ax.bar(labels, means, color=[COLOURS[name] for name in systems], width=0.65)
        ax.errorbar(labels, means, np.abs(intervals.T - means), fmt="none", ecolor="black", elinewidth=1, capsize=4)
        ax.axhline(bound, color="black", linewidth=0.8, linestyle=":")
        ax.annotate(
            "bound", (1, bound), xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(-2, 3), ha="right", fontsize=8
        )
        ax.set_ylim(0, 1.12 * max(bound, intervals.max()))
        ax.set_title(metric.upper())
    _save(figure, path)


def weight_curve(path: Path, curve: Sequence[tuple[float, float]], weight: float) -> None:
    """Validation NDCG@10 against the fusion weight, the chosen weight marked.

    Args:
        path: PNG file to write.
        curve: (weight, NDCG@10), as `rankers.fusion.choose_weight` returns it.
        weight: the weight chosen.
    """
    figure, (ax,) = _panels(1)
    weights, values = np.array(curve).T
    ax.plot(weights, values, color=BLUE, marker="o", markersize=3)
    ax.plot([weight], [values[np.argmin(np.abs(weights - weight))]], color=ORANGE, marker="D", markersize=8, linestyle="none")
    ax.axvline(weight, color=ORANGE, linewidth=0.8, linestyle="--")
    ax.set_xlabel("weight of the language model: 0 retriever alone, 1 language model alone")
    ax.set_ylabel("validation NDCG@10")
    ax.set_title(f"Chosen weight {weight:.2f}")
    _save(figure, path)


def training_curves(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Loss, odds ratio and margins over the steps of one training.

    Args:
        path: PNG file to write.
        rows: lines of train_log.jsonl; each has "step", and any of the names in `CURVES`.

    Raises:
        ValueError: when no row has any of them.
    """
    names = [name for name in CURVES if any(name in row for row in rows)]
    if not names:
        raise ValueError(f"the training log has none of {', '.join(CURVES)}")
    figure, axes = _panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        points = np.array([(row["step"], row[name]) for row in rows if name in row])
        ax.plot(*points.T, color=BLUE, linewidth=1.2, marker="o" if len(points) < 30 else None, markersize=3)
        ax.set_title(CURVES[name])
        ax.set_xlabel("step")
    _save(figure, path)


def target_ranks(path: Path, before: np.ndarray, after: np.ndarray, candidates: int) -> None:
    """Where the target stood among the candidates, in the retriever's and in the fused ranking.

    Args:
        path: PNG file to write.
        before: ranks by the retriever, (users,); users with rank 0, whose target is not there, are left out.
        after: fused ranks of the same users.
        candidates: length of the candidate lists.
    """
    figure, (ax,) = _panels(1)
    ranks = np.arange(1, candidates + 1)
    for rank, shift, name, hatch in ((before, -0.2, "retriever", ""), (after, 0.2, "fused", "//")):
        users = np.bincount(rank[rank > 0], minlength=candidates + 1)[1:]
        ax.bar(ranks + shift, users, width=0.4, label=name, color=COLOURS[name], hatch=hatch, edgecolor="white", linewidth=0)
    ax.set_xticks(ranks)
    ax.set_xlabel("rank of the target (1 is best)")
    ax.set_ylabel("users")
    ax.legend(frameon=False)
    ax.set_title("Where the target stood, of users whose target is among the candidates")
    _save(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, two a row."""
    columns, rows = min(2, count), (count + 1) // 2
    figure = Figure(figsize=(8, 3.4 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG beside its place, then rename: a picture is whole or absent."""
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)
