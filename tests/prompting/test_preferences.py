"""Training rows: pairs and targets by hand, losers by oracle, one prompt per user, and nothing from validation or test."""

import dataclasses
import io

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.config import Pairs, Prompting
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.losers import choose_losers, popularity_deciles
from llmrec.pair_statistics import PreferenceStatistics, SftStatistics, dataset_card, loser_statistics
from llmrec.preferences import PREFERENCE_SCHEMA, SFT_SCHEMA, preference_rows, sft_rows
from llmrec.prompting import PromptWriter
from llmrec.templates import load_template

ITEMS = 40


def sequences(histories, ratings=None):
    """Leave-one-out sequences: each user's last item is test, the one before it validation."""
    lengths = [len(history) for history in histories]
    split = np.concatenate([[TRAIN] * (n - 2) + [VALID, TEST] for n in lengths]).astype(np.int8)
    stars = [[3.0] * n for n in lengths] if ratings is None else ratings
    return Sequences(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(histories).astype(np.int32),
        ratings=np.concatenate(stars).astype(np.float32),
        split=split,
        item_count=ITEMS,
    )


def many_users(count=60):
    rng = np.random.default_rng(5)
    weights = 1 / np.arange(1, ITEMS + 1)
    lengths = rng.integers(3, 16, count)
    histories = [rng.choice(np.arange(1, ITEMS + 1), n, replace=False, p=weights / weights.sum()) for n in lengths]
    return sequences(histories, [rng.choice([1.0, 3.0, 5.0, np.nan], n) for n in lengths])


def popular_lists(train):
    """A retriever that knows the training part only: the most popular items outside the history."""
    order = np.argsort(-np.bincount(train.items, minlength=ITEMS + 1)[1:], kind="stable") + 1

    def pool_for(users, ends):
        lists = np.zeros((len(users), 20), dtype=np.int32)
        for row, (user, end) in enumerate(zip(users, ends, strict=True)):
            best = order[~np.isin(order, train.history(user, end))][:20]
            lists[row, : len(best)] = best
        return lists

    return pool_for


def scores_of(train):
    """Scores that depend on the training part only."""

    def lightfm_scores(users):
        counts = np.bincount(train.items, minlength=ITEMS + 1)[1:]
        own = [train.train_part(user).sum() for user in users]
        return (np.log1p(counts) + np.sin(np.outer(own, np.arange(ITEMS)))).astype(np.float32)

    return lightfm_scores


@pytest.fixture(scope="module")
def writer(gpt2):
    return PromptWriter(
        gpt2, load_template("llamarec"), Prompting(candidates=6, history=5), ["", *(f"Film {i}" for i in range(1, ITEMS + 1))]
    )


UNIFORM = Pairs(pool="uniform", lightfm="none")


def item_of(row, letter):
    return row["pool_items"][ord(row[letter]) - ord("A")]


def test_the_higher_rated_of_the_last_two_training_items_wins(writer):
    train = sequences([[1, 2, 3, 4, 30, 31], [5, 6, 7, 8, 32, 33]], [[1, 1, 5, 2, 1, 1], [1, 1, 2, 4, 1, 1]]).train_only()
    table, statistics = preference_rows(train, writer, UNIFORM, 0, np.arange(2), None, None)
    assert table.schema == PREFERENCE_SCHEMA
    assert {(r["user"], r["chosen_item"], r["rejected_item"], r["source"]) for r in table.to_dicts()} == {
        (0, 3, 4, "rating"),
        (1, 8, 7, "rating"),
    }
    for row in table.to_dicts():
        assert row["history_items"] == ([1, 2] if row["user"] == 0 else [5, 6])
        assert (item_of(row, "chosen"), item_of(row, "rejected")) == (row["chosen_item"], row["rejected_item"])
        assert f"({row['chosen']}) Film {row['chosen_item']}" in row["prompt"]
    assert (statistics.prompts, statistics.skipped, statistics.refused) == (2, {}, {})


def test_why_users_give_no_rating_pair_is_counted(writer):
    histories = [[1, 2, 3, 4, 9, 10], [1, 2, 3, 4, 9, 10], [1, 2, 3, 3, 9, 10], [1, 2, 3, 9, 10], [1, 2, 3, 4, 9, 10]]
    ratings = [[5, 5, 3, 3, 1, 5], [5, 5, 3, np.nan, 1, 5], [5, 5, 1, 2, 1, 5], [1, 2, 3, 1, 5], [1, 1, 1, 2, 5, 5]]
    table, statistics = preference_rows(sequences(histories, ratings).train_only(), writer, UNIFORM, 0, np.arange(5), None, None)
    assert table["user"].to_list() == [4]
    assert statistics.skipped == {
        "rating: equal ratings": 1,
        "rating: a rating is missing": 1,
        "rating: the last two items are the same": 1,
        "fewer than 4 training events": 1,
    }


