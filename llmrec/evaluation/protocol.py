"""The protocol card: what must be the same before two numbers may stand in one table.

Published tables mix protocols without saying so. Every metrics.json therefore carries one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.config import Config


@dataclass(frozen=True)
class ProtocolCard:
    """How a number was measured. `asdict(card)` goes into metrics.json; `ProtocolCard(**protocol)` reads it back."""

    dataset: str
    data_fingerprint: str
    filter: str
    """Which interactions stayed."""
    duplicates: str
    """Which event of a repeated (user, item) stayed."""
    split: str
    ties_in_time: str
    """How events with equal timestamps were ordered."""
    ambiguous_targets: int
    """Evaluated targets that another order of equal timestamps would change."""
    candidate_set: str
    """What the target competes with."""
    history_masked: bool
    """Whether items of the user's history are taken out of the ranking."""
    ties_in_score: str
    metric_averaging: str
    selection_metric: str
    """What early stopping and the fusion weight look at."""
    seed: int
    users_evaluated: int


def card(
    config: Config, *, data_fingerprint: str, ambiguous_targets: int, users_evaluated: int, candidate_set: str, history_masked: bool
) -> ProtocolCard:
    """The card of a run: what `config` says, and what the stage knows besides.

    Args:
        config: the resolved settings.
        data_fingerprint: fingerprint of the prepared tables.
        ambiguous_targets: from the statistics of `prepare`, for the split that was evaluated.
        users_evaluated: number of users behind the means.
        candidate_set: "all items", "the retriever's top 20" …
        history_masked: whether the user's history was taken out of the ranking.
    """
    kept = [f"iterative {config.filter.core}-core" if config.filter.core else "no core"]
    if config.filter.minimum_rating is not None:
        kept.append(f"ratings of at least {config.filter.minimum_rating:g}")
    if config.filter.untitled == "drop":
        kept.append("items with a title")
    return ProtocolCard(
        dataset=config.dataset,
        data_fingerprint=data_fingerprint,
        filter=", ".join(kept),
        duplicates=config.filter.duplicates,
        split=f"leave-one-out, users with at least {config.split.minimum_events} events",
        ties_in_time=config.split.ties,
        ambiguous_targets=ambiguous_targets,
        candidate_set=candidate_set,
        history_masked=history_masked,
        ties_in_score="against the target",
        metric_averaging="every user counts once",
        selection_metric="validation ndcg@10",
        seed=config.seed,
        users_evaluated=users_evaluated,
    )
