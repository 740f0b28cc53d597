"""What an evaluation found, as panels: the table, the bound, the fusion weight, where the target stood, where the ranker helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from llmrec.evaluation.compare import Table
from llmrec.evaluation.drawing import BLUE, COLOURS, GREY, MARKERS, ORANGE, Panel, look
from llmrec.evaluation.slices import Slice


def metric_bars(table: Table) -> list[Panel]:
    """HR@10 and NDCG@10 of every system over all users, with 95 % intervals, and the bound the candidates set on both."""
    return [_bars(table, metric) for metric in ("hr@10", "ndcg@10")]


def _bars(table: Table, metric: str) -> Panel:
    def draw(ax: Axes) -> None:
        bound = next(iter(table["bound"].values()))
        systems = list(table["overall"])
        means = np.array([table["overall"][name][metric] for name in systems])
        intervals = np.array([table["intervals"]["overall"][name][metric] for name in systems])
        labels = [f"{name}\n{mean:.4f}" for name, mean in zip(systems, means, strict=True)]
        ax.bar(labels, means, color=[COLOURS[name] for name in systems], width=0.65)
        ax.errorbar(labels, means, np.abs(intervals.T - means), fmt="none", ecolor="black", elinewidth=1, capsize=4)
        ax.axhline(bound, color="black", linewidth=0.8, linestyle=":")
        ax.set_ylim(0, 1.05 * max(bound, intervals.max()))
        ax.set_title(f"{metric.upper()}; dotted: the bound, {bound:.4f}")

    return draw


def two_stage_bound(ranks: Mapping[str, np.ndarray], candidates: int, full: np.ndarray | None = None) -> list[Panel]:
    """HR@k of every system for every k: they meet where k is the number of candidates, and none can pass what was retrieved.

    Args:
        ranks: 1-based rank of each user's target among the candidates by system, (users,) each; 0 where it is not there.
        candidates: how many candidates there are.
        full: rank of the same targets in the retriever's ranking of all items, to show what more candidates would bring.
    """

    def draw(ax: Axes) -> None:
        bound = float((ranks["retriever"] > 0).mean())
        ks = np.arange(1, candidates + 1)
        for name, rank in ranks.items():
            dashes = "--" if name == "retriever" else "-"
            style: dict[str, Any] = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 3, "linewidth": 1.2}
            ax.plot(ks, hit_rates(rank, candidates), label=name, linestyle=dashes, **style)
        last = candidates
        if full is not None:
            last = 2 * candidates
            beyond = np.arange(candidates, last + 1)
            more = np.maximum(hit_rates(full, last)[candidates - 1 :], bound)  # there ties in score count against the target
            ax.plot(beyond, more, color=GREY, linestyle="--", linewidth=1.2)
            ax.axvline(candidates, color="black", linewidth=0.8, linestyle=":")
        ax.axhline(bound, color="black", linewidth=0.8, linestyle=":")
        ax.annotate(f"bound {bound:.4f}", (1, bound), textcoords="offset points", xytext=(0, 3), fontsize=8)
        ax.set_ylim(0)
        ax.set_xlim(0.5, last + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("k: length of the list that is shown")
        ax.set_ylabel("share of users whose target is in it")
        ax.legend(loc="lower right")
        ax.set_title("HR@k")

    return [draw]


def hit_rates(rank: np.ndarray, last: int) -> np.ndarray:
    """HR@k for k = 1..last, (last,); rank 0 is a miss at every k."""
    return np.cumsum(np.bincount(rank[(rank > 0) & (rank <= last)], minlength=last + 1)[1:]) / len(rank)


def hit_rate_curves(curves: Sequence[np.ndarray]) -> list[Panel]:
    """HR@k of several systems in one panel, each drawn with its `look`; the page names them.

    Args:
        curves: `hit_rates` of each.
    """

    def draw(ax: Axes) -> None:
        for number, values in enumerate(curves):
            colour, dashes = look(number)
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=dashes, linewidth=1.4)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(0)
        ax.set_xlabel("k")
        ax.set_title("HR@k")

    return [draw]


def weight_curve(curve: Sequence[tuple[float, float]], weight: float) -> list[Panel]:
    """Validation NDCG@10 against the fusion weight, the chosen weight marked.

    Args:
        curve: (weight, NDCG@10), as `rankers.fusion.choose_weight` returns it.
        weight: the weight chosen.
    """

    def draw(ax: Axes) -> None:
        weights, values = np.array(curve).T
        ax.plot(weights, values, color=BLUE, marker="o", markersize=3)
        ax.plot([weight], [values[np.argmin(np.abs(weights - weight))]], color=ORANGE, marker="D", markersize=8, linestyle="none")
        ax.axvline(weight, color=ORANGE, linewidth=0.8, linestyle="--")
        ax.set_xlabel("weight: 0 retriever alone, 1 language model alone")
        ax.set_ylabel("validation NDCG@10")
        ax.set_title(f"Chosen weight {weight:.2f}")

    return [draw]


def target_ranks(before: np.ndarray, after: np.ndarray, candidates: int) -> list[Panel]:
    """Where the target stood among the candidates, in the retriever's and in the fused ranking.

    Args:
        before: ranks by the retriever, (users,); users with rank 0, whose target is not there, are left out.
        after: fused ranks of the same users.
        candidates: length of the candidate lists.
    """

    def draw(ax: Axes) -> None:
        ranks = np.arange(1, candidates + 1)
        for rank, shift, name in ((before, -0.2, "retriever"), (after, 0.2, "fused")):
            users = np.bincount(rank[rank > 0], minlength=candidates + 1)[1:]
            ax.bar(ranks + shift, users, width=0.4, label=name, color=COLOURS[name])
        ax.set_xticks([rank for rank in ranks if rank == 1 or rank % 5 == 0])
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("rank of the target (1 is best)")
        ax.set_ylabel("users")
        ax.legend()
        ax.set_title("Where a retrieved target stood")

    return [draw]


def help_and_hurt(cuts: Mapping[str, Sequence[Slice]], metric: str = "NDCG@10") -> list[Panel]:
    """What each system changes against the retriever among users who are alike, with 95 % intervals, a panel for each way to cut.

    Args:
        cuts: what users are cut by -> its slices.
        metric: what was compared, to label the axis.
    """
    return [_cut(name, parts, metric) for name, parts in cuts.items()]


def _cut(name: str, parts: Sequence[Slice], metric: str) -> Panel:
    def draw(ax: Axes) -> None:
        at = np.arange(len(parts))
        systems = list(parts[0].differences)
        for number, system in enumerate(systems):
            found = [part.differences[system] for part in parts]
            means = np.array([d.difference for d in found])
            around = np.array([[d.difference - d.low for d in found], [d.high - d.difference for d in found]])
            shift = 0.24 * (number - (len(systems) - 1) / 2)
            style: dict[str, Any] = {"color": COLOURS[system], "marker": MARKERS[system], "markersize": 5, "elinewidth": 1.2, "capsize": 3}
            ax.errorbar(at + shift, means, np.maximum(around, 0), linestyle="none", label=system, **style)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xlim(-0.6, len(parts) - 0.4)
        ax.set_xticks(at, [f"{part.span}\n{part.users:,} users" for part in parts])
        ax.set_ylabel(f"change in {metric}")
        ax.legend()
        ax.set_title(f"By {name}")

    return draw
