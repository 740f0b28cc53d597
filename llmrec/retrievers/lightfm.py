"""LightFM with the WARP loss (arXiv 1507.08439), and its vectors as a retriever.

One thread: with more, LightFM's updates race and the same seed gives another model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_matrix
from torch import Tensor

from llmrec import config
from llmrec.data.sequences import TRAIN, Sequences
from llmrec.progress import track

PARTS = tuple(
    f"{side}_{what}{kind}"
    for side in ("item", "user")
    for what in ("embedding", "bias")
    for kind in (("s", "_gradients", "_momentum") if what == "embedding" else ("es", "_gradients", "_momentum"))
)


@dataclass
class LightFM:
    """Scores a user and an item by the product of their vectors and the item's bias (see `candidates.Scorer`).

    Attributes:
        users: (users, components) float32.
        items: (items, components) float32.
        biases: (items,) float32.
    """

    users: Tensor
    items: Tensor
    biases: Tensor

    @classmethod
    def fit(cls, sequences: Sequences, settings: config.LightFM, seed: int, checkpoints: Path) -> LightFM:
        """Train on the training events, all of them as positives; goes on from the last checkpointed epoch.

        Args:
            sequences: all users' events.
            settings: sizes and rates.
            seed: of initialisation, order and negatives.
            checkpoints: a folder that survives a kill.
        """
        from lightfm import LightFM as Package

        positive = training_matrix(sequences)
        model = Package(
            no_components=settings.components,
            loss="warp",
            learning_rate=settings.learning_rate,
            max_sampled=settings.max_sampled,
            item_alpha=settings.item_alpha,
            user_alpha=settings.user_alpha,
            random_state=seed,
        )
        model.fit_partial(positive, epochs=0)
        path = checkpoints / "lightfm.safetensors"
        done = 0
        if path.exists():
            state = load_file(path)
            done = int(state.pop("epoch")[0])
            vars(model).update(state)
        for epoch in track(range(done, settings.epochs), "LightFM epochs"):
            model.random_state = np.random.RandomState([seed, epoch])  # so that a resumed epoch draws what it would have drawn
            model.fit_partial(positive, epochs=1, num_threads=1)
            beside = path.with_name(".lightfm.tmp")
            save_file({name: vars(model)[name] for name in PARTS} | {"epoch": np.array([epoch + 1])}, beside)
            os.replace(beside, path)
        return cls(torch.from_numpy(model.user_embeddings), torch.from_numpy(model.item_embeddings), torch.from_numpy(model.item_biases))

    def scores(self, users: np.ndarray, histories: list[np.ndarray]) -> Tensor:
        """Scores of all items, (users, items); the histories do not matter, the user's vector has them."""
        return self.users[torch.from_numpy(users.astype(np.int64))] @ self.items.T + self.biases

    def state(self) -> dict[str, Tensor]:
        """What model.safetensors holds."""
        return {"users": self.users, "items": self.items, "biases": self.biases}


def training_matrix(sequences: Sequences) -> coo_matrix:
    """A one for every training event, (users, items)."""
    keep = sequences.split == TRAIN
    users = np.repeat(np.arange(sequences.user_count), np.diff(sequences.offsets))[keep]
    items = sequences.items[keep] - 1
    return coo_matrix((np.ones(len(items), dtype=np.float32), (users, items)), shape=(sequences.user_count, sequences.item_count))
