"""The table of recommendations from the whole catalogue, by hand."""

import math

import pytest

from llmrec.evaluation.catalogue import COLUMNS, KS, render, table

WORDS = [[], ["toy", "story"], ["toy", "story", "2"], ["heat"], ["heat"], []]


def lists(*users):
    return {k: [list(items[:k]) for items in users] for k in KS}


def test_hits_are_those_of_each_ks_own_lists():
    words = [[], *([str(n)] for n in range(1, 31))]
    first = [*range(1, 21)]
    systems = {"popularity": lists(first, first), "orpo": {5: [[9], [1]], 10: [[2, 3], [4]], 20: [[7, 8, 9], []]}}
    found = table(systems, [3, 12], words, resamples=50)
    popularity, orpo = found["overall"]["popularity"], found["overall"]["orpo"]
    assert (popularity["hr@5"], popularity["hr@10"], popularity["hr@20"]) == (0.5, 0.5, 1.0)
    assert popularity["ndcg@20"] == pytest.approx((1 / math.log2(4) + 1 / math.log2(13)) / 2)
    assert popularity["mrr@20"] == pytest.approx((1 / 3 + 1 / 12) / 2)
    assert (orpo["hr@5"], orpo["hr@10"], orpo["hr@20"]) == (0.0, 0.5, 0.0)
    assert orpo["ndcg@10"] == pytest.approx(1 / math.log2(3) / 2)
    assert popularity["coverage@20"] == 20 / 30
    assert popularity["diversity@5"] == 1
    assert list(popularity) == COLUMNS
    assert [(c["a"], c["b"], c["metric"]) for c in found["comparisons"]] == [("orpo", "popularity", m) for m in ("hr@10", "ndcg@10")]
    assert found["comparisons"][0]["difference"] == 0
    text = render(found)
    assert "The whole catalogue of 30 items, 2 users" in text
    assert max(map(len, text.splitlines())) <= 12 + 8 * len(COLUMNS)


def test_an_item_count_is_that_of_the_titles_without_the_padding():
    assert table({"a": lists([1]), "b": lists([2])}, [1], WORDS, resamples=10)["items"] == 5
