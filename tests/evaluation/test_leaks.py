"""Every check of an audit lets honest arrays pass and names the leak in one that is planted."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.evaluation import leaks, leaks_of_pairs, leaks_of_ranks, leaks_of_tables, leaks_of_training
from llmrec.evaluation.leaks_of_pairs import Label, Rendered
from llmrec.evaluation.leaks_of_ranks import Claim

ITEMS = 50


@pytest.fixture
def sequences():
    """Ten users with six different items each: four to train on, one to validate, one to test."""
    random = np.random.default_rng(0)
    items = np.concatenate([random.permutation(ITEMS)[:6] + 1 for _ in range(10)]).astype(np.int32)
    split = np.tile(np.array([TRAIN] * 4 + [VALID, TEST], dtype=np.int8), 10)
    return Sequences(np.arange(0, 61, 6), items, np.full(60, np.nan, dtype=np.float32), split, ITEMS)


# ------------------------------------------------------------------------------- models


def mixed(histories, weights):
    """Each output is a weighted sum of what the items of the history are embedded as, (rows, length, 3)."""
    table = np.random.default_rng(1).normal(size=(ITEMS + 1, 3))
    return np.einsum("ts,rsd->rtd", weights, table[histories])


@given(st.integers(2, 9), st.integers(0, 100))
def test_causal_models_pass_and_a_look_at_the_next_item_is_seen(length, seed):
    random = np.random.default_rng(seed)
    histories = random.integers(1, ITEMS + 1, (20, length))
    weights = np.tril(random.uniform(0.5, 1, (length, length)))
    assert leaks.future_of_positions(lambda rows: mixed(rows, weights), histories, ITEMS, seed).passed
    ahead = weights + np.eye(length, k=1)
    verdict = leaks.future_of_positions(lambda rows: mixed(rows, ahead), histories, ITEMS, seed)
    assert verdict.passed is False
    assert "could read its targets" in verdict.detail


def test_rounding_is_no_leak():
    random = np.random.default_rng(0)
    noisy = lambda rows: mixed(rows, np.tril(np.ones((6, 6)))) * (1 + 1e-6 * random.normal(size=(20, 6, 3)))  # noqa: E731
    assert leaks.future_of_positions(noisy, random.integers(1, ITEMS + 1, (20, 6)), ITEMS).passed


def test_a_scorer_that_reads_beyond_the_end_of_a_case(sequences):
    cases = sequences.cases("valid")

    def honest(events, some):
        return np.array([[events.history(user, end).sum()] for user, end in zip(some.users, some.ends, strict=True)])

    def beyond(events, some):
        return np.array([[events.history(user, end + 1).sum()] for user, end in zip(some.users, some.ends, strict=True)])

    assert leaks.after_the_end(honest, sequences, cases).passed
    assert leaks.after_the_end(beyond, sequences, cases).passed is False


@pytest.mark.parametrize(("shift", "scale"), [(0, 1e-6), (5000, 1e-3), (5000, 1), (0, 1e9)])
def test_a_scorer_that_reads_its_target_is_seen_on_every_scale(sequences, shift, scale):
    """Scores around 5000 that differ by thousandths, or that are all below a millionth: what counts is their own spread."""
    cases = sequences.cases("test")
    tastes = np.random.default_rng(3).normal(size=ITEMS + 1)

    def scores(reads_target):
        def of_cases(events, some):
            histories = [events.history(user, end + reads_target) for user, end in zip(some.users, some.ends, strict=True)]
            return shift + scale * np.array([[tastes[history].sum(), tastes[history[-1]]] for history in histories])

        return of_cases

    assert leaks.after_the_end(scores(0), sequences, cases).passed
    assert leaks.after_the_end(scores(1), sequences, cases).passed is False


def test_candidates_that_are_missing_are_no_difference_unless_they_come_and_go(sequences):
    cases = sequences.cases("test")
    short = lambda events, some: np.tile([2.0, 1.0, -np.inf], (len(some), 1))  # noqa: E731
    comes = lambda events, some: np.where(events.items[some.ends, None] % 2, 1.0, [-np.inf, 1.0])  # noqa: E731
    assert leaks.after_the_end(short, sequences, cases).passed
    assert leaks.after_the_end(comes, sequences, cases).passed is False


def test_a_run_that_did_not_record_what_it_was_trained_on_is_not_ok(sequences):
    assert leaks_of_training.training_part("a1", "a1", sequences).passed is True
    assert leaks_of_training.training_part("b2", "a1", sequences).passed is False
    verdict = leaks_of_training.training_part(None, "a1", sequences)
    assert verdict.passed is None
    assert "20 held-out events may be in it" in verdict.detail


def test_recorded_ranks_may_be_worse_but_not_better_than_the_scores():
    scores = np.array([[3.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    users, targets = np.array([7, 8]), np.array([2, 1])
    assert leaks_of_ranks.ranks_of_the_model(np.array([3, 4]), scores, users, targets).passed
    assert leaks_of_ranks.ranks_of_the_model(np.array([4, 4]), scores, users, targets).passed
    verdict = leaks_of_ranks.ranks_of_the_model(np.array([3, 1]), scores, users, targets)
    assert verdict.passed is False
    assert "user 8: 1 instead of at least 4" in verdict.detail


def test_untrained_targets_are_found_by_chance_or_by_a_leak():
    random = np.random.default_rng(0)
    trained = np.ones(101, dtype=bool)
    trained[81:] = False
    users, targets = np.arange(200), np.where(np.arange(200) < 60, random.integers(81, 101, 200), 5)
    lists = np.stack([random.permutation(100)[:10] + 1 for _ in users])
    assert leaks_of_training.untrained_targets(lists, users, targets, trained).passed
    lists[:60, 0] = targets[:60]
    assert leaks_of_training.untrained_targets(lists, users, targets, trained).passed is False
    popular = np.tile(np.arange(81, 91), (200, 1))  # the same untrained items for everyone: a strange model, no leak
    assert leaks_of_training.untrained_targets(popular, users, targets, trained).passed
    assert leaks_of_training.untrained_targets(lists, users, targets, np.ones(101, dtype=bool)).passed is None


def test_lightfm_that_was_trained_on_everything():
    """The package itself: an item that only a held-out event has gets a positive bias from that event alone."""
    from lightfm import LightFM
    from scipy.sparse import coo_matrix

    random = np.random.default_rng(0)
    users, items = np.repeat(np.arange(30), 4), np.concatenate([random.permutation(10)[:4] for _ in range(30)])
    honest = coo_matrix((np.ones(120, dtype=np.float32), (users, items)), shape=(30, 12))
    more = np.concatenate([users, np.arange(30)]), np.concatenate([items, np.full(30, 11)])
    leaking = coo_matrix((np.ones(150, dtype=np.float32), more), shape=(30, 12))
    trained = np.array([True] * 10 + [False] * 2)
    for matrix, passed in ((honest, True), (leaking, False)):
        model = LightFM(no_components=4, loss="warp", random_state=0).fit(matrix, epochs=5, num_threads=1)
        assert leaks_of_training.lightfm_biases(model.item_biases, trained).passed is passed
    assert leaks_of_training.lightfm_biases(np.zeros(12), np.ones(12, dtype=bool)).passed is None


def test_popularity_that_counts_test_events(sequences):
    counts = {split: np.bincount(sequences.items[sequences.split <= split], minlength=ITEMS + 1)[1:] for split in (TRAIN, TEST)}
    assert leaks_of_training.popularity_counts(counts[TRAIN], sequences).passed
    assert leaks_of_training.popularity_counts(counts[TEST], sequences).passed is False


# ------------------------------------------------------------------------------- tables


def events(**changes):
    columns = {"user": [0, 0, 0, 1, 1, 1], "item": [1, 2, 3, 2, 3, 4], "timestamp": [1, 2, 3, 4, 5, 6]}
    return pl.DataFrame(columns | {"split": ["train", "valid", "test"] * 2} | changes)


def test_duplicates():
    assert leaks_of_tables.duplicates(events(), kept=False).passed
    twice = events(item=[1, 2, 1, 2, 3, 4])
    assert leaks_of_tables.duplicates(twice, kept=False).passed is False
    assert leaks_of_tables.duplicates(twice, kept=True).passed is None


@pytest.mark.parametrize(
    ("changes", "temporal", "passed"),
    [
        ({}, False, True),
        ({"timestamp": [None] * 6}, False, True),
        ({"timestamp": [1, 3, 2, 4, 5, 6]}, False, False),
        ({"split": ["train", "valid", "train", "train", "valid", "test"]}, False, False),
        ({}, True, False),  # user 1 trains at 4, after user 0's target
        ({"timestamp": [1, 5, 6, 2, 5, 6]}, True, True),
    ],
)
def test_time_order(changes, temporal, passed):
    assert leaks_of_tables.time_order(events(**changes), temporal=temporal).passed is passed


def test_leave_one_out_says_how_much_of_the_training_is_future():
    """Training at 1 and 4: of the targets at 2, 3, 5 and 6 two have one of the two after them."""
    assert "25% come after a target" in leaks_of_tables.time_order(events(), temporal=False).detail


def test_users_with_one_event_are_not_asked(sequences):
    assert leaks_of_tables.empty_histories(sequences).passed
    single = Sequences(np.array([0, 1, 4]), np.array([1, 2, 3, 4]), np.ones(4), np.array([TEST, TRAIN, VALID, TEST]), ITEMS)
    assert leaks_of_tables.empty_histories(single).passed is False


def test_targets_are_the_held_out_events(sequences):
    cases = sequences.cases("test")
    assert leaks_of_tables.asked_targets(cases.users, cases.targets, cases, all_asked=True).passed
    assert leaks_of_tables.asked_targets(cases.users[1:], cases.targets[1:], cases, all_asked=False).passed
    assert leaks_of_tables.asked_targets(cases.users[1:], cases.targets[1:], cases, all_asked=True).passed is False
    easy = sequences.items[sequences.offsets[:-1]]
    assert leaks_of_tables.asked_targets(cases.users, easy, cases, all_asked=False).passed is False


def lists_of(sequences, cases, count=8):
    """Eight items outside each history, best first, and the target's ranks among all items: 1 to 10 by user."""
    rows = []
    for user, target, end in zip(cases.users.tolist(), cases.targets.tolist(), cases.ends.tolist(), strict=True):
        others = [item for item in range(1, ITEMS + 1) if item not in sequences.history(user, end) and item != target]
        rank = user + 1
        items = [*others[: rank - 1], target, *others[rank - 1 :]][:count]
        columns = {"user": user, "split": cases.split, "target": target, "target_rank": rank + 2, "target_rank_masked": rank}
        rows.append(columns | {"items": items, "scores": [-float(n) for n in range(count)]})
    return pl.DataFrame(rows)


