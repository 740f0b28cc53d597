"""Exact top-N candidates and full-catalogue ranks, streamed in batches: never a users x items matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmrec.data.sequences import Cases, Sequences
from llmrec.errors import UserError


class Scorer(Protocol):
    """What every retriever offers."""

    def scores(self, users: np.ndarray, histories: list[np.ndarray]) -> Tensor:
        """Scores of all items for each user and history, (users, items) float32; column j is item j + 1."""


@dataclass(frozen=True)
class Ranked:
    """The answer to some evaluation cases.

    Attributes:
        target_rank: rank of the target among all items, 1-based, ties against it, (cases,).
        target_rank_optimistic: the same with ties for it: the two differ where other items have the target's score.
        target_rank_masked: ties against it, with the history's items taken out.
        items: candidates of each case, best first, (cases, count) int32; 0 where fewer items are left.
        scores: their scores, (cases, count) float32; -inf where there is no item.
    """

    target_rank: np.ndarray
    target_rank_optimistic: np.ndarray
    target_rank_masked: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def _check(scores: Tensor, users: np.ndarray) -> None:
    bad = ~torch.isfinite(scores.sum(1))  # NaN and infinities stay in a sum; one that overflows is as useless
    if bad.any():
        user = users[int(bad.nonzero()[0])]
        raise UserError(f"the retriever's scores of user {user} (of users.parquet) are not finite: lower training.learning_rate")


def _scored(
    scorer: Scorer, users: np.ndarray, history_of: Callable[[int], np.ndarray], batch: int
) -> Iterator[tuple[slice, list[np.ndarray], Tensor]]:
    """A batch at a time: its rows, their histories, and all items' scores, (rows, items)."""
    for start in range(0, len(users), batch):
        rows = slice(start, start + batch)
        histories = [history_of(row) for row in range(len(users))[rows]]
        scores = scorer.scores(users[rows], histories).cpu()
        _check(scores, users[rows])
        yield rows, histories, scores


def _top(scores: Tensor, items: np.ndarray, kept: np.ndarray) -> None:
    """Write the best items of each row and their scores into `items` and `kept`, (rows, count)."""
    values, index = scores.topk(min(items.shape[1], scores.shape[1]), dim=1)
    width = values.shape[1]
    kept[:, :width] = values.numpy()
    items[:, :width] = np.where(kept[:, :width] > -np.inf, index.numpy() + 1, 0)


def _at_least(scores: Tensor, own: Tensor) -> np.ndarray:
    """How many scores of each row are at least the target's `own`, (rows, 1). Row by row it stays in the processor's cache."""
    return np.array([np.count_nonzero(row >= value) for row, value in zip(scores.numpy(), own.numpy(), strict=True)], dtype=np.int32)


def _above(scores: Tensor, own: Tensor) -> np.ndarray:
    """How many scores of each row are above the target's."""
    return np.array([np.count_nonzero(row > value) for row, value in zip(scores.numpy(), own.numpy(), strict=True)], dtype=np.int32)


def _columns(items: np.ndarray) -> Tensor:
    """Where the scores of one item per row are, (rows, 1)."""
    return torch.from_numpy(items.astype(np.int64))[:, None] - 1


def _mask(scores: Tensor, histories: list[np.ndarray]) -> None:
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    scores[rows, np.concatenate(histories).astype(np.int64) - 1] = -torch.inf


@torch.inference_mode()
def rank(scorer: Scorer, sequences: Sequences, cases: Cases, count: int, *, repeats: bool, batch: int) -> Ranked:
    """Score the whole catalogue for some cases.

    Args:
        scorer: the retriever.
        sequences: all users' events.
        cases: which users, targets and histories.
        count: candidates to keep.
        repeats: whether a candidate may come from the history.
        batch: cases scored at a time; the memory is batch x items.

    Raises:
        UserError: when a score is NaN or infinite; it names the user.
    """
    # Made before the loop: small arrays that outlive a batch would lie between its large ones and keep their memory.
    answer = Ranked(
        np.zeros(len(cases), dtype=np.int32),
        np.zeros(len(cases), dtype=np.int32),
        np.zeros(len(cases), dtype=np.int32),
        np.zeros((len(cases), count), dtype=np.int32),
        np.full((len(cases), count), -np.inf, dtype=np.float32),
    )
    for part, histories, scores in _scored(scorer, cases.users, lambda row: sequences.history(cases.users[row], cases.ends[row]), batch):
        target = _columns(cases.targets[part])
        own = scores.gather(1, target)
        answer.target_rank[part] = _at_least(scores, own)
        answer.target_rank_optimistic[part] = 1 + _above(scores, own)
        if repeats:
            _top(scores, answer.items[part], answer.scores[part])
        _mask(scores, histories)
        scores.scatter_(1, target, own)  # a repeated target stays an answer
        answer.target_rank_masked[part] = _at_least(scores, own)
        if not repeats:
            _mask(scores, histories)
            _top(scores, answer.items[part], answer.scores[part])
    return answer


@torch.inference_mode()
def top_items(scorer: Scorer, sequences: Sequences, users: np.ndarray, ends: np.ndarray, count: int, batch: int = 256) -> np.ndarray:
    """The best items outside each history, (rows, count) int32, 0 where fewer are left.

    Args:
        scorer: the retriever.
        sequences: the events that histories are cut from.
        users: (rows,) user numbers.
        ends: (rows,) positions in `sequences.items` before which each history ends.
        count: items per row.
        batch: rows scored at a time.
    """
    found = np.zeros((len(users), count), dtype=np.int32)
    kept = np.full((len(users), count), -np.inf, dtype=np.float32)
    for rows, histories, scores in _scored(scorer, users, lambda row: sequences.history(users[row], ends[row]), batch):
        _mask(scores, histories)
        _top(scores, found[rows], kept[rows])
    return found


@torch.inference_mode()
def scores_of(scorer: Scorer, users: np.ndarray, histories: list[np.ndarray], items: np.ndarray, batch: int) -> np.ndarray:
    """Scores of some items of each row.

    Args:
        scorer: the retriever.
        users: (rows,) user numbers.
        histories: what came before, row by row.
        items: (rows, count), from 1.
        batch: rows scored at a time.

    Returns:
        (rows, count) float32.

    Raises:
        UserError: when a score is NaN or infinite; it names the user.
    """
    found = np.zeros(items.shape, dtype=np.float32)
    for rows, _, scores in _scored(scorer, users, histories.__getitem__, batch):
        found[rows] = scores.gather(1, torch.from_numpy(items[rows].astype(np.int64)) - 1).numpy()
    return found


@torch.inference_mode()
def ranks_of(scorer: Scorer, users: np.ndarray, histories: list[np.ndarray], targets: np.ndarray, batch: int) -> np.ndarray:
    """Rank of each row's target among all items, 1-based, ties against it, the history not masked, (rows,) int32.

    Args:
        scorer: the retriever.
        users: (rows,) user numbers.
        histories: what came before, row by row.
        targets: (rows,), from 1.
        batch: rows scored at a time.

    Raises:
        UserError: when a score is NaN or infinite; it names the user.
    """
    found = np.zeros(len(users), dtype=np.int32)
    for rows, _, scores in _scored(scorer, users, histories.__getitem__, batch):
        found[rows] = _at_least(scores, scores.gather(1, _columns(targets[rows])))
    return found


def rows_per_batch(item_count: int, budget_mb: int = 384) -> int:
    """How many rows of full-catalogue scores fit in a budget (three float32 copies live at once); more than 256 are no faster."""
    return max(1, min(256, budget_mb * 2**20 // (12 * item_count)))
