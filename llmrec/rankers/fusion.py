"""Fusion of retriever and language model: a weighted mean of their scores, each standardised within a user's candidates.

    fused = (1 - w) z(retriever) + w z(ranker)        z(s) = (s - mean s) / std s, over one user's candidates

The retriever's scores are logits, the ranker's are log-probabilities of letters; z makes them comparable and takes out
what is common to all candidates of a user. The single weight w is chosen on validation users. w = 0 is the retriever
and w = 1 the language model, so on those users fusion is never worse than the better of the two.

Candidates are item ids, (users, candidates) int; 0 pads a short list and is left out of mean and deviation.
"""

from __future__ import annotations

import numpy as np

from llmrec.errors import UserError
from llmrec.evaluation.metrics import rank_of_target, summary

GRID = np.linspace(0, 1, 21)


def standardise(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """z-scores within each row's candidates, (users, candidates) float64; 0 for padding and where all scores are equal."""
    real = candidates > 0
    scores = np.where(real, scores, 0).astype(np.float64)
    count = np.maximum(real.sum(axis=1, keepdims=True), 1)
    centred = np.where(real, scores - scores.sum(axis=1, keepdims=True) / count, 0)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    # Rounding gives equal scores a tiny deviation, and dividing by it would make an order out of nothing.
    equal = np.where(real, scores, np.inf).min(axis=1) >= np.where(real, scores, -np.inf).max(axis=1)
    deviation[equal] = np.inf
    return centred / deviation


def fuse(retriever_scores: np.ndarray, ranker_scores: np.ndarray, candidates: np.ndarray, weight: float) -> np.ndarray:
    """Fused scores, (users, candidates) float64; only their order within a row means anything.

    Weights 0 and 1 return the one score as it is: standardising could round two close scores to a tie.

    Args:
        retriever_scores: (users, candidates).
        ranker_scores: (users, candidates).
        candidates: item ids, (users, candidates); 0 is padding.
        weight: share of the ranker, 0 to 1.
    """
    if weight == 0:
        return retriever_scores.astype(np.float64)
    if weight == 1:
        return ranker_scores.astype(np.float64)
    return (1 - weight) * standardise(retriever_scores, candidates) + weight * standardise(ranker_scores, candidates)


def choose_weight(
    retriever_scores: np.ndarray, ranker_scores: np.ndarray, candidates: np.ndarray, targets: np.ndarray, grid: np.ndarray = GRID
) -> tuple[float, list[tuple[float, float]]]:
    """The weight with the best NDCG@10; of equally good ones the smallest, which trusts the retriever most.

    Args:
        retriever_scores: (users, candidates) of validation users.
        ranker_scores: likewise.
        candidates: item ids, (users, candidates); 0 is padding.
        targets: item ids, (users,).
        grid: weights to try, rising.

    Returns:
        The weight, and (weight, NDCG@10) for every weight of the grid.

    Raises:
        UserError: when there are no users to choose it on.
        ValueError: when a score is NaN or infinite.
    """
    if len(targets) == 0:
        raise UserError(
            "No validation user's target is among the candidates: no weight can be chosen. Raise --evaluation.valid_users or --limit_users."
        )
    curve = []
    for weight in grid:
        fused = fuse(retriever_scores, ranker_scores, candidates, weight)
        curve.append((float(weight), summary(rank_of_target(fused, candidates, targets), ks=(10,))["ndcg@10"]))
    best = max(value for _, value in curve)
    return next(weight for weight, value in curve if value >= best - 1e-12), curve  # equal up to rounding is equal
