"""A checksum of what a retriever is trained on: `retrieve` records it, `audit` makes it anew from the training events alone."""

from __future__ import annotations

import hashlib

import numpy as np

from llmrec.config import Config
from llmrec.data.sequences import Sequences


def checksum(config: Config, sequences: Sequences) -> str:
    """Sha256 of what the retriever's own code makes of the events to train on.

    A run whose training saw more than the training events records another one than `sequences.train_only()` gives.

    Args:
        config: which retriever, with what windows and seed.
        sequences: the events that the training is handed.
    """
    total = hashlib.sha256()
    for array in _arrays(config, sequences):
        total.update(np.append(array, -1).astype("<i8").tobytes())  # -1 parts them
    return total.hexdigest()


def _arrays(config: Config, sequences: Sequences) -> list[np.ndarray]:
    """Pieces of histories as an epoch cuts them; LightFM's positive users and items; counts of the items."""
    from llmrec.retrievers import lightfm, windows
    from llmrec.retrievers.popularity import Popularity

    if config.retrieval.kind == "sequence":
        return windows.cut(sequences, config.training, np.random.default_rng(config.seed))
    if config.retrieval.kind == "lightfm":
        matrix = lightfm.training_matrix(sequences)
        return [matrix.row, matrix.col]
    return [Popularity.fit(sequences).counts.numpy()]
