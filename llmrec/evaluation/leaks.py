"""Does a model know what it is asked? Checks of models by what they answer when the future is replaced by another.

A number can be too good in a few well-known ways: a bidirectional model trained on all positions reads the next item off its own
input; a scorer reads beyond the end of the case. Neither needs the model's code to be found: replace what must not matter, ask again,
compare. The functions take callables and arrays, so that any model can be checked. What a run was trained on is checked in
`leaks_of_training`, its tables in `leaks_of_tables`, `leaks_of_ranks` and `leaks_of_pairs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from llmrec.data.sequences import Cases, Sequences

Outputs = Callable[[np.ndarray], np.ndarray]
"""histories (rows, length) of items, without padding -> (rows, length, width): what the model says after each position."""

Answers = Callable[[Sequences, Cases], np.ndarray]
"""All events and some cases -> (cases, values): scores, each column of one kind, -inf where there is none."""

TOLERANCE = 1e-3  # of the outputs' standard deviation: other rounding stays far below, another input far above


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        passed: None where the check does not apply.
        detail: one sentence: what was found, or why it does not apply.
    """

    name: str
    passed: bool | None
    detail: str


def future_of_positions(outputs: Outputs, histories: np.ndarray, item_count: int, seed: int = 0) -> Verdict:
    """Whether a model that was trained on all positions at once says the same after a position when all later items are others.

    A model that does not was shown each training target in its own input.

    Args:
        outputs: the model, without dropout.
        histories: (rows, length) of items from 1, length at least 2.
        item_count: items are 1 to it; at least 2.
        seed: of the cuts and of the items that replace others.
    """
    name, random = "future of positions", np.random.default_rng(seed)
    cuts = random.integers(1, histories.shape[1], len(histories))
    past = np.arange(histories.shape[1]) < cuts[:, None]
    before, after = outputs(histories), outputs(np.where(past, histories, others_than(histories, item_count, random)))
    spread = float(np.std(before[past])) or 1.0
    change = np.abs(after - before).max(axis=2) / spread
    moved = np.flatnonzero(np.where(past, change, 0).max(axis=1) > TOLERANCE)
    if len(moved):
        row = int(moved[0])
        return Verdict(
            name,
            False,
            f"trained on all positions, yet in {len(moved)} of {len(histories)} histories the output at a position changes with the "
            f"items after it (by {change[row][past[row]].max():.2g} standard deviations in history {row}): it could read its targets",
        )
    return Verdict(name, True, f"the output at a position stays when later items are replaced ({len(histories)} histories)")


def after_the_end(answers: Answers, sequences: Sequences, cases: Cases, seed: int = 0) -> Verdict:
    """Whether the answer to a case stays when its events from the target on are replaced by others: it must, for every model.

    Args:
        answers: the scores of the model as it is evaluated. Ranks and ids are no answers: rounding moves them by whole steps, and a
            tolerance that lets it would let a leak.
        sequences: all users' events.
        cases: the cases to ask; of several of one user the first is taken.
        seed: of the items that replace others.
    """
    name, random = "after the end", np.random.default_rng(seed)
    cases = cases.take(np.unique(cases.users, return_index=True)[1])
    later = np.zeros(len(sequences.items), dtype=bool)
    for user, end in zip(cases.users, cases.ends, strict=True):
        later[end : sequences.offsets[user + 1]] = True
    others = replace(sequences, items=np.where(later, others_than(sequences.items, sequences.item_count, random), sequences.items))
    before, after = (answers(events, cases).astype(np.float64) for events in (sequences, others))
    there = np.isfinite(before) & np.isfinite(after)
    spread = float(np.std(before[there])) if there.any() else 0.0
    change = np.abs(np.subtract(after, before, where=there, out=np.zeros(before.shape)))
    same = np.where(there, change <= TOLERANCE * (spread or 1.0), (before == after) | (np.isnan(before) & np.isnan(after)))
    differs = ~same.all(axis=1)
    if differs.any():
        return Verdict(
            name,
            False,
            f"the answers to {differs.sum()} of {len(cases)} {cases.split} users (first: user {cases.users[differs.argmax()]}) change when "
            "their events from the target on are replaced",
        )
    return Verdict(name, True, f"answers stay when events from the target on are replaced ({len(cases)} {cases.split} users)")


def others_than(items: np.ndarray, item_count: int, random: np.random.Generator) -> np.ndarray:
    """For each item another one, uniformly; the same shape and dtype."""
    return (1 + (items - 1 + random.integers(1, item_count, items.shape)) % item_count).astype(items.dtype)
