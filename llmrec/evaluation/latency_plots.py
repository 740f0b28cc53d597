"""Pictures of what a recommendation costs, as panels of `drawing`: quality against latency, and what a longer history costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from llmrec.evaluation.drawing import SERIES, Panel

MARKS = "osD^vPX*"
NAME_HEIGHT = 0.2  # inches below a picture for a row of names
Points = Mapping[str, Sequence[tuple[int, float]]]
"""Model -> lengths of histories and what was measured at them."""


def quality_against_latency(models: Mapping[str, Mapping[str, Any]], split: str) -> Panel:
    """HR@10 against the time of one user on a logarithmic axis, with 95 % intervals (arXiv 2408.05606, appendix B).

    Evaluations ask language models of fewer users than retrievers, and their time leaves their retriever's out: labels say both. The
    names stand below, where there is room for many, and the figure grows with them.

    Args:
        models: "models" of bench's metrics.json; those without metrics of the split are left out.
        split: "test", or "test_masked" where the history is masked.
    """

    def draw(ax: Axes) -> None:
        for number, (name, facts) in enumerate(models.items()):
            if split not in facts["metrics"]:
                continue
            one = facts["one"]
            low, high = one["ci95"] or (one["mean"], one["mean"])
            spread = [[one["mean"] - max(low, 0.1 * one["mean"])], [high - one["mean"]]]  # a logarithmic axis has no room for less
            ax.errorbar(
                [one["mean"]], [facts["metrics"][split]["hr@10"]], xerr=spread, capsize=3, label=_label(name, facts), **_look(number)
            )
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("seconds per user (logarithmic)")
        ax.set_ylabel("HR@10" + (", history masked" if split == "test_masked" else ""))
        ax.set_title("HR@10 against latency")
        names = ax.legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25)).get_texts()
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(figure.get_figheight() + NAME_HEIGHT * (len(names) + 1) / 2)

    return draw


def _label(name: str, facts: Mapping[str, Any]) -> str:
    if facts["kind"] == "ranker":
        in_two = name.replace(".", ".\n", 1)  # RETRIEVER.RANKER
        return f"{in_two}\n{facts['users_evaluated']:,} users, its own time"
    return f"{name}, {facts['users_evaluated']:,} users"


def latency_against_length(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    """Seconds of one user against the length of his history, both logarithmic: read as a whole, and dotted one event more.

    Args:
        sweeps: rows of `lengths` by model.
    """
    lines = {name: [(row["length"], row["mean"]) for row in rows] for name, rows in sweeps.items()}
    steps = {name: [(row["length"], row["step"]["mean"]) for row in rows if "step" in row] for name, rows in sweeps.items()}
    title = "Latency against history length" + ("\ndotted: one event more, from a kept state" if any(steps.values()) else "")
    return _against_length(lines, "seconds per user", title, steps)


def memory_against_length(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    """Peak memory of a training step with one window against its length, both logarithmic; where it was measured.

    Args:
        sweeps: rows of `lengths` by model.
    """
    lines = {
        name: [(row["length"], row["training_memory_mb"]) for row in rows if row["training_memory_mb"] is not None]
        for name, rows in sweeps.items()
    }
    return _against_length(lines, "MB above the process", "Memory of a training step")


def _against_length(lines: Points, label: str, title: str, steps: Points | None = None) -> Panel:
    def draw(ax: Axes) -> None:
        for number, (name, points) in enumerate(lines.items()):
            ax.plot([x for x, _ in points], [y for _, y in points], label=name, **_look(number) | {"linestyle": "-"})
            if steps and (stepwise := steps[name]):
                style = {"linestyle": ":", "markerfacecolor": "none"}
                ax.plot([x for x, _ in stepwise], [y for _, y in stepwise], label=f"_{name}, one event more", **_look(number) | style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        lengths = sorted({length for points in lines.values() for length, _ in points})
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("events in the history")
        ax.set_ylabel(label)
        ax.set_title(title)
        _legend(ax)

    return draw


def _look(number: int) -> dict[str, Any]:
    """Colours and markers in turn, so that a pair of them comes again only after all of their combinations."""
    mark = MARKS[(number + number // len(SERIES)) % len(MARKS)]
    return {"color": SERIES[number % len(SERIES)], "marker": mark, "markersize": 5, "linestyle": "none", "linewidth": 1.2}


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