def test_no_pairs_at_all_is_an_error_that_says_why(writer):
    train = sequences([[1, 2, 3, 4, 9, 10]], [[np.nan] * 6]).train_only()
    with pytest.raises(UserError, match="rating is missing: 1"):
        preference_rows(train, writer, UNIFORM, 0, np.arange(1), None, None)


def test_all_pairs_of_a_user_share_one_prompt_and_its_pool(writer):
    train = many_users().train_only()
    config = Pairs(lightfm="sampled", losers=2)
    table, statistics = preference_rows(train, writer, config, 0, np.arange(60), popular_lists(train), scores_of(train))
    assert table.group_by("group").agg(pl.col("prompt", "pool_items", "history_items", "user").n_unique()).drop("group").unique().row(
        0
    ) == (1, 1, 1, 1)
    assert statistics.prompts == table["group"].n_unique() == table["user"].n_unique() == table["group"].max() + 1
    assert set(table["source"]) == {"rating", "lightfm"}
    for row in table.to_dicts():
        part = train.train_part(row["user"])
        assert (item_of(row, "chosen"), item_of(row, "rejected")) == (row["chosen_item"], row["rejected_item"])
        assert row["history_items"] == part[:-2][-5:].tolist()
        assert len(set(row["pool_items"])) == 6
        assert set(row["pool_items"]) & set(part.tolist()) == set(part[-2:].tolist())  # fillers come from outside
        if row["source"] == "lightfm":
            assert row["chosen_item"] == part[-1]
            assert row["rejected_item"] not in part


def test_the_winner_stands_anywhere_in_the_pool(writer):
    train = sequences([[*np.random.default_rng(u).permutation(ITEMS)[:8] + 1] for u in range(300)]).train_only()
    table, _ = preference_rows(train, writer, Pairs(lightfm="hardest"), 0, np.arange(300), popular_lists(train), scores_of(train))
    letters = table["chosen"].value_counts()
    assert letters.height == 6
    assert letters["count"].min() > 25  # 50 expected


def test_sft_rows_ask_for_the_next_item(writer):
    train = many_users().train_only()
    table, statistics = sft_rows(train, writer, Pairs(prefixes_per_user=3), 0, np.arange(60), popular_lists(train))
    assert table.schema == SFT_SCHEMA
    retrieved = []
    for row in table.to_dicts():
        part = train.train_part(row["user"]).tolist()
        position = part.index(row["target_item"])
        assert position >= 2
        assert row["history_items"] == part[:position][-5:]
        assert item_of(row, "completion") == row["target_item"]
        # beside the target, the retriever's best five that the user has not taken, before or later
        listed = popular_lists(train)([row["user"]], [train.offsets[row["user"]] + position])[0]
        expected = [row["target_item"], *[int(i) for i in listed if i not in part][:5]]
        assert set(row["pool_items"]) == set(expected)
        retrieved.append(row["target_item"] in listed[:6])
    assert statistics.target_retrieved == pytest.approx(np.mean(retrieved))
    assert 0 < np.mean(retrieved) < 1
    assert table["user"].value_counts()["count"].max() == 3
    assert table.select("user", "target_item").is_duplicated().sum() == 0


def test_uniform_pools_avoid_the_history_and_need_no_retriever(writer):
    train = many_users().train_only()
    table, statistics = sft_rows(train, writer, UNIFORM, 0, np.arange(60), None)
    assert statistics.target_retrieved is None
    for row in table.to_dicts():
        part = train.train_part(row["user"]).tolist()
        assert len(set(row["pool_items"])) == 6
        assert not set(row["pool_items"]) & set(part[: part.index(row["target_item"])])
    assert table["pool_items"].explode().n_unique() == ITEMS


def test_a_limit_takes_as_many_different_users_as_possible(writer):
    train = many_users().train_only()
    able = int((np.diff(train.offsets) >= 3).sum())
    for limit in (10, able):
        table, _ = sft_rows(train, writer, dataclasses.replace(UNIFORM, sft_rows=limit), 0, np.arange(60), None)
        assert table["user"].n_unique() == table.height == limit
    pairs, _ = preference_rows(train, writer, Pairs(pool="uniform", lightfm="worst", prompts=7), 0, np.arange(60), None, scores_of(train))
    assert pairs["group"].unique().sort().to_list() == list(range(7))


def test_a_small_catalogue_gives_a_small_pool(writer):
    train = dataclasses.replace(sequences([[1, 2, 3, 4, 1, 2]]).train_only(), item_count=5)
    table, _ = preference_rows(
        train, writer, Pairs(pool="uniform", rating=False, lightfm="worst"), 0, np.arange(1), None, lambda users: np.zeros((1, 5))
    )
    assert sorted(table["pool_items"][0]) == [3, 4, 5]


