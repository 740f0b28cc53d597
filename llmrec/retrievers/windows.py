"""Training windows: pieces of the training histories, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmrec.config import Training
from llmrec.data.sequences import Sequences


def cut(sequences: Sequences, training: Training, random: np.random.Generator) -> list[np.ndarray]:
    """One epoch's pieces of the training histories, each of up to `max_length` inputs and the target that follows.

    Args:
        sequences: all users.
        training: `windows` says which pieces:
            all: the whole history, in pieces from its latest end; their borders move by a random amount, so that every
            epoch has other left edges. Every event but a history's first is a target once.
            last: the latest piece alone.
            prefixes: up to `prefixes_per_user` different prefixes of each user, whose last item is the one target.
        random: of the borders and prefixes.
    """
    length, pieces = training.max_length, []
    for start, end in zip(sequences.offsets[:-1], sequences.train_ends(), strict=True):
        history = sequences.items[start:end]
        last = len(history)
        if training.windows == "prefixes":
            count = min(training.prefixes_per_user, max(0, last - 1))
            stops = random.choice(np.arange(2, last + 1), count, replace=False).tolist() if count else []
        elif training.windows == "last":
            stops = [last]
        else:
            stops = list(range(last, 1, -length))
            if last > length + 1:
                first = int(random.integers(1, length + 1))
                pieces.append(history[-(first + 1) :])
                stops = list(range(last - first, 1, -length))
        pieces += [history[max(0, stop - length - 1) : stop] for stop in stops]
    return [piece for piece in pieces if len(piece) > 1]


def batches(
    pieces: list[np.ndarray], size: int, order: np.random.Generator, *, last_only: bool = False, run: int = 20
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of pieces of similar length: (inputs, targets), each (batch, longest), padded with 0 on the right.

    Pieces are sorted by length inside shuffled runs of `run` batches, then the batches are shuffled.

    Args:
        pieces: of `cut`.
        size: pieces per batch.
        order: of the shuffling.
        last_only: whether only a piece's last item is a target; the others' places hold 0.
        run: batches per run.
    """
    lengths = np.array([len(piece) for piece in pieces])
    shuffled = order.permutation(len(pieces))
    groups = []
    for start in range(0, len(shuffled), run * size):
        bucket = shuffled[start : start + run * size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        groups += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for at in order.permutation(len(groups)):
        group = [pieces[index] for index in groups[at]]
        inputs = pad([piece[:-1] for piece in group])  # a target is nobody's input: some mixers see the future
        targets = pad([piece[1:] for piece in group])
        if last_only:
            targets[:, :-1] *= inputs[:, 1:] == 0
        yield inputs, targets


def pad(rows: list[np.ndarray]) -> Tensor:
    """(rows, longest) int64, padded with 0 on the right."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)
