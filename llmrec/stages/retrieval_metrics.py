"""What metrics.json of `retrieve` says beside its means: what ties in score and time leave open, ratings, sampled negatives."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from llmrec import distributed
from llmrec.data.sequences import Cases, Sequences
from llmrec.evaluation import ambiguity, metrics, preference, sampled
from llmrec.evaluation.protocol import ProtocolCard

if TYPE_CHECKING:
    from llmrec.config import Config
    from llmrec.retrievers.candidates import Ranked


def beside_the_means(config: Config, prepared: Path, scorer: Any, sequences: Sequences, cases: Cases, ranked: Ranked) -> dict[str, Any]:
    """`ties`, `ambiguity` and `preference`; of several processes each calls this.

    Args:
        config: of the run.
        prepared: folder of `prepare`.
        scorer: the retriever.
        sequences: all users' events.
        cases: of the test split.
        ranked: the answers to them.
    """
    from llmrec.retrievers.candidates import rows_per_batch

    batch = rows_per_batch(sequences.item_count)
    found: dict[str, Any] = {"ties": {cases.split: metrics.ties(ranked.target_rank_optimistic, ranked.target_rank, cases.users)}}
    if config.split.target == "last":  # of successive targets another order changes the histories alone
        interactions = pl.read_parquet(prepared / "interactions.parquet")
        found["ambiguity"] = {cases.split: time_ties(scorer, sequences, cases, ranked.target_rank, interactions, batch)}
        found["preference"] = preferences(scorer, sequences, ranked.target_rank, batch, config.evaluation.liked)
    return found


def time_ties(scorer: Any, sequences: Sequences, cases: Cases, ranks: np.ndarray, interactions: pl.DataFrame, batch: int) -> dict[str, Any]:
    """How far another order of equal timestamps can move the metrics; several processes share the work.

    Args:
        scorer: the retriever.
        sequences: all users' events.
        cases: of one split.
        ranks: of their targets, history not masked.
        interactions: the table that `sequences` was read from.
        batch: rows scored at a time.
    """
    from llmrec.retrievers.candidates import ranks_of

    possible = ambiguity.ambiguous_cases(interactions, cases.split)
    possible = possible.filter(pl.col("possible") != pl.col("target"))  # the ranks of the actual ones are known
    mine = possible[distributed.share(possible.height)]
    histories = [ambiguity.exchanged_history(sequences, *row) for row in mine.select("user", "end", "position").iter_rows()]
    found = ranks_of(scorer, mine["user"].to_numpy(), histories, mine["possible"].to_numpy(), batch)
    with_ranks = possible.with_columns(rank=pl.Series(distributed.gather_rows(found), dtype=pl.Int32))
    return dict(ambiguity.bounds(cases.users, cases.ends, ranks, with_ranks))


def preferences(scorer: Any, sequences: Sequences, ranks: np.ndarray, batch: int, threshold: float) -> dict[str, Any]:
    """Whether what users rated better is scored higher: of the validation and the test item, both asked for before either came.

    Args:
        scorer: the retriever.
        sequences: all users' events; each user has one case a split at most.
        ranks: of the test targets, history not masked.
        batch: rows scored at a time.
        threshold: the lowest good rating.

    Returns:
        What can be measured of `pairwise` and `liked` (see `evaluation.preference`); nothing where there are no ratings.
    """
    from llmrec.retrievers.candidates import scores_of

    pairs = preference.rated_pairs(sequences)
    mine = distributed.share(len(pairs.users))
    histories = [sequences.history(user, end) for user, end in zip(pairs.users[mine], pairs.ends[mine], strict=True)]
    scores = distributed.gather_rows(scores_of(scorer, pairs.users[mine], histories, pairs.items[mine], batch))
    pairwise = preference.pairwise_accuracy(preference.won(scores, pairs.ratings))
    liked = preference.liked_targets({"retriever": ranks}, sequences.ratings[sequences.cases("test").ends], threshold)
    return ({"pairwise": {"retriever": pairwise}} if pairwise else {}) | ({"liked": liked} if liked else {})


def draw_negatives(config: Config, sequences: Sequences, cases: Cases) -> np.ndarray:
    """The sampled negatives of this process's share of the cases, drawn as `retrieval.legacy` says: (share, negatives).

    Args:
        config: of the run.
        sequences: all users' events; nothing a user ever has is drawn for him.
        cases: of the test split.

    Raises:
        UserError: there are too few items to draw from.
    """
    weights = np.ones(sequences.item_count + 1)
    if config.retrieval.legacy == "popularity":
        weights = sequences.training_counts().astype(np.float64)
    mine = cases.take(distributed.share(len(cases)))
    everything = [sequences.history(user, sequences.offsets[user + 1]) for user in mine.users]
    return sampled.negatives(mine.users, mine.targets, everything, weights, seed=config.seed)


def sampled_negatives(
    scorer: Any, sequences: Sequences, cases: Cases, drawn: np.ndarray, legacy: Literal["uniform", "popularity"] | None, card: ProtocolCard
) -> dict[str, Any]:
    """The protocol of older tables, with a card of its own (see `evaluation.sampled`); several processes share the work.

    Args:
        scorer: the retriever.
        sequences: all users' events.
        cases: of the test split.
        drawn: of `draw_negatives`.
        legacy: how they were drawn.
        card: of the full ranking.
    """
    from llmrec.retrievers.candidates import rows_per_batch, scores_of

    mine = cases.take(distributed.share(len(cases)))
    histories = [sequences.history(user, end) for user, end in zip(mine.users, mine.ends, strict=True)]
    items = np.column_stack([mine.targets, drawn])
    scores = distributed.gather_rows(scores_of(scorer, mine.users, histories, items, rows_per_batch(sequences.item_count)))
    kind = "negatives drawn by training popularity" if legacy == "popularity" else "uniform negatives"
    own_card = replace(
        card, candidate_set=f"1 + {sampled.NEGATIVES} {kind}, none of them the user's", ties_in_score="in expectation over their orders"
    )
    return {"protocol": asdict(own_card), cases.split: sampled.measured(cases.users, scores)}
