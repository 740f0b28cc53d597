"""What `evaluate` measures beside the table: what the lists are like, calibration, preference. One function per table.

The arrays of scores are those of `Questions`: (users, pool), by system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.bm25 import words
from llmrec.config import Evaluation
from llmrec.data.sequences import TRAIN, Sequences
from llmrec.errors import UserError
from llmrec.evaluation import beyond_accuracy, bias, metrics, preference
from llmrec.evaluation.calibration import Calibration, calibration, probabilities
from llmrec.stages.scoring import Answers, Questions

TOP = 10
"""Length of the lists whose coverage, popularity and so on are measured."""


def check_scores(answers: Mapping[tuple[str, str], np.ndarray], asked: Mapping[str, Questions], prepared: Path) -> None:
    """Refuse scores that order nothing.

    Args:
        answers: a model's scores by (system, split).
        asked: what was asked, by split.
        prepared: folder of `prepare`, for the user's own id.

    Raises:
        UserError: one is NaN or infinite; it names system, user and item.
    """
    for (system, split), scores in answers.items():
        broken = metrics.first_broken(scores, asked[split].items)
        if broken is None:
            continue
        row, column = broken
        user, item = asked[split].users[row], asked[split].items[row, column]
        raw_user = pl.read_parquet(prepared / "users.parquet").filter(pl.col("user") == user)["raw_id"].item()
        raw_item = pl.read_parquet(prepared / "items.parquet").filter(pl.col("item") == item)["raw_id"].item()
        raise UserError(
            f"{system} gives user {raw_user} ({split}) the score {scores[row, column]} for item {raw_item}, so there is no order: "
            f"train it again with a lower {system}.learning_rate, or with base.dtype float32"
        )


def beyond(by_system: Mapping[str, np.ndarray], items: np.ndarray, sequences: Sequences, titles: Sequence[str]) -> dict[str, Any]:
    """Coverage, Gini, popularity, novelty and diversity of each system's first `TOP` candidates; equal scores keep the retriever's order.

    Args:
        by_system: scores of systems that were asked about all users: the others' lists would be the retriever's.
        items: the candidates, best first by the retriever.
        sequences: for the training part.
        titles: by item.
    """
    events = np.flatnonzero(sequences.split == TRAIN)
    owner = np.searchsorted(sequences.offsets, events, side="right") - 1
    once = np.unique(owner * (sequences.item_count + 1) + sequences.items[events])  # an item that a user has twice has one user
    training_users = np.bincount(once % (sequences.item_count + 1), minlength=sequences.item_count + 1)
    of_titles = [words(title) for title in titles]
    found = {}
    for system, scores in by_system.items():
        order = np.argsort(np.where(items > 0, -scores, np.inf), axis=1, kind="stable")[:, :TOP]
        lists = np.take_along_axis(items, order, axis=1)
        found[system] = beyond_accuracy.measures(lists, training_users, len(np.unique(owner)), of_titles)
    return found


def calibrations(logprobs: Mapping[str, np.ndarray], questions: Questions) -> dict[str, Calibration]:
    """Whether the letters' probabilities are right, by system, over users who were asked and have the target among the candidates."""
    shown = questions.retrieved & np.array([len(rows) > 0 for rows in questions.rows])
    if not shown.any():
        return {}
    items, targets = questions.items[shown], questions.targets[shown]
    return {name: calibration(probabilities(scores[shown], items), items, targets) for name, scores in logprobs.items()}


@dataclass(frozen=True)
class ListedPairs:
    """Validation questions that have both items of a user's rated pair among their candidates, and were put.

    Attributes:
        rows: of the validation questions, (pairs,).
        places: of the two items among the candidates, (pairs, 2).
        ratings: of the two, (pairs, 2).
    """

    rows: np.ndarray
    places: np.ndarray
    ratings: np.ndarray


def listed_pairs(sequences: Sequences, valid: Questions) -> ListedPairs:
    """The pairs that a ranker can tell apart.

    Of the validation question: the test item, too, is unseen there, while candidates of the test question leave the validation item out.
    """
    pairs = preference.rated_pairs(sequences)
    put = np.array([bool(prompts) for prompts in valid.rows])
    _, of_pair, row = np.intersect1d(pairs.users, valid.users, return_indices=True)
    is_place = valid.items[row][:, None, :] == pairs.items[of_pair][:, :, None]
    kept = is_place.any(axis=2).all(axis=1) & put[row]
    return ListedPairs(row[kept], is_place.argmax(axis=2)[kept], pairs.ratings[of_pair[kept]])


def preferences(
    pairs: ListedPairs,
    valid_scores: Mapping[str, np.ndarray],
    target_ratings: np.ndarray,
    ranks: Mapping[str, np.ndarray],
    settings: Evaluation,
    seed: int,
) -> dict[str, Any]:
    """What users liked, where the data has ratings.

    Args:
        pairs: of the validation questions.
        valid_scores: of the validation questions' candidates, by system. None of them may have been fitted to these users.
        target_ratings: of the test targets, (test users,); NaN where there is none.
        ranks: of the test targets, by system.
        settings: the lowest good rating, and the resamples of the tests.
        seed: their seed.

    Returns:
        {"pairwise": {system: ...}, "liked": ..., "comparisons": ...}, each left out where there is too little; empty where nothing is
        rated.
    """
    won = {
        name: preference.won(np.take_along_axis(scores[pairs.rows], pairs.places, axis=1), pairs.ratings)
        for name, scores in valid_scores.items()
    }
    pairwise = {name: accuracy for name, of in won.items() if (accuracy := preference.pairwise_accuracy(of)) is not None}
    liked = preference.liked_targets(dict(ranks), target_ratings, settings.liked)
    of_liked = {name: rank[target_ratings >= settings.liked] for name, rank in ranks.items()} if liked else {}
    compared = preference.comparisons(won if pairwise else {}, of_liked, settings.resamples, seed)
    found = {"pairwise": pairwise, "liked": liked, "comparisons": compared}
    return {name: value for name, value in found.items() if value}


def ratings_of(sequences: Sequences, test: Questions) -> np.ndarray:
    """How the test targets were rated, (users,); NaN where they were not."""
    return sequences.ratings[sequences.cases("test").of(test.users).ends]


def letters_chosen(answers: Answers, test: Questions, *, shuffled: bool) -> dict[str, Any]:
    """Position bias of the last tuned model on test users.

    Args:
        answers: of `score`.
        test: what was asked.
        shuffled: whether the candidates' orders are random.
    """
    key = "orpo", "test"
    return bias.position_bias(answers.by_order[key], test.order, test.items, test.targets, answers.asked[key], shuffled=shuffled)
