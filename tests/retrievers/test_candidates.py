"""Ranks and candidate lists against sorting by hand."""

import numpy as np
import pytest
import torch

from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.retrievers.candidates import rank, ranks_of, rows_per_batch, scores_of, top_items


class Fixed:
    """Scores that depend on the user alone."""

    def __init__(self, table):
        self.table = table

    def scores(self, users, histories):
        return self.table[torch.from_numpy(users.astype(np.int64))].clone()


@pytest.fixture
def scorer(counting):
    return Fixed(torch.randint(0, 8, (counting.user_count, counting.item_count), generator=torch.Generator().manual_seed(0)).float())


@pytest.mark.parametrize("batch", [7, 1000])
def test_ranks_count_ties_against_the_target_and_for_it(counting, scorer, batch):
    cases = counting.cases("test")
    found = rank(scorer, counting, cases, 5, repeats=False, batch=batch)
    for at, (user, target, end) in enumerate(zip(cases.users, cases.targets, cases.ends, strict=True)):
        scores = {item: float(scorer.table[user, item - 1]) for item in range(1, 31)}
        history = set(counting.history(user, end).tolist())
        others = [item for item in scores if item != target]
        assert found.target_rank[at] == 1 + sum(scores[item] >= scores[target] for item in others)
        assert found.target_rank_optimistic[at] == 1 + sum(scores[item] > scores[target] for item in others)
        assert found.target_rank_masked[at] == 1 + sum(scores[item] >= scores[target] for item in others if item not in history)
        unseen = [item for item in scores if item not in history]
        assert not history & set(found.items[at].tolist())
        assert found.scores[at].tolist() == sorted((scores[item] for item in unseen), reverse=True)[:5]


def test_lists_are_short_where_few_items_are_left(counting, scorer):
    cases = counting.cases("test")
    found = rank(scorer, counting, cases, 30, repeats=False, batch=16)
    left = [30 - len(set(counting.history(user, end))) for user, end in zip(cases.users, cases.ends, strict=True)]
    assert (found.items > 0).sum(1).tolist() == left


def test_repeats_may_come_from_the_history(counting, scorer):
    found = rank(scorer, counting, counting.cases("test"), 30, repeats=True, batch=16)
    assert (found.items > 0).all()


@pytest.mark.parametrize("repeats", [False, True])
def test_targets_that_the_history_holds_keep_their_rank(repeats):
    random = np.random.default_rng(0)
    split = np.tile(np.array([TRAIN] * 13 + [VALID, TEST], dtype=np.int8), 50)
    again = Sequences(np.arange(51) * 15, random.integers(1, 21, 750).astype(np.int32), np.ones(750, dtype=np.float32), split, 20)
    table = random.integers(0, 6, (50, 20)).astype(np.float32)  # many ties
    cases = again.cases("test")
    found = rank(Fixed(torch.from_numpy(table)), again, cases, 20, repeats=repeats, batch=16)
    held = 0
    for at, (user, target, end) in enumerate(zip(cases.users, cases.targets, cases.ends, strict=True)):
        history, own = again.history(user, end), table[user, target - 1]
        held += target in history
        others = np.arange(1, 21) != target
        unseen = ~np.isin(np.arange(1, 21), history)
        assert found.target_rank[at] == 1 + (table[user, others] >= own).sum()
        assert found.target_rank_masked[at] == 1 + (table[user, others & unseen] >= own).sum()
        listed = np.ones(20, dtype=bool) if repeats else unseen  # a repeated target is no candidate
        items = found.items[at][found.items[at] > 0]
        assert sorted(items) == (np.flatnonzero(listed) + 1).tolist()
        assert found.scores[at, : len(items)].tolist() == table[user, items - 1].tolist() == sorted(table[user, listed], reverse=True)
    assert 10 < held < 40


@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]], ids=str)
def test_scores_that_are_no_numbers_are_an_error_naming_the_user(counting, scorer, bad):
    scorer.table[37, 4 : 4 + len(bad)] = torch.tensor(bad)  # of a later batch, not its first
    with pytest.raises(UserError, match="user 37 "):
        rank(scorer, counting, counting.cases("test"), 5, repeats=False, batch=16)
    with pytest.raises(UserError, match="user 37 "):
        top_items(scorer, counting, np.arange(60), counting.offsets[1:], 5, batch=16)
    histories, one = [np.array([1])] * 60, np.ones((60, 1), dtype=np.int32)
    with pytest.raises(UserError, match="user 37 "):
        scores_of(scorer, np.arange(60), histories, one, batch=16)
    with pytest.raises(UserError, match="user 37 "):
        ranks_of(scorer, np.arange(60), histories, one[:, 0], batch=16)


def test_top_items_leave_the_history_out(counting, scorer):
    users = np.array([0, 5], dtype=np.int32)
    ends = counting.offsets[users] + 3
    for row, user, end in zip(top_items(scorer, counting, users, ends, 30), users, ends, strict=True):
        history = set(counting.history(user, end).tolist())
        assert set(row[row > 0].tolist()) == set(range(1, 31)) - history
        assert (row == 0).sum() == len(history)


@pytest.mark.parametrize("batch", [7, 1000])
def test_some_items_and_other_targets_are_scored_after_histories_of_their_own(batch):
    """By a scorer that looks at the history: item i's score is i times the history's first item, modulo 7."""

    class ByFirst:
        def scores(self, users, histories):
            first = torch.tensor([int(history[0]) for history in histories])
            return (first[:, None] * torch.arange(1, 21) % 7).float()

    random = np.random.default_rng(0)
    histories = [random.integers(1, 21, 1 + row % 3) for row in range(25)]
    items = random.integers(1, 21, (25, 4)).astype(np.int32)
    first = np.array([history[0] for history in histories])
    expected = first[:, None] * items % 7
    np.testing.assert_array_equal(scores_of(ByFirst(), np.arange(25), histories, items, batch), expected)
    everything = first[:, None] * np.arange(1, 21) % 7
    ranks = (everything >= expected[:, :1]).sum(1)
    np.testing.assert_array_equal(ranks_of(ByFirst(), np.arange(25), histories, items[:, 0], batch), ranks)


@pytest.mark.parametrize("successive", [False, True])
def test_a_user_may_have_several_cases(counting, scorer, successive):
    """Each with its own history; a case's answer does not depend on the others."""
    split = counting.split.copy()
    split[split == VALID] = TEST if successive else VALID
    several = Sequences(counting.offsets, counting.items, counting.ratings, split, counting.item_count)
    cases = several.cases("test")
    assert len(cases) == (120 if successive else 60)
    found = rank(scorer, several, cases, 5, repeats=False, batch=16)
    single = [rank(scorer, several, cases.take(np.array([at])), 5, repeats=False, batch=16) for at in range(len(cases))]
    for name, rows in vars(found).items():
        np.testing.assert_array_equal(rows, np.concatenate([vars(one)[name] for one in single]))


@pytest.mark.parametrize(("item_count", "rows"), [(1, 256), (131_072, 256), (1_000_000, 33), (100_000_000, 1)])
def test_three_copies_of_a_batch_fit_in_the_budget(item_count, rows):
    assert rows_per_batch(item_count) == rows
    assert rows == 1 or 3 * 4 * rows * item_count <= 384 * 2**20
