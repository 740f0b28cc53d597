"""Which items lose in LightFM's preference pairs: unseen items, picked by a LightFM that was trained on the training part.

`worst` is what arXiv 2408.05606 does. It is degenerate: the lowest score is nearly the same few unpopular titles for every
user, so a ranker can win by avoiding ten titles. `hardest` is the other end. `sampled` takes items that LightFM
rates low for this user but that are about as popular as the winner, so that popularity does not give the answer away.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from llmrec.data.sequences import Sequences


def popularity_deciles(train: Sequences) -> np.ndarray:
    """Decile of every item by its number of training events, 0 (least) to 9; equal counts share one. (items + 1,) int64."""
    counts = np.bincount(train.items, minlength=train.item_count + 1)
    return np.searchsorted(np.quantile(counts[1:], np.arange(1, 10) / 10), counts, side="right")


def choose_losers(
    kind: Literal["worst", "hardest", "sampled"],
    scores: np.ndarray,
    seen: np.ndarray,
    winner: int,
    deciles: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Items of this user that lose against `winner`.

    Args:
        kind: `worst` the lowest scored unseen items, `hardest` the highest scored; `sampled` drawn uniformly from the unseen
            items in the lowest quartile of the user's scores and in the winner's popularity decile. Deciles next to it are
            let in, nearest first, until there are enough.
        scores: LightFM's scores of the user, (items,); element j is item j + 1.
        seen: the user's training items.
        winner: the item that wins.
        deciles: from `popularity_deciles`.
        count: how many losers.
        rng: for `sampled`.

    Returns:
        `count` different items, fewer where the user has not that many unseen ones.
    """
    unseen = np.setdiff1d(np.arange(1, len(scores) + 1), seen)
    ascending = unseen[np.argsort(scores[unseen - 1], kind="stable")]
    if kind == "worst":
        return ascending[:count].tolist()
    if kind == "hardest":
        return ascending[::-1][:count].tolist()
    low = ascending[: max(count, len(ascending) // 4)]
    distance = np.abs(deciles[low] - deciles[winner])
    reach = np.sort(distance)[:count].max(initial=0)  # the smallest that lets in enough
    allowed = low[distance <= reach]
    return rng.choice(allowed, size=min(count, len(allowed)), replace=False).tolist()