@pytest.mark.parametrize("lightfm", ["worst", "hardest", "sampled"])
def test_validation_and_test_items_change_not_one_byte(writer, lightfm):
    def rows(data):
        train = data.train_only()
        config = Pairs(lightfm=lightfm)
        buffers = [io.BytesIO(), io.BytesIO()]
        sft_rows(train, writer, config, 0, np.arange(60), popular_lists(train))[0].write_parquet(buffers[0])
        preference_rows(train, writer, config, 0, np.arange(60), popular_lists(train), scores_of(train))[0].write_parquet(buffers[1])
        return [buffer.getvalue() for buffer in buffers]

    data = many_users()
    held_out = data.split != TRAIN
    other = dataclasses.replace(data, items=np.where(held_out, data.items % ITEMS + 1, data.items).astype(np.int32))
    assert (other.items != data.items).sum() == held_out.sum()
    assert rows(data) == rows(other)

    train_changed = dataclasses.replace(data, items=np.where(held_out, data.items, data.items % ITEMS + 1).astype(np.int32))
    assert rows(data) != rows(train_changed)  # the comparison can fail


def test_rows_repeat_by_seed_and_differ_between_seeds(writer):
    train = many_users().train_only()
    one, same, other = (sft_rows(train, writer, UNIFORM, seed, np.arange(60), None)[0] for seed in (1, 1, 2))
    assert one.equals(same)
    assert not one.equals(other)


def test_too_many_losers_for_the_pool_is_a_user_error(writer):
    train = many_users().train_only()
    with pytest.raises(UserError, match=r"pairs\.losers is 5: choose 1 to 4"):
        preference_rows(train, writer, Pairs(losers=5), 0, np.arange(60), popular_lists(train), scores_of(train))


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_losers_are_what_their_names_say(seed, count):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=ITEMS).astype(np.float32)
    seen = rng.choice(ITEMS, 10, replace=False) + 1
    deciles = rng.integers(0, 10, ITEMS + 1)
    winner = int(seen[-1])
    by_score = sorted(set(range(1, ITEMS + 1)) - set(seen.tolist()), key=lambda item: scores[item - 1])
    assert choose_losers("worst", scores, seen, winner, deciles, count, rng) == by_score[:count]
    assert choose_losers("hardest", scores, seen, winner, deciles, count, rng) == by_score[::-1][:count]

    sampled = choose_losers("sampled", scores, seen, winner, deciles, count, rng)
    low = by_score[: len(by_score) // 4]
    assert len(set(sampled)) == count
    assert set(sampled) <= set(low)
    # no item of the low quartile that is nearer in popularity than the farthest loser may be missing for want of room
    reach = max(abs(deciles[item] - deciles[winner]) for item in sampled)
    assert sum(abs(deciles[item] - deciles[winner]) < reach for item in low) < count


def test_sampled_losers_are_spread_evenly_over_those_allowed():
    scores, deciles = np.arange(ITEMS, dtype=np.float32), np.zeros(ITEMS + 1, dtype=int)
    deciles[[2, 4, 6]] = 7
    rng = np.random.default_rng(0)
    losers = [
        choose_losers("sampled", scores, np.array([40]), 4, np.where(np.arange(ITEMS + 1) == 40, 7, deciles), 1, rng)[0] for _ in range(600)
    ]
    assert set(losers) == {2, 4, 6}
    assert min(np.bincount(losers)[[2, 4, 6]]) > 150  # 200 expected


def test_popularity_deciles_rank_items_by_their_training_events():
    train = sequences([[item] * item + [1, 1] for item in range(1, ITEMS + 1)]).train_only()
    deciles = popularity_deciles(train)
    assert (deciles[1:] == np.arange(ITEMS) * 10 // ITEMS).all()
    level = popularity_deciles(sequences([list(range(1, ITEMS + 1))] * 3 + [[1, 1, 1]]).train_only())[2 : ITEMS - 2]
    assert len(set(level.tolist())) == 1


def preferences_with_losers(losers):
    rows = [{"rejected_item": loser, "source": "lightfm"} for loser in losers]
    return loser_statistics(pl.DataFrame(rows))


def card(losers):
    preferences = PreferenceStatistics(len(losers), preferences_with_losers(losers), {"rating: equal ratings": 3}, {"no history": 2})
    sft = SftStatistics(rows=90, users=30, target_retrieved=0.25, refused={})
    return dataset_card(sft, preferences, Pairs(), Prompting(), dataset="ml-100k", retriever="sasrec", seed=3, licence="research only\n")


def test_the_card_counts_losers_and_warns_of_the_few():
    few, spread = card([1, 2, 3] * 50), card(list(range(1, 151)))
    assert "| lightfm | 150 | 3 | 100.0% |" in few
    assert "**Warning:** ten titles lose 100% of the lightfm pairs" in few
    assert "| lightfm | 150 | 150 | 6.7% |" in spread
    assert "Warning" not in spread
    assert "Licence of the data: research only\n" in few
    assert "| preference pair | rating: equal ratings | 3 |" in few
    assert "| preference prompt | no history | 2 |" in few
