"""Ranks and candidate lists against sorting by hand."""

import numpy as np
import pytest
import torch

from llmrec.errors import UserError
from llmrec.retrievers.candidates import rank, top_items


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
def test_ranks_count_ties_against_the_target(counting, scorer, batch):
    cases = counting.cases("test")
    found = rank(scorer, counting, cases, 5, repeats=False, batch=batch)
    for at, (user, target, end) in enumerate(zip(cases.users, cases.targets, cases.ends, strict=True)):
        scores = {item: float(scorer.table[user, item - 1]) for item in range(1, 31)}
        history = set(counting.history(user, end).tolist())
        others = [item for item in scores if item != target]
        assert found.target_rank[at] == 1 + sum(scores[item] >= scores[target] for item in others)
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


def test_scores_that_are_no_numbers_are_an_error_naming_the_user(counting, scorer):
    scorer.table[3, 4] = torch.nan
    with pytest.raises(UserError, match="user 3 "):
        rank(scorer, counting, counting.cases("test"), 5, repeats=False, batch=16)


def test_top_items_leave_the_history_out(counting, scorer):
    users = np.array([0, 5], dtype=np.int32)
    ends = counting.offsets[users] + 3
    for row, user, end in zip(top_items(scorer, counting, users, ends, 30), users, ends, strict=True):
        history = set(counting.history(user, end).tolist())
        assert set(row[row > 0].tolist()) == set(range(1, 31)) - history
        assert (row == 0).sum() == len(history)
