"""The data that was evaluated on, as panels: how unevenly events fall on items, and how long histories are."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullLocator

from llmrec.evaluation.drawing import BLUE, ORANGE, Panel

POINTS = 150


def popularity(events: np.ndarray) -> list[Panel]:
    """Events of each item by its place in the order of popularity, both axes logarithmic, and the share of the top fifth.

    Args:
        events: training events of each item, (items,) int; items without any are counted in the title.
    """

    def draw(ax: Axes) -> None:
        falling = np.sort(events[events > 0])[::-1]
        places = np.unique(np.geomspace(1, len(falling), POINTS).round().astype(int))
        ax.plot(places, falling[places - 1], color=BLUE, linewidth=1.4)
        fifth = max(1, len(events) // 5)
        ax.axvline(fifth, color=ORANGE, linewidth=0.8, linestyle="--")
        share = falling[:fifth].sum() / falling.sum()
        label = f"a fifth of the items\nhas {share:.0%} of the events"
        ax.annotate(label, (fifth, falling[-1]), textcoords="offset points", xytext=(-4, 0), ha="right", fontsize=8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        _label(ax.xaxis, 1, len(events))
        _label(ax.yaxis, falling[-1], falling[0])
        ax.set_xlabel("items by popularity")
        ax.set_ylabel("training events of the item")
        ax.set_title(f"{len(events):,} items, {(events == 0).sum():,} without training events")

    return [draw]


def history_lengths(lengths: np.ndarray, shown: int) -> list[Panel]:
    """Users by number of events before the target, in bins that grow with the length.

    Args:
        lengths: events before each evaluated user's target, (users,) int, at least 1 each.
        shown: how many of them the language model may see at most.
    """

    def draw(ax: Axes) -> None:
        edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, 25).round())
        if len(edges) < 2:
            edges = np.array([lengths.min(), lengths.max() + 1])
        ax.hist(lengths, bins=edges.tolist(), color=BLUE)
        ax.axvline(shown, color=ORANGE, linewidth=0.8, linestyle="--", label=f"the prompt shows at most {shown}")
        ax.axvline(np.median(lengths), color="black", linewidth=0.8, linestyle=":", label=f"median {np.median(lengths):,.0f}")
        ax.set_xscale("log")
        _label(ax.xaxis, min(shown, lengths.min()), max(shown, lengths.max()))
        ax.set_xlabel("events before the target")
        ax.set_ylabel("users")
        ax.legend()
        ax.set_title("History lengths of the evaluated users")

    return [draw]


def _label(axis: Axis, low: float, high: float) -> None:
    """Whole numbers as labels of a logarithmic axis: 1, 2, 5, 10 … where that is not too many, else powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
