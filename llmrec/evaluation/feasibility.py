"""Can these printed metrics belong together? Bounds between HR, NDCG and MRR when one item per user is right.

Let p_r be the share of users whose target stands at rank r; the rest, 1 - sum p_r, missed. Every metric of `metrics` is linear in p:

    HR@k = sum_{r<=k} p_r      MRR@k = sum_{r<=k} p_r / r      NDCG@k = sum_{r<=k} p_r / log2(r + 1)

So a row of a table is possible exactly when some p >= 0 with sum p_r <= 1 gives every one of its cells a value that rounds to what is
printed: one linear program over all cells at once, with half a unit of the last printed place to either side. Nothing sharper can be
said without the number of users. What it implies, among other things:

One cut-off. The points (1/r, 1/log2(r + 1)) lie on y = 1/log2(1 + 1/x). This curve is concave: with u = ln(1 + 1/x) its slope is
ln 2 / (x (x + 1) u^2), and x (x + 1) u^2 grows because u = integral of 1/t from x to x + 1 > 1/(x + 1/2), the integrand being convex.
(MRR/HR, NDCG/HR) is a weighted mean of the points of ranks 1..k, so NDCG/HR lies between the chord from rank k to rank 1 and the
broken line through all k points, both taken at MRR/HR. Hence HR >= NDCG >= MRR, with equality at k = 1.

Two cut-offs a < b. What comes in between stands at ranks a + 1 .. b, so HR@b - HR@a = d >= 0 forces
d / log2(b + 1) <= NDCG@b - NDCG@a <= d / log2(a + 2) and d / b <= MRR@b - MRR@a <= d / (a + 1).

Means over seeds, data sets or groups of users obey the same bounds (the mean of distributions is one). The scale does not matter
either, but for sum p_r <= 1: a percentage read as a fraction contradicts itself only above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import combinations

import numpy as np
from scipy.optimize import linprog

LAST_RANK = 10_000
"""The largest cut-off that is checked: the program has a variable for each rank."""
TOLERANCE = 1e-9
"""Contradictions by less than this, as a fraction, are put down to arithmetic."""
PRECISION = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
NAMED_FIRST = ("hr", "mrr", "ndcg")
"""Of contradicting cells, the one whose metric comes last here is said to be out of bounds."""


@dataclass(frozen=True)
class Cell:
    """One printed number.

    Attributes:
        name: the column as printed, "NDCG@10".
        metric: "hr", "mrr" or "ndcg".
        k: cut-off, 1 to `LAST_RANK`.
        value: the number as printed; its last digit says how far it was rounded.
        percent: whether it is a percentage rather than a fraction.
    """

    name: str
    metric: str
    k: int
    value: Decimal
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.value}"

    @property
    def decimals(self) -> int:
        """Printed digits after the point."""
        return -int(self.value.as_tuple().exponent)

    @property
    def scale(self) -> float:
        """What a fraction is multiplied with to be printed."""
        return 100.0 if self.percent else 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that rounds to the printed value, as fractions."""
        half = Decimal(5).scaleb(-self.decimals - 1)
        return float(self.value - half) / self.scale, float(self.value + half) / self.scale

    def gains(self, ranks: np.ndarray) -> np.ndarray:
        """What a user whose target stands at each of `ranks` adds to the metric."""
        gain = {"hr": np.ones(len(ranks)), "mrr": 1 / ranks, "ndcg": 1 / np.log2(ranks + 1)}[self.metric]
        return np.where(ranks <= self.k, gain, 0.0)


