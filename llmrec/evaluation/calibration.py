"""Are a ranker's probabilities right? Of the users to whom it gives its first choice 30 %, does 30 % take it?

Asked of users whose target is among the candidates, as the model was trained on such: the probabilities are shares of one right answer.

    reliability   users sorted by the probability of their first choice, cut into bins of equal counts; in each the mean
                  probability ("confidence") and the share of users whose target it was ("accuracy")
    ECE           sum over bins of users in it / users |accuracy - confidence|        (Guo et al. 2017, arXiv 1706.04599, equation 3,
                  there with bins of equal width); not 0 even for a perfect model, as a bin's accuracy is a sample
    Brier score   mean over users of the sum over candidates of (probability - 1[it is the target])^2, 0 to 2 (Brier 1950)
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np


class Bin(TypedDict):
    """Users whose first choice has about the same probability."""

    users: int
    confidence: float
    accuracy: float


class Calibration(TypedDict):
    """What goes into metrics.json as "calibration", by system."""

    users: int
    confidence: float
    """Mean probability of the first choice."""
    accuracy: float
    """Share of users whose target it was."""
    ece: float
    brier: float
    brier_uniform: float
    """The Brier score of giving every candidate the same probability: what must be beaten."""
    bins: list[Bin]
    """From the least to the most confident."""


def probabilities(logprobs: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Log-probabilities, or other logits, as shares of each row's candidates, (users, candidates) float64; 0 for padding (item 0)."""
    logits = np.where(candidates > 0, logprobs, -np.inf).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def calibration(probability: np.ndarray, candidates: np.ndarray, targets: np.ndarray, bins: int = 10) -> Calibration:
    """Compare probabilities with what happened.

    Args:
        probability: of each candidate, (users, candidates); rows sum to 1.
        candidates: item ids, (users, candidates) int; 0 is padding.
        targets: the right item of each user, (users,), among his candidates.
        bins: of the reliability table; fewer where there are fewer users.

    Raises:
        ValueError: no users, a target that is not among the candidates, or rows that are no probabilities.
    """
    right = (candidates == targets[:, None]) & (candidates > 0)
    if not len(targets) or not right.any(axis=1).all():
        raise ValueError("calibration needs users, each with the target among the candidates")
    if (probability < 0).any() or not np.allclose(probability.sum(axis=1), 1, atol=1e-6):
        raise ValueError("the probabilities of each user's candidates must be at least 0 and sum to 1")
    confidence = probability.max(axis=1)
    first = probability == confidence[:, None]
    hit = (first & right).sum(axis=1) / first.sum(axis=1)  # of several first choices each is the first as often
    order = np.argsort(confidence, kind="stable")
    groups = np.array_split(order, min(bins, len(order)))
    table = [Bin(users=len(g), confidence=float(confidence[g].mean()), accuracy=float(hit[g].mean())) for g in groups]
    count = (candidates > 0).sum(axis=1)
    return Calibration(
        users=len(targets),
        confidence=float(confidence.mean()),
        accuracy=float(hit.mean()),
        ece=sum(b["users"] * abs(b["accuracy"] - b["confidence"]) for b in table) / len(targets),
        brier=float(((probability - right) ** 2).sum(axis=1).mean()),
        brier_uniform=float((1 - 1 / count).mean()),
        bins=table,
    )