def changed(table, row, **values):
    rows = table.to_dicts()
    rows[row] |= values
    return pl.DataFrame(rows, schema=table.schema)


def test_lists_without_history(sequences):
    cases = sequences.cases("test")
    table = lists_of(sequences, cases)
    assert leaks_of_tables.lists(table, sequences, cases, repeats=False).passed
    own = int(sequences.history(3, cases.ends[3])[0])
    offered = changed(table, 3, items=[own, *table["items"][3].to_list()[1:]])
    assert leaks_of_tables.lists(offered, sequences, cases, repeats=False).passed is False
    assert leaks_of_tables.lists(offered, sequences, cases, repeats=True).passed
    twice = changed(table, 3, items=table["items"][3].to_list()[:7] * 2)
    assert leaks_of_tables.lists(twice, sequences, cases, repeats=True).passed is False


def test_a_target_that_was_put_into_its_list(sequences):
    table = lists_of(sequences, sequences.cases("test"))
    assert leaks_of_ranks.targets_in_lists(table, repeats=False).passed
    items = table["items"][9].to_list()
    put_in = changed(table, 9, items=[table["target"][9], *items[1:]])
    verdict = leaks_of_ranks.targets_in_lists(put_in, repeats=False)
    assert verdict.passed is False
    assert "user 9: the target ranks 10, but was put into a list of 8" in verdict.detail
    tied = changed(table, 2, scores=[0.0] * 8)
    assert leaks_of_ranks.targets_in_lists(tied, repeats=False).passed is False


