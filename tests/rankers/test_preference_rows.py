"""Pairs become groups: who is compared with whom."""

from __future__ import annotations

import pytest

from llmrec.errors import UserError
from llmrec.rankers.preference_rows import comparisons, grouped

POOL = [21, 22, 23, 24, 25, 26]


def pair(prompt: list[int], chosen: int, rejected: int, **more) -> dict:
    return {"prompt_ids": prompt, "chosen_ids": [chosen], "rejected_ids": [rejected]} | more


def by_token(group: dict) -> list[tuple[int, list[int]]]:
    """(winner, its losers) as token ids."""
    tokens = [completion[0] for completion in group["completions"]]
    return [(tokens[winner], [tokens[at] for at in losers]) for winner, losers in zip(group["winners"], group["losers"], strict=True)]


def test_equal_prompts_are_one_group_and_pairwise_every_pair_has_its_own_winner():
    rows = [pair([1, 2], 21, 22), pair([3], 22, 21), pair([1, 2], 21, 23), pair([1, 2], 21, 22)]
    first, second = grouped(rows, max_length=8)
    assert by_token(first) == [(21, [22]), (21, [23]), (21, [22])]
    assert first["completions"] == [[21], [22], [23]]
    assert (first["rows"], second["rows"]) == ([0, 2, 3], [1])


def test_listwise_a_winner_has_its_own_losers_first_and_then_others_of_the_pool():
    rows = [pair([1], 21, 22, pool_ids=POOL), pair([1], 21, 24, pool_ids=POOL), pair([1], 24, 25, pool_ids=POOL)]
    for negatives, sizes in ((2, (2, 2)), (4, (4, 4)), (9, (5, 4)), ("all", (5, 4))):
        (group,) = grouped(rows, negatives=negatives, max_length=8)
        (winner, losers), (other, others) = by_token(group)
        assert (winner, other) == (21, 24)
        assert losers[:2] == [22, 24]
        assert others[0] == 25
        assert (len(losers), len(others)) == sizes
        assert set(losers) <= set(POOL) - {21}
        assert len(set(losers)) == len(losers)
        assert set(others) <= set(POOL) - {24, 21}  # 21 has won against 24


def test_a_winner_keeps_all_losers_of_its_own_pairs():
    rows = [pair([1], 21, loser, pool_ids=POOL) for loser in (22, 23, 24)]
    (group,) = grouped(rows, negatives=2, max_length=8)
    assert by_token(group) == [(21, [22, 23, 24])]


def test_losers_are_drawn_by_seed_and_row():
    rows = [pair([at], 21, 22, pool_ids=POOL) for at in range(1, 21)]

    def drawn(seed):
        return [by_token(group)[0][1] for group in grouped(rows, negatives=3, max_length=8, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({tuple(losers) for losers in drawn(0)}) > 5  # rows differ
    assert {loser for losers in drawn(0) for loser in losers} == set(POOL) - {21}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair([1], 21, 22), "row 1 has no pool_ids: more negatives than 1"),
        (pair([1], 21, 99, pool_ids=POOL), "row 1: the rejected completion is none of the pool's tokens"),
        ({"prompt_ids": [1], "chosen_ids": [21, 22], "rejected_ids": [23], "pool_ids": POOL}, "row 1: the chosen completion is none"),
        (pair([1], 21, 21, pool_ids=POOL), "row 1: the chosen and the rejected completion are the same"),
    ],
)
def test_pairs_without_a_usable_pool_are_named(row, message):
    with pytest.raises(UserError, match=message):
        grouped([pair([1], 21, 22, pool_ids=POOL), row], negatives="all", max_length=8)


def test_comparisons_count_through_the_batch_and_mark_their_padding():
    groups = [
        {"completions": [[21], [22], [23]], "winners": [0, 2], "losers": [[1, 2], [0]]},
        {"completions": [], "winners": [], "losers": []},
        {"completions": [[5], [6]], "winners": [1], "losers": [[0]]},
    ]
    found = comparisons(groups)
    assert found["winners"].tolist() == [0, 2, 4]
    assert found["prompt"].tolist() == [0, 0, 2]
    assert found["real"].tolist() == [[True, True], [True, False], [True, False]]
    assert [losers[real].tolist() for losers, real in zip(found["losers"], found["real"], strict=True)] == [[1, 2], [0], [3]]


def test_comparisons_of_nothing():
    found = comparisons([{"completions": [], "winners": [], "losers": []}])
    assert found["losers"].shape == found["real"].shape == (0, 1)
