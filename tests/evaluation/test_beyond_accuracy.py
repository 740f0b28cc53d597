"""What lists are like: each measure by hand, and laws that hold for all lists."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.tables import padded
from llmrec.evaluation.beyond_accuracy import average_popularity, coverage, diversity, gini, measures, novelty

WORDS = [[], ["toy", "story"], ["toy", "story", "2"], ["heat"], ["heat"], []]
TRAINING_USERS = np.array([0, 8, 4, 2, 1, 0])

LISTS = st.lists(st.lists(st.integers(1, 5), unique=True, max_size=4), min_size=1, max_size=12)


def test_diversity_is_one_minus_the_mean_overlap_of_titles():
    assert diversity(padded([[1, 2, 3]]), WORDS) == pytest.approx(1 - (2 / 3 + 0 + 0) / 3)
    assert diversity(padded([[3, 4]]), WORDS) == 0  # two items of one title
    assert diversity(padded([[1, 3], [3, 4]]), WORDS) == 0.5  # every user counts once
    assert diversity(padded([[1, 3], [4]]), WORDS) == 1  # one item has no pair
    assert diversity(padded([[5, 5]]), WORDS) == 0  # titles without a word are alike
    assert diversity(padded([[5, 1]]), WORDS) == 1
    assert diversity(padded([[1], []]), WORDS) == 0


@settings(max_examples=50)
@given(LISTS)
def test_diversity_pair_by_pair(lists):
    def overlap(a, b):
        either = set(WORDS[a]) | set(WORDS[b])
        return len(set(WORDS[a]) & set(WORDS[b])) / len(either) if either else 1

    of_users = [np.mean([overlap(a, b) for a, b in combinations(items, 2)]) for items in lists if len(items) > 1]
    assert diversity(padded(lists), WORDS) == pytest.approx(1 - np.mean(of_users) if of_users else 0)


def test_coverage_counts_different_items():
    assert coverage(padded([[1, 2], [2, 3], []]), 5) == 3 / 5
    assert coverage(padded([[]]), 5) == 0


def test_gini_by_hand():
    assert gini(np.array([3, 3, 3])) == 0
    assert gini(np.array([0, 0, 0, 7])) == 3 / 4  # all for one: 1 - 1/items
    assert gini(np.array([1, 3])) == pytest.approx(0.25)  # |1-3| over all four ordered pairs: 4/4 = 1, half of it over the mean 2
    assert gini(np.zeros(4)) == 0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts):
    x = np.array(counts, float)
    assert gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / 2 / x.mean(), abs=1e-12)
    assert gini(10 * x[::-1]) == pytest.approx(gini(x))


def test_popularity_and_novelty_by_hand():
    lists = padded([[1, 2], [3], []])
    assert average_popularity(lists, TRAINING_USERS) == ((8 + 4) / 2 + 2) / 2
    assert novelty(lists, TRAINING_USERS, users=8) == ((0 + 1) / 2 + 2) / 2  # -log2 of 8/8, 4/8 and 2/8
    assert novelty(padded([[5]]), TRAINING_USERS, users=8) == 3  # unknown in training: as if one of eight had it
    assert average_popularity(padded([[]]), TRAINING_USERS) == 0


@settings(max_examples=50)
@given(LISTS)
def test_all_together(lists):
    rows = np.zeros((len(lists), 10), dtype=np.int32)
    for row, items in zip(rows, lists, strict=True):
        row[: len(items)] = items
    found = measures(rows, TRAINING_USERS, 8, WORDS)
    assert list(found) == ["coverage@10", "gini@10", "popularity@10", "novelty@10", "diversity@10"]
    counts = Counter(item for items in lists for item in items)
    assert found["coverage@10"] == len(counts) / 5
    assert found["gini@10"] == gini(np.array([counts[item] for item in range(1, 6)]))
    assert 0 <= found["gini@10"] <= 4 / 5 + 1e-12
    assert 0 <= found["novelty@10"] <= 3
    assert 0 <= found["diversity@10"] <= 1
