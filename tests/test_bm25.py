"""Titles found by words, against a formula computed by hand and one written out plainly."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from llmrec.bm25 import TitleIndex, choose_bm25, words
from llmrec.errors import UserError

TITLES = ["", "Red Wine", "red red rose", "Blue Wine Glass Set", "Green Tea"]
POPULARITY = np.array([0, 3, 1, 4, 2])


def test_scores_of_a_catalogue_by_hand():
    """Four titles of 2, 3, 4 and 2 words, 2.75 in the mean; "red" is in two of them, "wine" in two, "rose" in one."""
    k1, b = 1.5, 0.75
    idf_of_two = math.log(1 + 2.5 / 2.5)  # 0.693
    idf_of_one = math.log(1 + 3.5 / 1.5)  # 1.204
    short, middle = (k1 * (1 - b + b * length / 2.75) for length in (2, 3))  # 1.193, 1.602
    expected = {
        1: idf_of_two * 1 / (1 + short),  # 0.316
        2: idf_of_two * 2 / (2 + middle) + idf_of_one * 1 / (1 + middle),  # 0.385 + 0.463
    }
    assert expected == pytest.approx({1: 0.3161, 2: 0.8475}, abs=1e-4)
    index = TitleIndex(TITLES, POPULARITY, k1, b)
    scores = dict(zip(index.items.tolist(), index.scores("Red rose?"), strict=True))
    assert scores == pytest.approx({**expected, 3: 0, 4: 0}, abs=1e-6)
    assert index.recommend(["red rose"], 4) == [2, 1, 3, 4]  # without a word of it: by popularity


def plain_scores(titles: list[str], query: str, k1: float, b: float) -> list[float]:
    """The formula, term by term, for items from 1."""
    documents = [words(title) for title in titles[1:]]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for word in words(query):
            frequency, having = document.count(word), sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            total += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / mean)) if frequency else 0.0
        scores.append(total)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.5, 0.0), (2.0, 1.0), (0.0, 0.5)])
def test_scores_and_order_of_a_random_catalogue(k1, b):
    generator = np.random.default_rng(0)
    titles = ["", *(" ".join(generator.choice(list("abcdefgh"), generator.integers(1, 6))) for _ in range(60))]
    popularity = generator.integers(0, 4, 61)
    index = TitleIndex(titles, popularity, k1, b)
    for query in ["a", "b a", "c c d", "a x b", "h g f e d c b a"]:
        scores = np.zeros(60, dtype=np.float32)
        scores[index.items - 1] = index.scores(query)
        np.testing.assert_allclose(scores, plain_scores(titles, query, k1, b), rtol=1e-5)
        expected = sorted(range(1, 61), key=lambda item: (-scores[item - 1], -popularity[item], item))
        assert index.recommend([query], 60) == expected
        assert index.recommend([query], 7) == expected[:7]
        assert index.recommend([query], 7, exclude=expected[:3]) == expected[3:10]


def test_lists_of_several_lengths_are_those_of_each_alone():
    generator = np.random.default_rng(1)
    titles = ["", *(" ".join(generator.choice(list("abcdefgh"), generator.integers(1, 6))) for _ in range(60))]
    index = TitleIndex(titles, generator.integers(0, 4, 61))
    for queries in (["a b", "c", "d e"], ["zzz", "a"], ["h"] * 9, []):
        for exclude in ([], list(range(1, 30)), list(range(5, 61))):
            several = index.lists(queries, [20, 5, 10], exclude)
            assert several == {count: index.recommend(queries, count, exclude) for count in (5, 10, 20)}
            assert len(several[20]) == min(20, 60 - len(exclude))


def test_weighing_anew_is_building_anew():
    index = TitleIndex(TITLES, POPULARITY, 0.5, 0.0)
    index.weigh(2.0, 1.0)
    np.testing.assert_array_equal(index.scores("red wine"), TitleIndex(TITLES, POPULARITY, 2.0, 1.0).scores("red wine"))


@pytest.mark.parametrize("query", ["", "  ?!", "unheard of", "\n"])
def test_queries_without_any_word_of_the_catalogue_find_the_most_popular(query):
    index = TitleIndex(TITLES, POPULARITY)
    assert index.recommend([query], 3) == [3, 1, 4]
    assert index.recommend([query], 3, exclude=[1]) == [3, 4, 2]
    assert index.recommend([query, "rose", query], 3) == [2, 3, 1]


def test_of_items_with_the_same_title_the_more_popular_comes_first():
    index = TitleIndex(["", "Dune", "Dune", "Alien", "dune!"], np.array([0, 1, 5, 9, 5]))
    assert index.recommend(["dune"], 4) == [2, 4, 1, 3]
    assert index.recommend(["dune", "dune", "dune"], 3) == [2, 4, 1]


def test_titles_of_other_scripts():
    titles = ["", "Амели", "千と千尋の神隠し", "Ο Ζορμπάς", "Amélie 2", "العربية فيلم", "हिन्दी फ़िल्म"]
    index = TitleIndex(titles, np.zeros(7))
    found = {query: index.recommend([query], 1) for query in ["АМЕЛИ", "千と千尋の神隠し", "ζορμπάς", "amélie", "فيلم", "फ़िल्म"]}
    assert list(found.values()) == [[1], [2], [3], [4], [5], [6]]


def test_titles_without_a_single_word():
    assert TitleIndex(["", "!!!", "", "..."], np.array([0, 1, 3, 2])).recommend(["dune"], 2) == [2, 3]


def test_counts_without_a_sign():
    assert TitleIndex(TITLES, POPULARITY.astype(np.uint8)).recommend([""], 4) == [3, 1, 4, 2]


def test_an_item_without_a_title_is_found_by_popularity_alone():
    index = TitleIndex(["", "Dune", "", "Alien"], np.array([0, 1, 9, 2]))
    assert index.recommend(["alien"], 3) == [3, 2, 1]


QUERIES = ["wine", "red", "tea"]


def test_every_query_gives_one_item_and_no_item_comes_twice():
    index = TitleIndex(TITLES, POPULARITY)
    assert index.recommend(QUERIES, 3) == [1, 2, 4]  # "red" would find 1 again, were it not taken
    many = [f"{word} {n}" for n in range(5) for word in QUERIES]
    titles = ["", *(f"{word} thing {n}" for word in QUERIES for n in range(10))]
    found = TitleIndex(titles, np.ones(31)).recommend(many, 15)
    assert len(found) == len(set(found)) == 15


def test_shares_and_what_fills_them():
    titles = ["", "a", "a", "a", "a", "b", "b", "c", "d"]
    index = TitleIndex(titles, np.array([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    assert index.recommend(["a", "b"], 4) == [4, 3, 6, 5]
    assert index.recommend(["a", "b"], 5) == [4, 3, 2, 6, 5]  # the first gives one more
    assert index.recommend(["c", "a"], 4) == [7, 4, 3, 2]  # a third "a" in the place of a second "c"
    assert index.recommend(["c", "b"], 5) == [7, 6, 5, 8, 4]  # then by popularity
    assert index.recommend(["a", "b", "c"], 2) == [4, 6]  # the third has no place
    assert index.recommend(["a", "b"], 4, exclude=[4, 6, 8]) == [3, 2, 5, 1]
    assert index.recommend([], 2) == [8, 7]
    assert index.recommend(["a"], 100, exclude=[8]) == [4, 3, 2, 1, 7, 6, 5]  # no more than there are


def test_k1_and_b_are_those_that_find_most_targets():
    """The target repeats the word in a long title: only a b of 0 puts it first, and a large k1 so for the second user."""
    titles = ["", "sun", "sun sun sun moon over a quiet wide sea", "tea", "tea tea tea from far away hills"]
    index = TitleIndex(titles, np.array([0, 9, 1, 9, 1]), 2.0, 1.0)
    table = choose_bm25(index, [["sun"], ["tea"], ["sun"]], [2, 4, 1], 1, [()] * 3, k1s=(0.5, 2.0), bs=(0.0, 1.0))
    recalls = {(row["k1"], row["b"]): row["recall"] for row in table}
    for (one_k1, one_b), recall in recalls.items():
        firsts = [int(np.argmax(plain_scores(titles, query, one_k1, one_b))) + 1 for query in ("sun", "tea", "sun")]
        assert recall == pytest.approx(np.mean([first == target for first, target in zip(firsts, (2, 4, 1), strict=True)]))
    assert recalls[0.5, 0.0] == pytest.approx(2 / 3)
    assert recalls[0.5, 1.0] == pytest.approx(1 / 3)
    assert next(iter(recalls)) == (0.5, 0.0)
    assert index.recommend(["sun"], 1) == [2]  # the index has them now


def test_of_equal_recalls_the_better_places_decide():
    """Both values of b find the target among two items; with 1 the short title comes first, with 0 the one that repeats the word."""
    titles = ["", "sun", "sun sun moon over the sea"]
    for target, b in ((1, 1.0), (2, 0.0)):
        table = choose_bm25(TitleIndex(titles, np.zeros(3)), [["sun"]], [target], 2, [()], k1s=(1.5,), bs=(0.0, 1.0))
        assert [row["recall"] for row in table] == [1, 1]
        assert [(row["b"], row["mrr"]) for row in table] == [(b, 1.0), (1 - b, 0.5)]


def test_k1_and_b_with_items_left_out():
    table = choose_bm25(TitleIndex(TITLES, POPULARITY), [["wine"]], [3], 1, [[1]], k1s=(1.5,), bs=(0.75,))
    assert table == [{"k1": 1.5, "b": 0.75, "recall": 1.0, "mrr": 1.0}]


def test_what_cannot_be_chosen_or_weighed():
    with pytest.raises(UserError, match="there are none"):
        choose_bm25(TitleIndex(TITLES, POPULARITY), [], [], 1, [], [1.5], [0.75])
    for k1, b in [(-1, 0.5), (1.5, 1.5), (1.5, -0.1)]:
        with pytest.raises(UserError, match="take a k1 of at least 0 and a b from 0 to 1"):
            TitleIndex(TITLES, POPULARITY, k1, b)


def test_imports_no_torch():
    code = "import sys, llmrec.bm25; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
