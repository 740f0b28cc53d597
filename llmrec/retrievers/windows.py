"""Training windows: pieces of the training histories, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmrec.data.sequences import Sequences


def cut(sequences: Sequences, length: int, *, latest_only: bool, shift: np.random.Generator | None = None) -> list[np.ndarray]:
    """Pieces of each user's training part with up to `length` targets (`length + 1` items), cut from the latest end.

    Args:
        sequences: all users.
        length: positions of a window.
        latest_only: only the last window of each user, else the whole history in pieces.
        shift: moves the borders of a user's pieces by a random amount, so that every epoch has other left edges.
    """
    pieces = []
    for start, end in zip(sequences.offsets[:-1], sequences.train_ends(), strict=True):
        history = sequences.items[start:end]
        if latest_only:
            pieces.append(history[-(length + 1) :])
            continue
        last = len(history)
        if shift is not None and last > length + 1:
            first = int(shift.integers(1, length + 1))
            pieces.append(history[-(first + 1) :])
            last -= first
        pieces += [history[max(0, stop - length - 1) : stop] for stop in range(last, 1, -length)]
    return [piece for piece in pieces if len(piece) > 1]


def batches(pieces: list[np.ndarray], size: int, order: np.random.Generator, run: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of pieces of similar length: (inputs, targets), each (batch, longest), padded with 0 on the right.

    Pieces are sorted by length inside shuffled runs of `run` batches, then the batches are shuffled.
    """
    lengths = np.array([len(piece) for piece in pieces])
    shuffled = order.permutation(len(pieces))
    groups = []
    for start in range(0, len(shuffled), run * size):
        bucket = shuffled[start : start + run * size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        groups += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for at in order.permutation(len(groups)):
        rows = pad([pieces[index] for index in groups[at]])
        yield rows[:, :-1], rows[:, 1:]


def pad(rows: list[np.ndarray]) -> Tensor:
    """(rows, longest) int64, padded with 0 on the right."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)
