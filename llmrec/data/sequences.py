"""Every user's events in time order, as flat numpy arrays: what models and pair builders read.

No torch and no tables here. User u's events are `items[offsets[u]:offsets[u + 1]]`; users count from 0, items
from 1 (0 is padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

TRAIN, VALID, TEST, PAST = 0, 1, 2, 3
SPLITS = ("train", "valid", "test", "past")


@dataclass(frozen=True)
class Cases:
    """What a model is asked at evaluation: given the user's events before position `ends`, which item comes next?

    Attributes:
        split: "valid" or "test".
        users: user numbers, (cases,) int32, ascending; a user has several cases where a split asks about successive targets.
        targets: the item that came next, (cases,) int32.
        ends: position of the target in `Sequences.items`, (cases,) int64. The history ends before it.
    """

    split: str
    users: np.ndarray
    targets: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: np.ndarray) -> Cases:
        """The cases at `index` (positions or a mask)."""
        return Cases(self.split, self.users[index], self.targets[index], self.ends[index])

    def of(self, users: np.ndarray) -> Cases:
        """The cases of these users, who have one each, in their order."""
        return self.take(np.searchsorted(self.users, users))


@dataclass(frozen=True)
class Sequences:
    """All users' events.

    Attributes:
        offsets: (users + 1,) int64.
        items: (events,) int32, 1..item_count.
        ratings: (events,) float32, NaN where there is none.
        split: (events,) int8: TRAIN, VALID, TEST, or PAST for events that are history of later targets and nothing else. A user's
            training events come before his others.
        item_count: number of items; ids run from 1 to it.
    """

    offsets: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    split: np.ndarray
    item_count: int

    @classmethod
    def from_table(cls, interactions: pl.DataFrame, item_count: int, user_count: int) -> Sequences:
        """Read the `interactions` table, which is sorted by user and time (see docs/architecture.md)."""
        import polars as pl

        counts = np.bincount(interactions["user"].to_numpy(), minlength=user_count)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            items=interactions["item"].to_numpy(),
            ratings=interactions["rating"].cast(pl.Float32).fill_null(float("nan")).to_numpy(),
            split=interactions["split"].replace_strict({s: i for i, s in enumerate(SPLITS)}, return_dtype=pl.Int8).to_numpy(),
            item_count=item_count,
        )

    @property
    def user_count(self) -> int:
        return len(self.offsets) - 1

    def train_ends(self) -> np.ndarray:
        """Where each user's training part ends, as positions in `items`, (users,) int64."""
        before = np.concatenate([[0], np.cumsum(self.split == TRAIN)])
        return self.offsets[:-1] + before[self.offsets[1:]] - before[self.offsets[:-1]]

    def train_part(self, user: int) -> np.ndarray:
        """The user's training items in time order."""
        start, stop = self.offsets[user], self.offsets[user + 1]
        return self.items[start:stop][self.split[start:stop] == TRAIN]

    def training_counts(self) -> np.ndarray:
        """Training events of each item, (item_count + 1,) int64; element 0 is padding."""
        return np.bincount(self.items[self.split == TRAIN], minlength=self.item_count + 1)

    def train_only(self) -> Sequences:
        """The same users with nothing but their training events: what pair builders get, so that they cannot leak."""
        keep = self.split == TRAIN
        counts = np.concatenate([[0], np.cumsum(keep)])
        return Sequences(counts[self.offsets], self.items[keep], self.ratings[keep], self.split[keep], self.item_count)

    def cases(self, split: str) -> Cases:
        """The evaluation cases of "valid" or "test": every event of that split, with all that came before it as history."""
        ends = np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)
        users = (np.searchsorted(self.offsets, ends, side="right") - 1).astype(np.int32)
        return Cases(split, users, self.items[ends], ends)

    def history(self, user: int, end: int) -> np.ndarray:
        """The user's items before position `end`, oldest first."""
        return self.items[self.offsets[user] : end]

    def histories(self, cases: Cases) -> list[np.ndarray]:
        """The items before each case, oldest first."""
        return [self.history(int(user), int(end)) for user, end in zip(cases.users, cases.ends, strict=True)]
