"""Are the ranks of a run better than its scores allow, or its metrics better than its ranks?

Ties count against the target everywhere: a target that ranks first among equal scores would be found by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from llmrec.evaluation import metrics
from llmrec.evaluation.leaks import TOLERANCE, Verdict


def ranks_of_the_model(ranks: np.ndarray, scores: np.ndarray, users: np.ndarray, targets: np.ndarray) -> Verdict:
    """Whether recorded ranks are better than those that the model's scores give today, ties against the target.

    Scores that differ by rounding alone are let pass; scores that are equal to the last bit are ties.

    Args:
        ranks: as recorded, 1-based, (rows,).
        scores: of all items, (rows, items).
        users: (rows,).
        targets: (rows,).
    """
    own = scores[np.arange(len(targets)), targets - 1][:, None]
    beyond = own + TOLERANCE * scores.std(axis=1, keepdims=True)
    least = (scores > beyond).sum(axis=1) + (scores == own).sum(axis=1)
    better = ranks < least
    if better.any():
        at = int(better.argmax())
        return Verdict(
            "ranks of the model",
            False,
            f"{better.sum()} of {len(ranks)} recorded ranks are better than the model's scores give, ties against the target; user "
            f"{users[at]}: {ranks[at]} instead of at least {least[at]}",
        )
    return Verdict("ranks of the model", True, f"{len(ranks)} recorded ranks are those of the model's scores, ties against the target")


def targets_in_lists(table: pl.DataFrame, *, repeats: bool) -> Verdict:
    """Whether a target stands in its list exactly where its rank puts it there: nobody added it, ties are counted against it.

    Args:
        table: `user, target, target_rank, target_rank_masked, items, scores`: ranks without and with the history taken out.
        repeats: whether candidates may come from the history: then the lists go by the rank without.
    """
    name, rank = "ranks and lists", "target_rank" if repeats else "target_rank_masked"
    better = table.filter(pl.col("target_rank_masked") > pl.col("target_rank"))
    if len(better):
        return Verdict(name, False, f"user {better['user'][0]}: the target's rank gets worse when the history is taken out of its way")
    for row in table.select("user", "target", "items", "scores", rank).iter_rows(named=True):
        if row["target"] in row["items"]:
            scores = np.array(row["scores"])
            own = scores[row["items"].index(row["target"])]
            least = int((scores >= own).sum())
            if row[rank] < least:
                return Verdict(name, False, f"user {row['user']}: the target ranks {row[rank]}, but {least} scores are as high or higher")
            if row[rank] > len(scores) and own > scores.min():
                return Verdict(name, False, f"user {row['user']}: the target ranks {row[rank]}, but was put into a list of {len(scores)}")
    return Verdict(name, True, f"in {table.height:,} lists the target stands only where its rank puts it, ties against it")


def optimistic_ranks(
    name: str, users: np.ndarray, ranks: np.ndarray, scores: np.ndarray, items: np.ndarray, targets: np.ndarray
) -> Verdict:
    """Whether ranks are better than the scores allow when ties count against the target.

    Args:
        name: of the system.
        users: (rows,).
        ranks: as recorded, (rows,); 0 where the target is not among the candidates.
        scores: (rows, candidates).
        items: (rows, candidates), 0 where there are fewer.
        targets: (rows,).
    """
    check = f"ties of {name}"
    if broken := metrics.first_broken(scores, items):
        return Verdict(check, False, f"user {users[broken[0]]} has a score that is not finite: no rank follows from it")
    allowed = metrics.rank_of_target(scores, items, targets)
    misses = np.iinfo(np.int32).max  # behind every rank
    better = np.flatnonzero(np.where(ranks > 0, ranks, misses) < np.where(allowed > 0, allowed, misses))
    if len(better):
        at = better[0]
        return Verdict(
            check,
            False,
            f"{len(better)} of {len(ranks):,} ranks are better than their scores allow when ties count against the target, first user "
            f"{users[at]}: {ranks[at]} instead of {allowed[at] or 'none'}",
        )
    return Verdict(check, True, f"{len(ranks):,} ranks follow from the scores, ties against the target")


@dataclass(frozen=True)
class Claim:
    """Metrics, and the ranks that they are said to be of.

    Attributes:
        name: of what was measured.
        said: "hr@10", "ndcg@10", ... of metrics.json; others are not looked at.
        ranks: (rows,); 0 is a miss.
        users: (rows,).
    """

    name: str
    said: Mapping[str, float]
    ranks: np.ndarray
    users: np.ndarray


def metrics_of_ranks(claims: Sequence[Claim]) -> Verdict:
    """Whether metrics are what the ranks give, every user counting once."""
    for one in claims:
        given = metrics.summary(one.ranks, users=one.users)
        for key in sorted(given.keys() & one.said.keys()):
            if abs(one.said[key] - given[key]) > 1e-9:
                found = f"metrics.json says {key} {one.said[key]:.6f} of {one.name}, the ranks give {given[key]:.6f}"
                return Verdict("metrics", False, found)
    return Verdict("metrics", True, f"metrics.json says what the ranks give: {', '.join(one.name for one in claims)}")
