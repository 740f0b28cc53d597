"""What users liked, not only what they took next.

Preference pairs teach a ranker to put a badly rated item below a well rated one, also where the badly rated one came next. Metrics of
the next item cannot show that, and punish it. Here are two that can, for data with ratings:

    pairwise accuracy   of two later items that the user rated differently, how often is the better rated one scored higher?
    liked targets       HR, NDCG and MRR of the users who rated their target well

The two items are those of validation and test, both asked for before either came. Whether preference tuning did it is told by paired
differences over the same users (`comparisons`), corrected for all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from llmrec.data.sequences import Sequences
from llmrec.evaluation import compare
from llmrec.evaluation.metrics import per_user, summary

PAIRS = (("orpo", "sft"), ("orpo", "retriever"))


class Pairwise(TypedDict):
    """Pairwise accuracy of one system."""

    users: int
    """Who rated their two items differently."""
    accuracy: float
    """0.5 is chance."""
    standard_error: float
    """Of the accuracy, over users."""
    ties: int
    """Users whose two items have equal scores; each counts one half."""


class Liked(TypedDict):
    """Metrics over the users who liked their target."""

    users: int
    threshold: float
    overall: dict[str, dict[str, float]]
    """System -> metric -> mean."""


@dataclass(frozen=True)
class RatedPairs:
    """Users who rated their validation item and their test item differently.

    Attributes:
        users: (users,), ascending.
        items: the validation and the test item, (users, 2).
        ratings: of both, (users, 2).
        ends: position in `Sequences.items` before which the history without either ends, (users,).
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    ends: np.ndarray


def rated_pairs(sequences: Sequences) -> RatedPairs:
    """The users with two different items to tell apart; each may have one case a split at most."""
    valid, test = sequences.cases("valid"), sequences.cases("test")
    users, in_valid, in_test = np.intersect1d(valid.users, test.users, return_indices=True)
    ends = np.stack([valid.ends[in_valid], test.ends[in_test]], axis=1)
    items, ratings = sequences.items[ends], sequences.ratings[ends]
    told = ~np.isnan(ratings).any(axis=1) & (ratings[:, 0] != ratings[:, 1]) & (items[:, 0] != items[:, 1])
    return RatedPairs(users[told], items[told], ratings[told], ends[told, 0])


def won(scores: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Whether the better rated of two items has the higher score: 1, 0, or ½ where the scores are equal, (users,).

    Args:
        scores: of each user's two items, (users, 2), higher is better: a model's scores after one history that holds neither item, or
            negative ranks.
        ratings: of the same two items, (users, 2), different.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"row {np.argwhere(~np.isfinite(scores))[0, 0]}: a score is not finite")
    scores = scores.astype(np.float64)
    return (1 + np.sign(scores[:, 1] - scores[:, 0]) * np.sign(ratings[:, 1] - ratings[:, 0])) / 2


def pairwise_accuracy(won: np.ndarray) -> Pairwise | None:
    """How often the better rated of two items has the higher score; None of fewer than two users, whose mean has no error to give.

    Args:
        won: of the function of that name, (users,).
    """
    if len(won) < 2:
        return None
    error = float(won.std(ddof=1) / np.sqrt(len(won)))
    return Pairwise(users=len(won), accuracy=float(won.mean()), standard_error=error, ties=int((won == 0.5).sum()))


def liked_targets(ranks: dict[str, np.ndarray], ratings: np.ndarray, threshold: float) -> Liked | None:
    """The metrics of every system over the users who rated their target well.

    Args:
        ranks: rank of the target by system, each (users,); 0 where it is not among the candidates.
        ratings: of the targets, (users,); NaN where there is none.
        threshold: the lowest good rating, on the scale of the data.

    Returns:
        None where nobody did.
    """
    liked = ratings >= threshold  # NaN is not
    if not liked.any():
        return None
    return Liked(users=int(liked.sum()), threshold=threshold, overall={name: summary(rank[liked]) for name, rank in ranks.items()})


def comparisons(won: Mapping[str, np.ndarray], liked: Mapping[str, np.ndarray], resamples: int, seed: int) -> list[compare.Comparison]:
    """What preference tuning changed: `PAIRS` on pairwise accuracy ("pairwise") and on liked targets ("liked ndcg@10").

    Args:
        won: of the function of that name, by system; empty where there is nothing to measure.
        liked: rank of the target by system, over the users who rated it well; likewise.
        resamples: of each test.
        seed: their seed.
    """
    values = {"pairwise": won, "liked ndcg@10": {name: per_user(rank, (10,))["ndcg@10"] for name, rank in liked.items()}}
    values = {name: by_system for name, by_system in values.items() if by_system}
    pairs = [(a, b) for a, b in PAIRS if all(a in by_system and b in by_system for by_system in values.values())]
    by_system = {system: {name: of[system] for name, of in values.items()} for pair in pairs for system in pair}
    return compare.compared(by_system, pairs, list(values), resamples, seed)


def render(found: Mapping[str, Any]) -> str:
    """Pairwise accuracies in a line, and the comparisons below.

    Args:
        found: "preference" of metrics.json; not empty.
    """
    lines = [compare.render_comparison(comparison) for comparison in found.get("comparisons", ())]
    if "pairwise" in found:
        users = found["pairwise"]["retriever"]["users"]
        shares = ", ".join(f"{system} {of['accuracy']:.3f}" for system, of in found["pairwise"].items())
        lines = [f"the better rated of two later items is scored higher ({users:,} validation users): {shares}", *lines]
    return "\n".join(lines)