def test_rankings_of_other_lists_than_the_retrievers(sequences):
    candidates = lists_of(sequences, sequences.cases("test"))
    first = candidates.with_columns(pl.col("items").list.head(5))
    assert leaks_of_tables.same_lists(first, candidates).passed
    assert leaks_of_tables.same_lists(changed(first, 4, items=[1, 2, 3, 4, 5][::-1]), candidates).passed is False


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.data())
def test_ranks_at_least_as_bad_as_the_worst_order_of_ties_pass_and_no_others(scores, data):
    scores = np.array(scores, dtype=np.float64)
    items, targets = np.tile(np.arange(1, 5), (len(scores), 1)), np.full(len(scores), 2)
    worst = np.array([sorted(row.tolist(), reverse=True)[::-1].index(row[1]) for row in scores])  # how many stand below the target
    worst = 4 - worst
    ranks = np.array([data.draw(st.integers(0, 4)) for _ in scores])
    verdict = leaks_of_ranks.optimistic_ranks("orpo", np.arange(len(scores)), ranks, scores, items, targets)
    assert verdict.passed == all(rank == 0 or rank >= least for rank, least in zip(ranks, worst, strict=True))


def test_a_rank_without_the_target_and_a_score_that_is_no_number():
    users, items = np.array([0]), np.array([[1, 2, 0]])
    absent = leaks_of_ranks.optimistic_ranks("orpo", users, np.array([1]), np.zeros((1, 3)), items, np.array([9]))
    assert absent.passed is False
    broken = leaks_of_ranks.optimistic_ranks("orpo", users, np.array([1]), np.array([[np.nan, 0, -np.inf]]), items, np.array([1]))
    assert broken.passed is False


