"""Exact top-N candidates and full-catalogue ranks, streamed in batches: never a users x items matrix."""

from __future__ import annotations

from collections.abc import Iterator
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
        items: candidates of each case, best first; shorter where fewer items are left.
        scores: their scores.
    """

    target_rank: np.ndarray
    target_rank_masked: np.ndarray
    items: list[np.ndarray]
    scores: list[np.ndarray]


def _check(scores: Tensor, users: np.ndarray) -> None:
    bad = ~torch.isfinite(scores).all(1)
    if bad.any():
        raise UserError(f"the retriever's scores of user {users[int(bad.nonzero()[0])]} are not finite: lower training.learning_rate")


def _top(scores: Tensor, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    values, index = scores.topk(min(count, scores.shape[1]), dim=1)
    for row_items, row_scores in zip((index + 1).numpy().astype(np.int32), values.numpy(), strict=True):
        real = row_scores > -np.inf
        yield row_items[real], row_scores[real]


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
    plain, masked, items, kept = [], [], [], []
    for start in range(0, len(cases), batch):
        part = cases.take(np.arange(start, min(start + batch, len(cases))))
        histories = [sequences.history(user, end) for user, end in zip(part.users, part.ends, strict=True)]
        scores = scorer.scores(part.users, histories).cpu()
        _check(scores, part.users)
        target = torch.from_numpy(part.targets.astype(np.int64))[:, None] - 1
        own = scores.gather(1, target)
        plain.append((scores >= own).sum(1).numpy())
        if repeats:
            top = list(_top(scores, count))
        _mask(scores, histories)
        scores.scatter_(1, target, own)  # a repeated target stays an answer
        masked.append((scores >= own).sum(1).numpy())
        if not repeats:
            _mask(scores, histories)
            top = list(_top(scores, count))
        items += [row for row, _ in top]
        kept += [row for _, row in top]
    return Ranked(np.concatenate(plain), np.concatenate(masked), items, kept)


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
    for start in range(0, len(users), batch):
        rows = slice(start, start + batch)
        histories = [sequences.history(user, end) for user, end in zip(users[rows], ends[rows], strict=True)]
        scores = scorer.scores(users[rows], histories).cpu()
        _check(scores, users[rows])
        _mask(scores, histories)
        for at, (items, _) in enumerate(_top(scores, count)):
            found[start + at, : len(items)] = items
    return found


def rows_per_batch(item_count: int, budget_mb: int = 96) -> int:
    """How many rows of full-catalogue scores fit in a budget (three float32 copies live at once)."""
    return max(1, min(1024, budget_mb * 2**20 // (12 * item_count)))
