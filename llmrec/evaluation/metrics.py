"""Ranking metrics when one item per user is right: everything follows from the rank at which it was placed.

    HR@k   = 1                 if rank <= k else 0
    NDCG@k = 1 / log2(rank+1)  if rank <= k else 0     (the ideal DCG is 1, so DCG is NDCG)
    MRR@k  = 1 / rank          if rank <= k else 0

Ranks count from 1. Rank 0 says that the target was not among the candidates: a miss at every k. Metrics are
fractions, and the mean over users gives every user the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KS = (1, 5, 10, 20)


def per_user(rank: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Every metric of every user.

    Args:
        rank: 1-based rank of each user's target, 0 where it is not among the candidates, (users,) int.
        ks: cut-offs.

    Returns:
        "hr@k", "ndcg@k" and "mrr@k" for each k, each (users,) float64.

    Raises:
        ValueError: for a negative rank or an array that is not one-dimensional and whole-numbered.
    """
    rank = np.asarray(rank)
    if rank.ndim != 1 or not np.issubdtype(rank.dtype, np.integer) or (rank < 0).any():
        raise ValueError(f"ranks must be a vector of integers >= 0, got {rank.dtype} of shape {rank.shape}")
    at = np.where(rank > 0, rank, np.inf)  # a target that is not there stands infinitely low
    values = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(at + 1), "mrr": 1 / at}
    return {f"{name}@{k}": np.where(at <= k, value, 0.0) for name, value in values.items() for k in ks}


def summary(rank: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """The mean of each metric of `per_user` over the users.

    Raises:
        ValueError: when there are no users.
    """
    if len(rank) == 0:
        raise ValueError("no users to average over")
    return {name: float(value.mean()) for name, value in per_user(rank, ks).items()}


def rank_of_target(scores: np.ndarray, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank of each row's target among its candidates by falling score; ties count against the target.

    A model that scores all candidates alike thus ranks every target last: it gains nothing from their order.

    Args:
        scores: (rows, candidates) float.
        candidates: item ids, (rows, candidates) int. 0 pads a short row; its score is not looked at.
        targets: item ids, (rows,) int.

    Returns:
        (rows,) int32, 1-based; 0 where the target is not among the candidates.

    Raises:
        ValueError: naming the row, when a candidate's score is NaN or infinite.
    """
    real = candidates > 0
    bad = real & ~np.isfinite(scores)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"row {row}: the score of candidate {candidates[row, column]} is {scores[row, column]}")
    is_target = candidates == targets[:, None]
    target_score = np.where(is_target, scores, -np.inf).max(axis=1, keepdims=True)
    not_below = (real & (scores >= target_score)).sum(axis=1)  # the target itself makes it start at 1
    return np.where(is_target.any(axis=1), not_below, 0).astype(np.int32)
