"""What lists of recommendations are like, whatever the user took next: how much of the catalogue they use, how popular, how alike.

    coverage     different items in all lists / items of the catalogue
    gini         Gini coefficient of how often each item of the catalogue is recommended: 0 all alike, 1 - 1/items one item alone
    popularity   mean over users of the mean number of training users of their items   (Abdollahpouri et al. 2019, "ARP")
    novelty      mean over users of the mean of -log2(training users of the item / users) over their items: "mean inverse user
                 frequency", the self-information of Zhou et al. 2010 (PNAS 107, 4511)
    diversity    mean over users of 1 - mean over pairs of their items of |words in both titles| / |words in either|

Coverage and Gini depend on the number of users, so they compare systems on the same users only. None of these is better the higher
it is: random lists win most of them.

Lists are a matrix of item ids, (users, k) int, 0 where a user has fewer (see `data.tables.padded`); users without any item count in no
mean over users.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def measures(lists: np.ndarray, training_users: np.ndarray, users: int, words: Sequence[Collection[str]]) -> dict[str, float]:
    """All of them.

    Args:
        lists: each user's k items, (users, k).
        training_users: how many users have each item in training, (items + 1,); element 0 is padding.
        users: users in training.
        words: words of each item's title; element 0 is padding.

    Returns:
        "coverage@k", "gini@k", "popularity@k", "novelty@k", "diversity@k".
    """
    items, k = len(training_users) - 1, lists.shape[1]
    found = {
        "coverage": coverage(lists, items),
        "gini": gini(np.bincount(lists.ravel(), minlength=items + 1)[1:]),
        "popularity": average_popularity(lists, training_users),
        "novelty": novelty(lists, training_users, users),
        "diversity": diversity(lists, words),
    }
    return {f"{name}@{k}": value for name, value in found.items()}


def coverage(lists: np.ndarray, item_count: int) -> float:
    """Share of the catalogue's items that are recommended to anyone."""
    return len(np.unique(lists[lists > 0])) / item_count


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of counts over the whole catalogue, from 0 to 1 - 1/items; 0 where nothing is counted.

    Half the mean absolute difference of two items' counts, relative to the mean count.

    Args:
        counts: recommendations of each item, (items,), zeros included.
    """
    rising = np.sort(np.asarray(counts, dtype=np.float64))
    n, total = len(rising), rising.sum()
    return float(((2 * np.arange(1, n + 1) - n - 1) * rising).sum() / (n * total)) if total else 0.0


def average_popularity(lists: np.ndarray, training_users: np.ndarray) -> float:
    """How many training users the recommended items have, on average over each list and then over users."""
    return _mean_of_lists(lists, np.asarray(training_users, dtype=np.float64))


def novelty(lists: np.ndarray, training_users: np.ndarray, users: int) -> float:
    """How surprising the recommended items are in bits; 0 for what everybody has. An item nobody has in training counts as one user's."""
    return _mean_of_lists(lists, -np.log2(np.maximum(training_users, 1) / users) + 0.0)


def _mean_of_lists(lists: np.ndarray, of_item: np.ndarray) -> float:
    real = lists > 0
    length = real.sum(axis=1)
    totals = np.where(real, of_item[lists], 0.0).sum(axis=1)
    return float((totals[length > 0] / length[length > 0]).mean()) if length.any() else 0.0


def diversity(lists: np.ndarray, words: Sequence[Collection[str]]) -> float:
    """How little the titles of a user's items have in common, 0 to 1; a user with fewer than two items does not count.

    Args:
        lists: each user's items.
        words: words of each item's title; element 0 is padding. Two titles without any word are alike.
    """
    first, second = np.triu_indices(lists.shape[1], k=1)
    a, b = lists[:, first].astype(np.int64), lists[:, second].astype(np.int64)
    real = (a > 0) & (b > 0)
    row, _ = np.nonzero(real)
    # Users share most of their pairs: each pair of titles is compared once.
    pairs, place = np.unique(np.minimum(a, b)[real] * len(words) + np.maximum(a, b)[real], return_inverse=True)
    sets = [frozenset(of_title) for of_title in words]
    alike = np.array([_jaccard(sets[pair // len(words)], sets[pair % len(words)]) for pair in pairs.tolist()])
    compared = np.bincount(row, minlength=len(lists))
    if not len(row):
        return 0.0
    total = np.bincount(row, alike[place], minlength=len(lists))
    return 1 - float((total[compared > 0] / compared[compared > 0]).mean())


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
