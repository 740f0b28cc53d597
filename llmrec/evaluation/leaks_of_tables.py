"""Do the tables of a run hold what they must not? Events out of order or twice, users without a history, targets that are not held out,
lists that offer what the user has had. Nothing here needs a model.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec.data.sequences import TRAIN, Cases, Sequences
from llmrec.evaluation.leaks import Verdict


def duplicates(interactions: pl.DataFrame, kept: bool) -> Verdict:
    """Whether a user has an item twice: a repeated target is in the history, and found by memory.

    Args:
        interactions: `user, item`.
        kept: whether the recipe keeps repetitions, as for music or groceries.
    """
    repeated = interactions.select("user", "item").is_duplicated()
    if not repeated.any():
        return Verdict("duplicates", True, "no user has an item twice")
    first = interactions.filter(repeated).row(0, named=True)
    found = f"{repeated.sum():,} events repeat a (user, item), first user {first['user']} and item {first['item']}"
    return Verdict("duplicates", None if kept else False, f"{found}{'; the recipe keeps them (filter.duplicates)' if kept else ''}")


def time_order(interactions: pl.DataFrame, temporal: bool) -> Verdict:
    """Whether every user's events are in time order with the training part first, and a temporal split parts all users at one time.

    Args:
        interactions: `user, timestamp, split` in the order in which models read them.
        temporal: whether the split is by time, the same for all users.
    """
    name, back = "time order", pl.col("timestamp") < pl.col("timestamp").shift(1).over("user")
    later_training = (pl.col("split") == "train") & (pl.col("split").shift(1).over("user") != "train")
    for wrong, what in ((back, "is earlier than the one before it"), (later_training, "is training and comes after a held-out one")):
        events = interactions.with_row_index().filter(wrong)
        if len(events):
            return Verdict(name, False, f"event {events['index'][0]} of user {events['user'][0]} {what} ({len(events):,} such events)")
    training, asked = (interactions.filter(pl.col("split").is_in(of))["timestamp"].drop_nulls() for of in (["train"], ["valid", "test"]))
    if temporal:
        early = asked.filter(asked <= training.max())
        if len(early):
            return Verdict(name, False, f"{len(early):,} held-out events are not later than the last training event of all users")
        return Verdict(name, True, "events are in time order, and no held-out event comes before any training event")
    found = "events are in time order, each user's training first"
    if len(asked):
        after = 1 - np.searchsorted(np.sort(training.to_numpy()), asked.to_numpy(), side="right").mean() / len(training)
        found += f"; of the training events, {after:.0%} come after a target (other users', as leave-one-out has it)"
    return Verdict(name, True, found)


def empty_histories(sequences: Sequences) -> Verdict:
    """Whether everyone who is asked has a training event: without one an answer says nothing of the model."""
    trained = np.diff(np.concatenate([[0], np.cumsum(sequences.split == TRAIN)])[sequences.offsets]) > 0
    asked = np.unique(np.concatenate([sequences.cases(split).users for split in ("valid", "test")]))
    single = int((np.diff(sequences.offsets) == 1).sum())
    without = asked[~trained[asked]]
    if len(without):
        return Verdict("empty histories", False, f"{len(without)} users are evaluated without a training event, first user {without[0]}")
    return Verdict(
        "empty histories", True, f"all {len(asked):,} evaluated users have training events; {single} users with one event are not asked"
    )


def asked_targets(users: np.ndarray, targets: np.ndarray, cases: Cases, *, all_asked: bool) -> Verdict:
    """Whether the targets are the held-out events of their users.

    Args:
        users: of the table's rows, (rows,).
        targets: (rows,).
        cases: what the split asks.
        all_asked: whether every case must be in the table, rather than a sample of them.
    """
    name, held_out = f"{cases.split} targets", set(zip(cases.users.tolist(), cases.targets.tolist(), strict=True))
    found = list(zip(users.tolist(), targets.tolist(), strict=True))
    wrong = [pair for pair in found if pair not in held_out]
    if wrong:
        return Verdict(
            name, False, f"user {wrong[0][0]} is asked for item {wrong[0][1]}, which is not held out for him ({len(wrong)} rows)"
        )
    missing = held_out - set(found)
    if missing and all_asked:
        return Verdict(name, False, f"{len(missing)} cases are left out of the evaluation, first user {min(missing)[0]}")
    return Verdict(name, True, f"the {len(found):,} targets are held-out events of their users")


def lists(table: pl.DataFrame, sequences: Sequences, cases: Cases, *, repeats: bool) -> Verdict:
    """Whether a candidate list has an item twice, or one of the user's history where that is to be left out.

    Args:
        table: `user, target, items`, of one split.
        sequences: all users' events.
        cases: of that split; they say where histories end.
        repeats: whether candidates may come from the history.
    """
    ends: dict[tuple[int, int], int] = {}
    for user, target, end in zip(cases.users.tolist(), cases.targets.tolist(), cases.ends.tolist(), strict=True):
        ends.setdefault((user, target), end)
    for user, target, items in table.select("user", "target", "items").iter_rows():
        if len(set(items)) != len(items):
            return Verdict(f"{cases.split} lists", False, f"the list of user {user} has an item twice")
        seen = set() if repeats else set(sequences.history(user, ends.get((user, target), 0)).tolist()).intersection(items)
        if seen:
            return Verdict(
                f"{cases.split} lists", False, f"the list of user {user} offers item {min(seen)} of his history, which is to be left out"
            )
    kept = "repetitions are allowed" if repeats else "none from the user's history"
    return Verdict(f"{cases.split} lists", True, f"{table.height:,} lists of candidates, each item once, {kept}")


def same_lists(rankings: pl.DataFrame, candidates: pl.DataFrame) -> Verdict:
    """Whether the lists that were ranked are the first of the retriever's own.

    Args:
        rankings: `user, split, target, items`.
        candidates: the same columns, of the retriever.
    """
    name, keys = "lists of the retriever", ["split", "user", "target"]
    whole = candidates.select(*keys, whole="items").unique(keys, keep="first")
    both = rankings.select(*keys, "items").join(whole, on=keys, how="left", maintain_order="left")
    for row in both.iter_rows(named=True):
        if row["whole"] is None or row["items"] != row["whole"][: len(row["items"])]:
            return Verdict(name, False, f"user {row['user']}: the {row['split']} candidates that were ranked are not the retriever's")
    return Verdict(name, True, f"the {len(both):,} lists that were ranked are the retriever's own")
