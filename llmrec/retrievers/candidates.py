"""Exact top-N candidates and full-catalogue ranks, streamed in batches: never a users x items matrix."""

from __future__ import annotations

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
        target_rank_masked: the same with the history's items taken out.
        items: candidates of each case, best first, (cases, count) int32; 0 where fewer items are left.
        scores: their scores, (cases, count) float32; -inf where there is no item.
    """

    target_rank: np.ndarray
    target_rank_masked: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def _check(scores: Tensor, users: np.ndarray) -> None:
    bad = ~torch.isfinite(scores.sum(1))  # NaN and infinities stay in a sum; one that overflows is as useless
    if bad.any():
        raise UserError(f"the retriever's scores of user {users[int(bad.nonzero()[0])]} are not finite: lower training.learning_rate")


def _top(scores: Tensor, items: np.ndarray, kept: np.ndarray) -> None:
    """Write the best items of each row and their scores into `items` and `kept`, (rows, count)."""
    values, index = scores.topk(min(items.shape[1], scores.shape[1]), dim=1)
    width = values.shape[1]
    kept[:, :width] = values.numpy()
    items[:, :width] = np.where(kept[:, :width] > -np.inf, index.numpy() + 1, 0)


def _ranks(scores: Tensor, own: Tensor) -> np.ndarray:
    """How many scores of each row are at least the target's `own`, (rows, 1). Row by row: torch's sum would copy all to int64."""
    return np.array([np.count_nonzero(row) for row in (scores >= own).numpy()], dtype=np.int32)


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
        np.zeros((len(cases), count), dtype=np.int32),
        np.full((len(cases), count), -np.inf, dtype=np.float32),
    )
    for start in range(0, len(cases), batch):
        part = slice(start, start + batch)
        users, ends = cases.users[part], cases.ends[part]
        histories = [sequences.history(user, end) for user, end in zip(users, ends, strict=True)]
        scores = scorer.scores(users, histories).cpu()
        _check(scores, users)
        target = torch.from_numpy(cases.targets[part].astype(np.int64))[:, None] - 1
        own = scores.gather(1, target)
        answer.target_rank[part] = _ranks(scores, own)
        if repeats:
            _top(scores, answer.items[part], answer.scores[part])
        _mask(scores, histories)
        scores.scatter_(1, target, own)  # a repeated target stays an answer
        answer.target_rank_masked[part] = _ranks(scores, own)
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
    for start in range(0, len(users), batch):
        rows = slice(start, start + batch)
        histories = [sequences.history(user, end) for user, end in zip(users[rows], ends[rows], strict=True)]
        scores = scorer.scores(users[rows], histories).cpu()
        _check(scores, users[rows])
        _mask(scores, histories)
        _top(scores, found[rows], kept[rows])
    return found


def rows_per_batch(item_count: int, budget_mb: int = 384) -> int:
    """How many rows of full-catalogue scores fit in a budget (three float32 copies live at once); more than 256 are no faster."""
    return max(1, min(256, budget_mb * 2**20 // (12 * item_count)))
