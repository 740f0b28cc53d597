"""Whether a ranker that picks letters can be trusted, as panels: is it as right as it is sure, and does the place in the list matter?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llmrec.evaluation.calibration import Calibration
from llmrec.evaluation.drawing import BLUE, COLOURS, MARKERS, Panel


def reliability(systems: Mapping[str, Calibration]) -> list[Panel]:
    """Share of users whose target is the first choice against the probability it was given; on the diagonal the model is as right as sure.

    Args:
        systems: "calibration" of metrics.json.
    """

    def draw(ax: Axes) -> None:
        highest = max(max(b["confidence"], b["accuracy"]) for found in systems.values() for b in found["bins"])
        ax.plot([0, highest], [0, highest], color="black", linewidth=0.8, linestyle=":")
        for name, found in systems.items():
            points = np.array([(b["confidence"], b["accuracy"]) for b in found["bins"]])
            label = f"{name}, ECE {found['ece']:.3f}"
            ax.plot(*points.T, color=COLOURS[name], marker=MARKERS[name], markersize=4, linewidth=1.2, label=label)
        ax.set_xlabel("probability of the first choice")
        ax.set_ylabel("share of users who took it")
        ax.legend()
        ax.set_title("Calibration")

    return [draw]


def position_bias(found: Mapping[str, Any]) -> list[Panel]:
    """How often each letter is the first choice, and NDCG@10 of each order in which the same candidates were shown, if there are several.

    Args:
        found: "position_bias" of metrics.json.
    """
    letters = _letters(found["letters"], shuffled=found["p"] is not None)
    return [letters, _orders(found["ndcg@10_per_order"])] if found["orders"] > 1 else [letters]


def _letters(chosen: Mapping[str, float], *, shuffled: bool) -> Panel:
    def draw(ax: Axes) -> None:
        shares = np.array(list(chosen.values())) / sum(chosen.values())
        ax.bar(list(chosen), shares, color=BLUE, width=0.7)
        if shuffled:
            ax.axhline(1 / len(shares), color="black", linewidth=0.8, linestyle=":", label="no preference")
            ax.legend()
        ax.set_xlabel("letter")
        ax.set_ylabel("share of first choices")
        ax.set_title("Letters chosen")

    return draw


def _orders(ndcg: Sequence[float]) -> Panel:
    def draw(ax: Axes) -> None:
        ax.plot(np.arange(1, len(ndcg) + 1), ndcg, color=BLUE, marker="o", markersize=5, linestyle="none")
        ax.axhline(float(np.mean(ndcg)), color="black", linewidth=0.8, linestyle=":", label=f"mean {np.mean(ndcg):.4f}")
        ax.set_xticks(np.arange(1, len(ndcg) + 1))
        ax.set_ylim(0, 1.2 * max(*ndcg, 1e-9))
        ax.set_xlabel("random order of the same candidates")
        ax.set_ylabel("NDCG@10")
        ax.legend(loc="lower right")
        ax.set_title("Does the order matter?")

    return draw
