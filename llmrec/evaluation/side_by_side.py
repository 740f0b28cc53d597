"""Systems of several runs in one table, with their protocol: what may stand side by side, and what differs.

Published tables mix protocols without saying so. Here rows whose protocol cards differ, or that asked different users, are refused, or,
on request, shown with the differing fields as columns. Runs that differ by their seed alone become one row. Every row is tested against
one of them over the same users, where they were measured alike, and Holm's correction covers the whole table.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import UserError
from llmrec.evaluation.compare import Comparison, compared
from llmrec.evaluation.metrics import by_user, per_user
from llmrec.evaluation.protocol import ProtocolCard
from llmrec.evaluation.significance import OverSeeds, over_seeds

METRICS = ("hr@10", "ndcg@10", "mrr@10")
FROM_RANKS = ("hr@", "ndcg@", "mrr@")
"""Metrics that follow from the target's rank, so that single users' values are at hand for a test."""
NOT_PROTOCOL = ("seed", "ambiguous_targets")
"""Fields of the card that are not compared: rows may differ by the seed, and the other follows from data, tie rule and users."""
USERS_ASKED = "users_asked"
"""A field beside those of the card: a fingerprint of who was asked, where that is known."""
YOUNGER = {field.name: field.default for field in fields(ProtocolCard) if field.default is not MISSING}
"""Fields that older cards lack, and what they mean there."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Measured:
    """One system of one finished run.

    Attributes:
        folder: the run folder.
        name: without the seed: "sasrec", "sasrec.llamarec: orpo".
        seed: the run's.
        made_by: everything but the seed that decided the result, as text.
        protocol: the protocol card.
        metrics: means over the users, fractions.
        users: who was asked, one entry per case, (cases,) int; empty where that is not known.
        ranks: where the target stood, 0 for a miss, (cases,) int.
    """

    folder: Path
    name: str
    seed: int
    made_by: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, float]
    users: np.ndarray
    ranks: np.ndarray

    @property
    def card(self) -> dict[str, Any]:
        """What must be the same before two numbers may stand in one table."""
        younger = {field: value for field, value in YOUNGER.items() if field not in self.protocol}
        found = {field: value for field, value in {**self.protocol, **younger}.items() if field not in NOT_PROTOCOL}
        return found | ({USERS_ASKED: hashlib.sha256(self.users.astype("<i8").tobytes()).hexdigest()[:12]} if len(self.users) else {})


@dataclass(frozen=True)
class Row:
    """One system, over all its seeds.

    Attributes:
        name: no other row of the table has it.
        runs: one per seed.
        values: metric -> mean and standard deviation over the seeds, fractions.
    """

    name: str
    runs: tuple[Measured, ...]
    values: Mapping[str, OverSeeds]

    @property
    def card(self) -> dict[str, Any]:
        """The protocol, but for the seed."""
        return self.runs[0].card

    @property
    def seeds(self) -> list[int]:
        """In the order of the runs."""
        return [run.seed for run in self.runs]

    def of_users(self, metric: str) -> np.ndarray:
        """A metric of each user, as the mean over his cases and the seeds, (users,)."""
        k = int(metric.split("@")[1])
        cases = np.mean([per_user(run.ranks, (k,))[metric] for run in self.runs], axis=0)
        return by_user(cases, self.runs[0].users)


