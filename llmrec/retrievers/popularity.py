"""Popularity: the floor every retriever has to pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.data.sequences import Sequences


@dataclass
class Popularity:
    """Scores an item by its number of training events (see `candidates.Scorer`).

    Attributes:
        counts: (items,) float32.
    """

    counts: Tensor

    @classmethod
    def fit(cls, sequences: Sequences) -> Popularity:
        """Count the training events."""
        return cls(torch.from_numpy(sequences.training_counts()[1:].astype(np.float32)))

    def scores(self, users: np.ndarray, histories: list[np.ndarray]) -> Tensor:
        """The same scores for everyone, (users, items)."""
        return self.counts.repeat(len(users), 1)

    def state(self) -> dict[str, Tensor]:
        """What model.safetensors holds."""
        return {"counts": self.counts}
