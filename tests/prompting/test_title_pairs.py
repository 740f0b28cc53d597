"""Training rows whose answers are titles: the next title at points of the training part, pairs of titles, no candidates."""

import io

import numpy as np
import polars as pl
import pytest

from llmrec.config import Pairs, Prompting
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.preferences import PREFERENCE_SCHEMA, SFT_SCHEMA, preference_rows, sft_rows
from llmrec.query_prompts import QueryWriter
from llmrec.templates import load_template

ITEMS = 20
TITLES = ["", *(f"Film {i}" for i in range(1, ITEMS + 1))]


def sequences(histories, ratings=None):
    lengths = [len(history) for history in histories]
    split = np.concatenate([[TRAIN] * (n - 2) + [VALID, TEST] for n in lengths]).astype(np.int8)
    stars = np.concatenate([[3.0] * n for n in lengths] if ratings is None else ratings).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(offsets, np.concatenate(histories).astype(np.int32), stars, split, ITEMS)


def users_and_ratings(seed=0, count=30):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 12, count)
    return [rng.permutation(ITEMS)[:n] + 1 for n in lengths], [rng.integers(1, 6, n).astype(float) for n in lengths]


def scores(users):
    return np.sin(np.outer(users + 1, np.arange(1, ITEMS + 1))).astype(np.float32)


def writer_of(gpt2, titles=TITLES):
    return QueryWriter(gpt2, load_template("gpt4rec"), Prompting(template="gpt4rec", history=5, budget=400), titles)


@pytest.fixture(scope="module")
def writer(gpt2):
    return writer_of(gpt2)


def test_sft_rows_go_on_with_the_next_title(writer):
    histories, ratings = users_and_ratings()
    train = sequences(histories, ratings).train_only()
    table, statistics = sft_rows(train, writer, Pairs(prefixes_per_user=3), 0, np.arange(30), None)
    assert table.schema == SFT_SCHEMA
    assert statistics.target_retrieved is None
    points = set()
    for row in table.to_dicts():
        part = histories[row["user"]][:-2].tolist()
        at = part.index(row["target_item"])
        assert at >= 2
        assert row["history_items"] == part[max(0, at - 5) : at]
        assert row["completion"] == f" Film {row['target_item']}"
        text = " ".join(f"Film {item}." for item in row["history_items"])
        assert row["prompt"] == f"Previously, the customer has bought: {text} In the future, the customer wants to buy"
        assert row["pool_items"] == []
        points.add((row["user"], at))
    assert points <= {(user, at) for user, history in enumerate(histories) for at in range(2, len(history) - 2)}
    assert table.height == sum(min(3, max(0, len(history) - 4)) for history in histories) == len(points)


def test_pairs_are_titles_on_one_prompt_per_user(writer):
    histories, ratings = users_and_ratings()
    train = sequences(histories, ratings).train_only()
    table, statistics = preference_rows(train, writer, Pairs(lightfm="worst", losers=2), 0, np.arange(30), None, scores)
    assert table.schema == PREFERENCE_SCHEMA
    assert table.group_by("group").agg(pl.col("prompt").n_unique())["prompt"].max() == 1
    assert statistics.losers.keys() == {"rating", "lightfm"}
    for row in table.to_dicts():
        history, stars = histories[row["user"]][:-2].tolist(), ratings[row["user"]][:-2]
        assert (row["chosen"], row["rejected"]) == (f" Film {row['chosen_item']}", f" Film {row['rejected_item']}")
        assert row["pool_items"] == []
        if row["source"] == "rating":
            best, other = (-1, -2) if stars[-1] > stars[-2] else (-2, -1)
            assert (row["chosen_item"], row["rejected_item"]) == (history[best], history[other])
        else:
            unseen = sorted(set(range(1, ITEMS + 1)) - set(history), key=lambda item: scores(np.array([row["user"]]))[0, item - 1])
            assert row["chosen_item"] == history[-1]
            assert row["rejected_item"] in unseen[:2]


def test_two_titles_that_read_the_same_are_no_pair_and_counted(gpt2):
    titles = ["", *(f"Film {1 + i % 2} (19{i:02d})" for i in range(ITEMS))]  # without their years, two different ones
    train = sequences([[1, 2, 3, 5, 9, 10], [1, 2, 3, 4, 9, 10]], [[1.0, 1, 1, 2, 1, 1]] * 2).train_only()
    table, statistics = preference_rows(train, writer_of(gpt2, titles), Pairs(lightfm="none"), 0, np.arange(2), None, None)
    assert table.select("user", "chosen", "rejected").rows() == [(1, " Film 2", " Film 1")]
    assert statistics.skipped == {"both titles read the same": 1}


def test_validation_and_test_items_change_not_one_byte(writer):
    histories, ratings = users_and_ratings()
    other = [np.concatenate([history[:-2], history[-2:] % ITEMS + 1]) for history in histories]

    def tables(some):
        train, found = sequences(some, ratings).train_only(), []
        for table, _ in (
            sft_rows(train, writer, Pairs(), 3, np.arange(30), None),
            preference_rows(train, writer, Pairs(lightfm="sampled"), 3, np.arange(30), None, scores),
        ):
            file = io.BytesIO()
            table.write_parquet(file)
            found.append(file.getvalue())
        return found

    assert tables(histories) == tables(other)


def test_losers_below_one_and_a_pool_nobody_shows_are_refused(writer):
    train = sequences(*users_and_ratings()).train_only()
    with pytest.raises(UserError, match=r"pairs.losers is 0"):
        preference_rows(train, writer, Pairs(losers=0), 0, np.arange(30), None, scores)
    with pytest.raises(ValueError, match="the retriever is given"):
        sft_rows(train, writer, Pairs(), 0, np.arange(30), lambda users, ends: np.zeros((len(users), 0), dtype=np.int32))