@dataclass(frozen=True)
class SideBySide:
    """The table.

    Attributes:
        rows: in the order given.
        metrics: the columns.
        shared: what the protocol cards have in common.
        differing: the fields in which they differ.
        against: name of the row that the others are tested against.
        comparisons: each of the others with it, where a test is possible.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    shared: Mapping[str, Any]
    differing: tuple[str, ...]
    against: str
    comparisons: tuple[Comparison, ...]

    def comparison(self, row: Row, metric: str) -> Comparison | None:
        """How a row compares, if that was tested."""
        return next((c for c in self.comparisons if (c["a"], c["metric"]) == (row.name, metric)), None)


def over_all_seeds(measured: Sequence[Measured]) -> list[Row]:
    """One row per system: runs that differ by their seed alone are aggregated, the same run met again is taken once.

    Raises:
        UserError: two runs with the same settings and seed that gave different results.
    """
    systems: dict[tuple[str, str, str], list[Measured]] = {}
    for run in measured:
        others = systems.setdefault((run.name, run.made_by, str(run.card)), [])
        same = next((other for other in others if other.seed == run.seed), None)
        if same is None:
            others.append(run)
        elif same.metrics != run.metrics:
            raise UserError(f"{same.folder} and {run.folder} have the same settings and seed and different results: give one of them")
    names = Counter(name for name, *_ in systems)
    rows = []
    for (name, *_), found in systems.items():
        known = [metric for metric in found[0].metrics if all(metric in run.metrics for run in found)]
        values = {metric: over_seeds([run.metrics[metric] for run in found]) for metric in known}
        rows.append(Row(name if names[name] == 1 else f"{name} ({found[0].folder})", tuple(found), values))
    return rows


def table(rows: Sequence[Row], metrics: Sequence[str] = METRICS, *, against: str | None = None, mix: bool = False) -> SideBySide:
    """Put rows side by side and test each against one of them, seeds averaged.

    Args:
        rows: at least one.
        metrics: the columns.
        against: name of the row to test against; the first when None.
        mix: allow rows that were measured by different protocols.

    Raises:
        UserError: protocols differ and `mix` is not set, or a row lacks a metric.
    """
    known = dict.fromkeys(field for row in rows for field in row.card)
    differing = tuple(field for field in known if len({text(row.card, field) for row in rows if _says(row, field)}) > 1)
    if differing and not mix:
        raise UserError(_refusal(rows, differing))
    for row in rows:
        for metric in metrics:
            if metric not in row.values:
                raise UserError(f"{row.runs[0].folder} has no metric '{metric}' of {row.name}: it has {', '.join(row.values)}")
    base = next((row for row in rows if row.name == against), rows[0])
    alike = [row for row in rows if row is not base and _same_users(row, base)]
    tested = [metric for metric in metrics if metric.startswith(FROM_RANKS)]
    of_users = {row.name: {metric: row.of_users(metric) for metric in tested} for row in [base, *alike]} if alike else {}
    comparisons = compared(of_users, [(row.name, base.name) for row in alike], tested, RESAMPLES, seed=0)
    shared = {field: next(row.card[field] for row in rows if field in row.card) for field in known if field not in differing}
    return SideBySide(tuple(rows), tuple(metrics), shared, differing, base.name, tuple(comparisons))


def text(card: Mapping[str, Any], field: str) -> str:
    """A field of a protocol card in words."""
    value = card.get(field, "not recorded")
    if field == "data_fingerprint":  # of what the tables were made from; what came out may follow behind a colon
        return str(value).split(":")[0][:12]
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _says(row: Row, field: str) -> bool:
    """Whether a row has a say in what differs: not where nobody knows who was asked."""
    return field != USERS_ASKED or field in row.card


def _same_users(row: Row, base: Row) -> bool:
    """Whether all runs of both asked the same users, known one by one, by the same protocol."""
    users = base.runs[0].users
    known = len(users) > 0 and all(np.array_equal(run.users, users) for run in [*row.runs, *base.runs])
    return known and all(text(row.card, field) == text(base.card, field) for field in {**row.card, **base.card})


def _refusal(rows: Sequence[Row], differing: Sequence[str]) -> str:
    first = rows[0]
    other = next(row for row in rows if any(text(row.card, field) != text(first.card, field) for field in differing))
    values = [(field, text(first.card, field), text(other.card, field)) for field in differing]
    named = "; ".join(f"{field}: {ours} / {theirs}" for field, ours, theirs in values if ours != theirs)
    return (
        f"{first.runs[0].folder} and {other.runs[0].folder} were not measured alike ({named}). Give runs of one protocol, or pass --mix "
        "to have what differs as columns, and no test across it"
    )
