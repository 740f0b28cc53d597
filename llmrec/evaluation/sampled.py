"""Ranks among one right item and some sampled wrong ones: the protocol of older tables, for comparison with those alone.

Sampled metrics are not estimates of the full ranking's, and can order two models the other way round (Krichene & Rendle, KDD 2020).
Public evaluations of this kind (those behind paper 002's tables among them) draw negatives with replacement and let the target win
ties. Here negatives are distinct, none is an item the user ever has, and a tie is worth its mean over all orders. A model that knows
nothing has HR@10 = 10/101 among 100 negatives.
"""

from __future__ import annotations

import numpy as np

from llmrec.errors import UserError
from llmrec.evaluation import metrics

NEGATIVES = 100


def negatives(
    users: np.ndarray, targets: np.ndarray, taken: list[np.ndarray], weights: np.ndarray, *, count: int = NEGATIVES, seed: int = 0
) -> np.ndarray:
    """Draw wrong items for every case, one after the other without putting back.

    Args:
        users: (cases,) user numbers.
        targets: (cases,) right items; they are never drawn.
        taken: all items that the user of each case has, at any time; they are never drawn.
        weights: by item, (items + 1,) float >= 0, padding first: the chance of a draw is in proportion. Items of weight 0 are never drawn.
        count: items per case.
        seed: a case's draw depends on it, its user and target alone.

    Returns:
        (cases, count) int32, distinct in a row.

    Raises:
        UserError: fewer than `count` items can be drawn for a user.
    """
    found = np.zeros((len(users), count), dtype=np.int32)
    for row, (user, target, own) in enumerate(zip(users, targets, taken, strict=True)):
        chance = weights.astype(np.float64)
        chance[0] = chance[target] = 0
        chance[own] = 0
        possible = np.flatnonzero(chance)
        if len(possible) < count:
            raise UserError(
                f"retrieval.legacy: only {len(possible)} items can be drawn for user {user} (of users.parquet), {count} are needed: "
                "the catalogue is too small for sampled negatives, set retrieval.legacy to null"
            )
        chance = chance[possible] / chance[possible].sum()
        found[row] = np.random.default_rng([seed, user, target]).choice(possible, count, replace=False, p=chance)
    return found


def measured(users: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Metrics of the right item among the wrong ones, ties in expectation; every user counts once.

    Args:
        users: (cases,) user numbers.
        scores: (cases, 1 + count), the right item's first.

    Raises:
        ValueError: when a score is NaN or infinite.
    """
    places = np.broadcast_to(np.arange(1, scores.shape[1] + 1), scores.shape)
    expected = metrics.expected(*metrics.tie_range(scores, places, np.ones(len(scores), dtype=np.int64)))
    return {name: float(metrics.by_user(value, users).mean()) for name, value in expected.items()}
