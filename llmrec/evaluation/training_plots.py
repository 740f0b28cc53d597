"""The course of a training, as panels: what its train_log.jsonl has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from llmrec.evaluation.drawing import BLUE, Panel, look

# What TRL logs, and what it is called here; there is a panel for each that was logged.
CURVES = {
    "loss": "loss",
    "nll_loss": "NLL of the chosen answer",
    "log_odds_chosen": "log odds ratio, chosen to rejected",
    "rewards/margins": "margin (beta x log-probabilities)",
    "rewards/accuracies": "share of pairs in the right order",
    "valid_ndcg@10": "NDCG@10 on validation prompts",
}
NEUTRAL = {"log_odds_chosen": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5}
"""Where chosen and rejected answers are told apart no better than by a coin."""
POINTS = 200

Rows = Sequence[Mapping[str, float]]
"""Lines of train_log.jsonl; each has "step", and any of the names in `CURVES`."""


def training_curves(rows: Rows) -> list[Panel]:
    """Loss, odds ratio and margins over the steps of one training; of long ones means of neighbouring steps.

    Raises:
        ValueError: when no row has any of them.
    """
    names = [name for name in CURVES if any(name in row for row in rows)]
    if not names:
        raise ValueError(f"the training log has none of {', '.join(CURVES)}")
    return [_curves(name, [rows]) for name in names]


def overlaid_curves(trainings: Sequence[Rows]) -> list[Panel]:
    """The same of several trainings, each drawn with its `look`; the page names them. One that logged nothing has no line."""
    every = [row for rows in trainings for row in rows]
    return [_curves(name, trainings) for name in CURVES if any(name in row for row in every)]


def _curves(name: str, trainings: Sequence[Rows]) -> Panel:
    def draw(ax: Axes) -> None:
        for number, rows in enumerate(trainings):
            points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=np.float64).reshape(-1, 2)
            if not len(points):
                continue
            colour, dashes = look(number) if len(trainings) > 1 else (BLUE, "solid")
            marker = "o" if len(points) < 30 else None
            ax.plot(*thinned(points).T, color=colour, linestyle=dashes, linewidth=1.2, marker=marker, markersize=3)
        if name in NEUTRAL:
            ax.axhline(NEUTRAL[name], color="black", linewidth=0.8, linestyle=":")
        ax.set_title(CURVES[name])
        ax.set_xlabel("step")

    return draw


def thinned(points: np.ndarray) -> np.ndarray:
    """At most `POINTS` points: means of equally many neighbours, (points, 2) -> (fewer, 2)."""
    if len(points) <= POINTS:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, POINTS)])