def test_metrics_that_are_better_than_the_ranks():
    ranks, users = np.array([1, 0, 2, 30]), np.arange(4)
    said = {"hr@10": 0.5, "ndcg@10": (1 + 1 / np.log2(3)) / 4, "something_else": 3.0}
    assert leaks_of_ranks.metrics_of_ranks([Claim("orpo", said, ranks, users)]).passed
    assert leaks_of_ranks.metrics_of_ranks([Claim("orpo", said | {"hr@10": 0.75}, ranks, users)]).passed is False


# ------------------------------------------------------------------------------- pairs


def sft_table(sequences):
    """The third training item of everyone is the answer to the first two."""
    parts = [sequences.train_part(user).tolist() for user in range(10)]
    return pl.DataFrame({"user": range(10), "target_item": [part[2] for part in parts], "history_items": [part[:2] for part in parts]})


def preference_table(sequences):
    """The last two training items of everyone against each other; the last against an unseen one."""
    parts = [sequences.train_part(user).tolist() for user in range(10)]
    both = {"user": range(10), "chosen_item": [part[3] for part in parts], "history_items": [part[:2] for part in parts]}
    unseen = [next(item for item in range(1, ITEMS + 1) if item not in part) for part in parts]
    rating = pl.DataFrame(both | {"rejected_item": [part[2] for part in parts], "source": ["rating"] * 10})
    return pl.concat([rating, pl.DataFrame(both | {"rejected_item": unseen, "source": ["lightfm"] * 10})])


def test_answers_are_training_events(sequences):
    held_out = int(sequences.items[sequences.offsets[4] + 5])
    sft, preferences = sft_table(sequences), preference_table(sequences)
    assert leaks_of_pairs.answers("sft", sft, sequences).passed
    assert leaks_of_pairs.answers("preferences", preferences, sequences).passed
    verdict = leaks_of_pairs.answers("sft", changed(sft, 4, target_item=held_out), sequences)
    assert verdict.passed is False
    assert "row 4" in verdict.detail
    assert "user 4's validation or test item" in verdict.detail
    assert leaks_of_pairs.answers("preferences", changed(preferences, 4, chosen_item=held_out), sequences).passed is False
    assert leaks_of_pairs.answers("preferences", changed(preferences, 4, rejected_item=held_out), sequences).passed is False
    by_chance = leaks_of_pairs.answers("preferences", changed(preferences, 14, rejected_item=held_out), sequences)
    assert by_chance.passed
    assert "1 unseen losers happen to be held out" in by_chance.detail


def test_histories_end_before_their_answers(sequences):
    sft, preferences = sft_table(sequences), preference_table(sequences)
    assert leaks_of_pairs.histories("sft", sft, sequences).passed
    assert leaks_of_pairs.histories("preferences", preferences, sequences).passed
    part, held_out = sequences.train_part(4).tolist(), int(sequences.items[sequences.offsets[4] + 4])
    assert leaks_of_pairs.histories("sft", changed(sft, 4, history_items=part[:3]), sequences).passed is False
    assert leaks_of_pairs.histories("sft", changed(sft, 4, history_items=[held_out, part[1]]), sequences).passed is False
    assert leaks_of_pairs.histories("preferences", changed(preferences, 4, history_items=part[1:3]), sequences).passed is False


def test_texts_are_those_of_their_items():
    table = pl.DataFrame({"prompt": ["1 2", "3 4"], "completion": ["A", "B"], "items": [[1, 2], [3, 4]], "letter": [0, 1]})

    def render(row):
        return Rendered(" ".join(map(str, row["items"])), {"completion": "AB"[row["letter"]]}) if row["items"] else None

    assert leaks_of_pairs.prompts("sft", table, render).passed
    changes: list[dict] = [{"prompt": "3 9"}, {"completion": "A"}, {"items": []}]
    for change in changes:
        assert leaks_of_pairs.prompts("sft", changed(table, 1, **change), render).passed is False


def test_the_scored_token_is_the_trained_one():
    """A tokenizer of words with a space glued to what follows, as SentencePiece has: a bare letter is another token than one in a row."""
    words = {"pick": 0, " A": 1, " B": 2, "A": 3, "B": 4}

    def encode(text):
        ids = []
        while text:
            word = next(word for word in words if text.startswith(word))
            ids.append(words[word])
            text = text.removeprefix(word)
        return ids

    rows = [Label("pick", " A", 1), Label("pick", " B", 2)]
    assert leaks_of_pairs.verbaliser(rows, {"base": encode}, "the run").passed
    bare = [replace(row, scored=encode(row.answer.strip())[0]) for row in rows]
    verdict = leaks_of_pairs.verbaliser(bare, {"base": encode}, "the run")
    assert verdict.passed is False
    assert "the run scores the answer ' A' by token 3" in verdict.detail
    other = {"base": encode, "orpo": lambda text: [4 - token for token in encode(text)]}
    assert leaks_of_pairs.verbaliser(rows, other, "the run").passed is False