@dataclass(frozen=True)
class Contradiction:
    """Cells that no ranking gives together.

    Attributes:
        cell: the one that is out of bounds.
        others: the cells that set the bounds; without any one of them there is no contradiction.
        low: the least that `others` allow `cell`, in its printed unit.
        high: the most.
    """

    cell: Cell
    others: tuple[Cell, ...]
    low: float
    high: float

    def __str__(self) -> str:
        below = float(self.cell.value) < self.low
        step = Decimal(1).scaleb(-self.cell.decimals - 1)
        exact = Decimal(str(round(self.low if below else self.high, max(6, self.cell.decimals + 2))))
        bound = exact.quantize(min(step, Decimal("0.01")), ROUND_FLOOR if below else ROUND_CEILING)
        names = " and ".join(part for part in (", ".join(map(str, self.others[:-1])), *map(str, self.others[-1:])) if part)
        verb = "allows" if len(self.others) == 1 else "allow"
        allowed = f"that {names} {verb}" if names else "there can be"
        return f"{self.cell} is {'below' if below else 'above'} {bound}, the {'least' if below else 'most'} {allowed}"


def contradiction(cells: Sequence[Cell]) -> Contradiction | None:
    """The smallest set of cells that contradict each other, or None where some ranking gives them all.

    Args:
        cells: the printed metrics of one system, measured on the same users with one right item each.

    Raises:
        ValueError: for a cut-off outside 1..`LAST_RANK`.
    """
    for cell in cells:
        if not 1 <= cell.k <= LAST_RANK:
            raise ValueError(f"{cell.name}: the cut-off must lie between 1 and {LAST_RANK}")
    if not cells or _distance(cells) <= TOLERANCE:
        return None
    smallest = _smallest(cells)
    cell = max(smallest, key=lambda cell: (NAMED_FIRST.index(cell.metric), cell.k))
    others = tuple(other for other in smallest if other is not cell)
    low, high = _range(cell, others)
    return Contradiction(cell, others, low * cell.scale, high * cell.scale)


def _smallest(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """A set of contradicting cells than which none is smaller."""
    kept = list(cells)
    for cell in cells:  # leave out what is not needed: as many as are left will do, but fewer may
        without = [other for other in kept if other is not cell]
        if without and _distance(without) > TOLERANCE:
            kept = without
    for size in range(1, len(kept)):
        for subset in combinations(cells, size):
            if _distance(subset) > TOLERANCE:
                return subset
    return tuple(kept)


def _distance(cells: Sequence[Cell]) -> float:
    """By how much the intervals must be widened, all alike, until some distribution of ranks lies in all of them."""
    gains, low, high = _program(cells)
    widening = np.ones((len(cells), 1))
    inequalities = np.vstack([np.hstack([gains, -widening]), np.hstack([-gains, -widening]), _total(gains.shape[1] + 1, free=1)])
    objective = np.zeros(gains.shape[1] + 1)
    objective[-1] = 1
    return _minimum(objective, inequalities, np.concatenate([high, -low, [1.0]]))


def _range(cell: Cell, others: Sequence[Cell]) -> tuple[float, float]:
    """The least and the most of `cell` over all distributions of ranks that give `others`."""
    gains, low, high = _program([cell, *others])
    inequalities = np.vstack([gains[1:], -gains[1:], _total(gains.shape[1])])
    slack = 2 * TOLERANCE  # `others` were judged possible up to one
    limits = np.concatenate([high[1:] + slack, slack - low[1:], [1.0]])
    return _minimum(gains[0], inequalities, limits), -_minimum(-gains[0], inequalities, limits)


def _program(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each cell's coefficients of p, (cells, ranks), and its bounds, (cells,) each."""
    ranks = np.arange(1, max(cell.k for cell in cells) + 1)
    low, high = zip(*(cell.bounds for cell in cells), strict=True)
    return np.stack([cell.gains(ranks) for cell in cells]), np.array(low), np.array(high)


def _total(variables: int, free: int = 0) -> np.ndarray:
    """Coefficients of sum p_r, (1, variables); the last `free` variables are no shares."""
    return np.where(np.arange(variables) < variables - free, 1.0, 0.0)[None]


def _minimum(objective: np.ndarray, inequalities: np.ndarray, limits: np.ndarray) -> float:
    solved = linprog(objective, A_ub=inequalities, b_ub=limits, bounds=(0, None), method="highs", options=PRECISION)
    if solved.status != 0:
        raise ArithmeticError(f"the linear program was not solved: {solved.message}")
    return float(solved.fun)
