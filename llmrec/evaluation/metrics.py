"""Ranking metrics: everything follows from the rank at which the right item was placed.

    HR@k   = 1                 if rank <= k else 0
    NDCG@k = 1 / log2(rank+1)  if rank <= k else 0     (the ideal DCG is 1, so DCG is NDCG)
    MRR@k  = 1 / rank          if rank <= k else 0

There is one right item, so Recall@k is HR@k and has no column of its own; a user who is asked about several has a case for each, and
counts as their mean (`by_user`).

Ranks count from 1. Rank 0 says that the target was not among the candidates: a miss at every k. Metrics are
fractions, and the mean over users gives every user the same weight.

Equal scores leave the rank open. Everywhere ties count against the target, the pessimistic rank; `tie_range` gives the optimistic one,
too, and `expected` the metrics' exact mean over all orders of the tied candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

KS = (1, 5, 10, 20)


def per_user(rank: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Every metric of every user.

    Args:
        rank: 1-based rank of each user's target, 0 where it is not among the candidates, (users,) int.
        ks: cut-offs.

    Returns:
        "hr@k" (which is Recall@k), "ndcg@k" and "mrr@k" for each k, each (users,) float64.

    Raises:
        ValueError: for a negative rank or an array that is not one-dimensional and whole-numbered.
    """
    rank = _checked(rank)
    at = np.where(rank > 0, rank, np.inf)  # a target that is not there stands infinitely low
    return {f"{name}@{k}": np.where(at <= k, value, 0.0) for name, value in _gains(at).items() for k in ks}


def by_user(values: np.ndarray, users: np.ndarray | None) -> np.ndarray:
    """The mean of each user's cases, (distinct users,), users ascending.

    Args:
        values: of each case, (cases,).
        users: whose each case is, (cases,); None: each has one, and its value is returned as it is.
    """
    if users is None:
        return values
    _, owner, cases = np.unique(users, return_inverse=True, return_counts=True)
    return np.bincount(owner, values) / cases


def _checked(rank: np.ndarray) -> np.ndarray:
    rank = np.asarray(rank)
    if rank.ndim != 1 or not np.issubdtype(rank.dtype, np.integer) or (rank < 0).any():
        raise ValueError(f"ranks must be a vector of integers >= 0, got {rank.dtype} of shape {rank.shape}")
    return rank


def _gains(at: np.ndarray) -> dict[str, np.ndarray]:
    """What a hit at each place is worth to each metric, before the cut-off."""
    return {"hr": np.ones(len(at)), "ndcg": 1 / np.log2(at + 1), "mrr": 1 / at}


def summary(rank: np.ndarray, ks: Sequence[int] = KS, users: np.ndarray | None = None) -> dict[str, float]:
    """The mean of each metric of `per_user` over the users.

    Args:
        rank: as `per_user` takes it, (users,), or (cases,) with `users`.
        ks: cut-offs.
        users: as in `by_user`: a user with several cases counts once.

    Raises:
        ValueError: when there are no users.
    """
    if len(rank) == 0:
        raise ValueError("no users to average over")
    return {name: float(by_user(value, users).mean()) for name, value in per_user(rank, ks).items()}


def tie_range(scores: np.ndarray, candidates: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank of each row's target among its candidates by falling score, over all orders of equal scores.

    Args:
        scores: (rows, candidates) float.
        candidates: item ids, (rows, candidates) int. 0 pads a short row; its score is not looked at.
        targets: item ids, (rows,) int.

    Returns:
        The optimistic and the pessimistic rank, each (rows,) int32, 1-based; 0 where the target is not among the candidates.

    Raises:
        ValueError: naming the row, when a candidate's score is NaN or infinite.
    """
    broken = first_broken(scores, candidates)
    if broken is not None:
        row, column = broken
        raise ValueError(f"row {row}: the score of candidate {candidates[row, column]} is {scores[row, column]}")
    real = candidates > 0
    is_target = real & (candidates == targets[:, None])
    target_score = np.where(is_target, scores, -np.inf).max(axis=1, keepdims=True)
    listed = is_target.any(axis=1)
    above = (real & (scores > target_score)).sum(axis=1)
    not_below = (real & (scores >= target_score)).sum(axis=1)  # the target itself makes it start at 1
    return np.where(listed, above + 1, 0).astype(np.int32), np.where(listed, not_below, 0).astype(np.int32)


def first_broken(scores: np.ndarray, candidates: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first candidate whose score is NaN or infinite, or None; padding (0) is not looked at."""
    bad = np.argwhere((candidates > 0) & ~np.isfinite(scores))
    return (int(bad[0, 0]), int(bad[0, 1])) if len(bad) else None


def rank_of_target(scores: np.ndarray, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The pessimistic rank of `tie_range`: a model that scores all candidates alike ranks every target last, and gains nothing.

    Args:
        scores: (rows, candidates) float.
        candidates: item ids, (rows, candidates) int; 0 is padding.
        targets: item ids, (rows,) int.

    Returns:
        (rows,) int32, 1-based; 0 where the target is not among the candidates.

    Raises:
        ValueError: naming the row, when a candidate's score is NaN or infinite.
    """
    return tie_range(scores, candidates, targets)[1]


def expected(optimistic: np.ndarray, pessimistic: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Every metric of every user, as its mean over the target's place, which is uniform from the optimistic to the pessimistic rank.

    That is the metric's expectation when equal scores are shuffled, not the metric of the mean rank.

    Args:
        optimistic: best rank, (users,) int; 0 where the target is not among the candidates.
        pessimistic: worst rank, likewise.
        ks: cut-offs.

    Returns:
        "hr@k", "ndcg@k" and "mrr@k" for each k, each (users,) float64.

    Raises:
        ValueError: for ranks as in `per_user`, and where the best is worse than the worst or one of the two is 0 alone.
    """
    best, worst = _checked(optimistic), _checked(pessimistic)
    if best.shape != worst.shape or (best > worst).any() or ((best == 0) != (worst == 0)).any():
        raise ValueError("every user needs an optimistic rank that is not below the pessimistic one, or 0 for both")
    found = per_user(worst, ks)  # and where nothing is tied it stays so, to the last digit
    tied, places = best < worst, worst - best + 1
    for k in ks:
        for name, gain in _gains(np.arange(1, k + 1)).items():
            up_to = np.concatenate([[0.0], np.cumsum(gain)])  # of all places so far
            total = up_to[np.minimum(worst, k)] - up_to[np.clip(best - 1, 0, k)]
            found[f"{name}@{k}"] = np.where(tied, total / places, found[f"{name}@{k}"])
    return found


def ties(optimistic: np.ndarray, pessimistic: np.ndarray, users: np.ndarray | None = None) -> dict[str, Any]:
    """How much hangs on the order of items with the target's score.

    Args:
        optimistic: best rank of each target, (cases,).
        pessimistic: worst rank, likewise.
        users: as in `by_user`.

    Returns:
        For metrics.json: "tied_users", and of HR@10 and NDCG@10 [ties for the target, ties against it] and the expectation.
    """
    bounds = [summary(ranks, (10,), users) for ranks in (optimistic, pessimistic)]
    shuffled = expected(optimistic, pessimistic, (10,))
    tied = optimistic < pessimistic
    found: dict[str, Any] = {"tied_users": int(tied.sum()) if users is None else len(np.unique(users[tied]))}
    for name in ("hr@10", "ndcg@10"):
        found |= {name: [bound[name] for bound in bounds], f"expected_{name}": float(by_user(shuffled[name], users).mean())}
    return found
