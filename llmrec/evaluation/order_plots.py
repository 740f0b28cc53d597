"""The picture of the order ablation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llmrec.evaluation.drawing import BLUE, GREY, Panel
from llmrec.evaluation.order import AS_IT_IS


def orders(found: Mapping[str, Any]) -> list[Panel]:
    """NDCG@10 of the histories in each order; the intervals are those of the differences to the histories as they are.

    Args:
        found: of `order.table`.
    """

    def draw(ax: Axes) -> None:
        names = list(found["variants"])
        means = np.array([found["variants"][name]["ndcg@10"] for name in names])
        ax.bar(names, means, color=[GREY if name == AS_IT_IS else BLUE for name in names], width=0.6)
        whole = found["variants"][AS_IT_IS]["ndcg@10"]
        for c in found["comparisons"]:
            if c["metric"] == "ndcg@10":
                low, high = (whole + bound for bound in c["ci95"])
                ax.plot([c["a"], c["a"]], [low, high], color="black", linewidth=1)
        ax.axhline(whole, color="black", linewidth=0.8, linestyle=":")
        ax.set_ylabel("test NDCG@10")
        ax.set_title("The same events in another order")

    return [draw]
