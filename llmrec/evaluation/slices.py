"""Where a ranker helps and where it hurts: its difference to the retriever among users who are alike.

Users are cut at the quartiles of something known about them (how long their history is, how popular their target is). Within each
slice the difference in a metric is that of `significance.paired_bootstrap`. All evaluated users count, so the slices' differences,
weighted by their users, add up to the difference over all. The intervals are not corrected for the number of slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmrec.evaluation.metrics import per_user
from llmrec.evaluation.significance import Difference, paired_bootstrap


@dataclass(frozen=True)
class Slice:
    """Users whose value lies from `low` to `high`, both included, and what each system changes for them."""

    low: float
    high: float
    users: int
    base: float
    """Mean of the metric by the system compared with."""
    differences: dict[str, Difference]

    @property
    def span(self) -> str:
        """The values: "12 – 40", or "12"."""
        return f"{self.low:,g}" if self.low == self.high else f"{self.low:,g} – {self.high:,g}"


def slices(
    ranks: Mapping[str, np.ndarray],
    values: np.ndarray,
    systems: tuple[str, ...] = ("orpo", "fused"),
    against: str = "retriever",
    metric: str = "ndcg@10",
    parts: int = 4,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Slice]:
    """Cut the users at the quantiles of a value and compare systems within each part.

    Users of equal value stay together, so parts may differ in size, and there are fewer where few values differ.

    Args:
        ranks: 1-based rank of each user's target by system, (users,) each; 0 where it is not among the candidates.
        values: what the users are cut by, (users,) finite.
        systems: which of them to compare; those that `ranks` does not have are left out.
        against: the system to compare with.
        metric: a metric of `metrics.per_user`.
        parts: how many parts to aim at.
        resamples: bootstrap resamples behind each interval.
        seed: their seed.

    Returns:
        The parts that have users, by rising value.

    Raises:
        ValueError: when there are no users, or not one finite value for each.
    """
    values = np.asarray(values, dtype=np.float64)
    measured = {name: per_user(ranks[name])[metric] for name in (against, *systems) if name in ranks}
    if values.shape != measured[against].shape or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"need one finite value per user, got shape {values.shape} for {len(measured[against])} users")
    inner = np.quantile(values, np.arange(1, parts) / parts, method="inverted_cdf")
    part = np.searchsorted(inner, values)
    found = []
    for number in np.unique(part):
        of_part = part == number
        base = measured[against][of_part]
        differences = {name: paired_bootstrap(measured[name][of_part], base, resamples, seed) for name in systems if name in measured}
        found.append(Slice(float(values[of_part].min()), float(values[of_part].max()), int(of_part.sum()), float(base.mean()), differences))
    return found
