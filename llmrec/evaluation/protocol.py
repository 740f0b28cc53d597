"""The protocol card: what must be the same before two numbers may stand in one table.

Published tables mix protocols without saying so. Every metrics.json therefore carries one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmrec.config import Config


@dataclass(frozen=True)
class ProtocolCard:
    """How a number was measured. `asdict(card)` goes into metrics.json; `ProtocolCard(**protocol)` reads it back.

    The fields with a default are younger than others; a card without them was made as the default says.
    """

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
    split_kind: str = "leave_one_out"
    target: str = "last"
    """Of a temporal split: each user's last event of the period, or successive: every one."""
    targets_evaluated: int | None = None
    """Where users have several; else there is one for each."""
    valid_from: int | None = None
    """Where validation begins in a temporal split, milliseconds since 1970 (UTC)."""
    valid_from_date: str | None = None
    test_from: int | None = None
    """Where test begins, likewise."""
    test_from_date: str | None = None


def card(
    config: Config,
    *,
    data_fingerprint: str,
    ambiguous_targets: int,
    users_evaluated: int,
    candidate_set: str,
    history_masked: bool,
    periods: Mapping[str, Any] | None = None,
    targets_evaluated: int | None = None,
    ties_in_score: str = "against the target",
) -> ProtocolCard:
    """The card of a run: what `config` says, and what the stage knows besides.

    Args:
        config: the resolved settings.
        data_fingerprint: fingerprint of the prepared tables.
        ambiguous_targets: of the split that was evaluated, among the users who were asked.
        users_evaluated: number of users behind the means.
        candidate_set: "all items", "the retriever's top 20" …
        history_masked: whether the user's history was taken out of the ranking.
        periods: from the statistics of `prepare`, where the split is temporal.
        targets_evaluated: number of targets behind the users' means, where users have several.
        ties_in_score: what became of items with the target's score.
    """
    over = " of all periods together" if periods is not None else ""  # which may keep in training what only later events complete
    kept = [f"iterative {config.filter.core}-core{over}" if config.filter.core else "no core"]
    if config.filter.minimum_rating is not None:
        kept.append(f"ratings of at least {config.filter.minimum_rating:g}")
    if config.filter.untitled == "drop":
        kept.append("items with a title")
    return ProtocolCard(
        dataset=config.dataset,
        data_fingerprint=data_fingerprint,
        filter=", ".join(kept),
        duplicates=config.filter.duplicates,
        split=_split(config, periods),
        ties_in_time=config.split.ties,
        ambiguous_targets=ambiguous_targets,
        candidate_set=candidate_set,
        history_masked=history_masked,
        ties_in_score=ties_in_score,
        metric_averaging="every user counts once" + ("" if targets_evaluated is None else ", as the mean over his targets"),
        selection_metric="validation ndcg@10",
        seed=config.seed,
        users_evaluated=users_evaluated,
        split_kind=config.split.kind,
        target=config.split.target,
        targets_evaluated=targets_evaluated,
        **(periods or {}),
    )


def _split(config: Config, periods: Mapping[str, Any] | None) -> str:
    if periods is None:
        return f"leave-one-out, users with at least {config.split.minimum_events} events"
    asked = "last event" if config.split.target == "last" else "every event"
    return (
        f"temporal, {asked} of the period: training before {periods['valid_from_date']}, test from {periods['test_from_date']}, "
        "users with training events"
    )
