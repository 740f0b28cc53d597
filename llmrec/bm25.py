"""Items found by words of their titles: BM25 over a catalogue, which turns written queries into recommendations.

    score(title, query) = sum over the query's words w of idf(w) tf(w, title) / (tf(w, title) + k1 (1 - b + b |title| / mean |title|))
    idf(w) = ln(1 + (N - n(w) + 1/2) / (n(w) + 1/2))

Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3.5, with the idf of Lucene, which is
never negative; bm25s calls the variant "lucene". N titles, n(w) of them with w, tf(w, title) times in this one, |title| words long.

A word is a run of letters and digits of any script, in lower case; none is stemmed and none is left out, as a title has few.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

import numpy as np
from bm25s import BM25

from llmrec.errors import UserError


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


class TitleIndex:
    """The titles of a catalogue, ready to be searched.

    Args:
        titles: title of each item; that of item 0, which is padding, is not read. Items may share a title.
        popularity: how often each item occurs in training, (items,): of equal scores the more popular item comes first, then
            the one with the smaller number.
        k1: how much more a word counts that a title repeats, from 0.
        b: how much less a word counts in a long title, from 0, not at all, to 1.

    Attributes:
        items: all of them, the most popular first.

    Raises:
        UserError: k1 or b is out of its range.
    """

    def __init__(self, titles: Sequence[str], popularity: np.ndarray, k1: float = 1.5, b: float = 0.75):
        # From the most popular on, so that of documents with equal scores the first is the item wanted.
        self.items = 1 + np.argsort(-np.asarray(popularity, dtype=np.float64)[1:], kind="stable")
        self.vocabulary: dict[str, int] = {}
        self._documents = [[self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words(titles[item])] for item in self.items]
        self.weigh(k1, b)

    def weigh(self, k1: float, b: float) -> None:
        """Take other values of k1 and b."""
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"BM25 with k1 {k1} and b {b}: take a k1 of at least 0 and a b from 0 to 1")
        self._scorer = BM25(k1=k1, b=b, method="lucene")
        if self.vocabulary:
            self._scorer.index((self._documents, self.vocabulary), create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """BM25 score of each title in the order of `items`, (items,) float32."""
        known = [self.vocabulary[word] for word in words(query) if word in self.vocabulary]
        return self._scorer.get_scores_from_ids(known) if known else np.zeros(len(self.items), dtype=np.float32)

    def recommend(self, queries: Sequence[str], count: int, exclude: Collection[int] = ()) -> list[int]:
        """Items for several queries, the first query's first (GPT4Rec).

        Every query gives as many items as any other, the first ones one more where `count` cannot be divided, and skips those
        that an earlier one has given. What a query cannot give, as few titles have its words, is filled from further down the lists, in
        the order of the queries; then by popularity.

        Args:
            queries: texts, the best first; more than `count` are not read.
            count: how many items.
            exclude: items that are not to be recommended.

        Returns:
            `count` different items; fewer where the catalogue has no more.
        """
        return self.lists(queries, [count], exclude)[count]

    def lists(self, queries: Sequence[str], counts: Sequence[int], exclude: Collection[int] = ()) -> dict[int, list[int]]:
        """What `recommend` gives for each of several counts; every query is searched for once."""
        unwanted = set(exclude)
        most = max(counts)
        found = [self._found(query, most + len(unwanted)) for query in queries[:most]]
        return {count: self._shared(found[:count], count, unwanted) for count in counts}

    def _shared(self, found: Sequence[Sequence[int]], count: int, unwanted: set[int]) -> list[int]:
        """`count` items, of each query's list as many as of any other."""
        taken: dict[int, None] = {}
        for nth, of_query in enumerate(found):
            share = (count - nth - 1) // len(found) + 1
            fresh = (item for item in of_query if item not in taken and item not in unwanted)
            taken |= dict.fromkeys(itertools.islice(fresh, share))
        for item in itertools.chain(*found, map(int, self.items)):
            if len(taken) == count:
                break
            if item not in unwanted:
                taken[item] = None
        return list(taken)

    def _found(self, query: str, most: int) -> list[int]:
        """Items with a word of the query, best first."""
        scores = self.scores(query)
        matching = np.flatnonzero(scores)
        best = np.argsort(-scores[matching], kind="stable")[:most]
        return self.items[matching[best]].tolist()


def choose_bm25(
    index: TitleIndex,
    queries: Sequence[Sequence[str]],
    targets: Sequence[int],
    count: int,
    exclude: Sequence[Collection[int]],
    k1s: Sequence[float],
    bs: Sequence[float],
) -> list[dict[str, float]]:
    """Give `index` the k1 and b with which written queries find most targets; chosen when the model that writes is trained (GPT4Rec).

    Args:
        index: takes the best pair.
        queries: what was written for each user of a validation.
        targets: the item that each of them took next.
        count: how many items are recommended.
        exclude: items that are not recommended to each user.
        k1s: values of k1 to try.
        bs: values of b to try.

    Returns:
        A row for every pair, the best first: k1, b, `recall`, the share of targets among `count` items, and `mrr`, the mean of
        1 / their places there. Of pairs with equal recalls that with the higher mrr is better; of equals the first that was tried.

    Raises:
        UserError: there are no users.
    """
    if not len(targets):
        raise UserError("k1 and b of BM25 are chosen on validation users, and there are none: raise limit_users")
    table = []
    for k1, b in itertools.product(k1s, bs):
        index.weigh(k1, b)
        users = zip(queries, targets, exclude, strict=True)
        found = [(index.recommend(written, count, without), target) for written, target, without in users]
        places = [items.index(target) + 1 for items, target in found if target in items]
        recall, mrr = len(places) / len(found), sum(1 / place for place in places) / len(found)
        table.append({"k1": k1, "b": b, "recall": recall, "mrr": mrr})
    table.sort(key=lambda row: (-row["recall"], -row["mrr"]))
    index.weigh(table[0]["k1"], table[0]["b"])
    return table
