"""Was a retriever trained on what it is asked? By its own record, by what its weights know, and by what it finds.

A model by ids knows nothing of items without a training event: whatever it seems to know of them it has from held-out ones.
"""

from __future__ import annotations

import numpy as np

from llmrec.data.sequences import TRAIN, Sequences
from llmrec.evaluation.leaks import Verdict

SUSPICIOUS = 1e-4  # a probability under which chance is no explanation
FAR_MORE = 10


def training_part(recorded: str | None, expected: str, sequences: Sequences) -> Verdict:
    """Whether the run was trained on what the training events alone give.

    Args:
        recorded: checksum of the windows, matrix or counts that the run was trained on; None where it kept none.
        expected: the same, of the training events without any other.
        sequences: all users' events.
    """
    name, held_out = "training part", f"{(sequences.split != TRAIN).sum():,} held-out events"
    if recorded is None:
        return Verdict(name, None, f"the run did not record what it was trained on, so the {held_out} may be in it: make it again to know")
    if recorded == expected:
        return Verdict(name, True, f"what the run was trained on is what the training events give without the {held_out}")
    return Verdict(
        name,
        False,
        f"what the run was trained on is not what the training events give: some of the {held_out} were in it, or a version of llmrec "
        "that cuts other windows made it",
    )


def untrained_targets(candidates: np.ndarray, users: np.ndarray, targets: np.ndarray, trained: np.ndarray) -> Verdict:
    """Whether targets that occur in no training event are found for their own users far more often than for others.

    A model by ids knows nothing of such items; it may rank them high or low, but for everyone much alike. How often each stands in the
    lists of other users says how many hits chance allows (a sum of rare events: Poisson). It fails at ten times as many and a
    probability below `SUSPICIOUS`: people who took something new lately may well be offered other new things.

    Args:
        candidates: each case's best items, (cases, count), 0 where there are fewer.
        users: (cases,).
        targets: (cases,).
        trained: whether the item occurs in a training event, (items + 1,) bool; element 0 is padding.
    """
    from scipy.special import gammainc

    name, cold = "untrained targets", np.flatnonzero(~trained[targets])
    if not len(cold):
        return Verdict(name, None, "every target occurs in training events")
    hits, expected = 0, 0.0
    for item in np.unique(targets[cold]):
        listed, own = (candidates == item).any(axis=1), targets == item
        others = ~np.isin(users, users[own])
        hits += int((listed & own).sum())
        # one more than seen: what never happened to the others is rare, not impossible
        expected += own.sum() * ((listed & others).sum() + 1) / (others.sum() + 1)
    chance = float(gammainc(hits, expected)) if hits else 1.0  # P(Poisson >= hits)
    found = f"{hits} of {len(cold)} targets that occur in no training event are among their users' candidates, {expected:.2g} expected"
    if chance < SUSPICIOUS and hits > FAR_MORE * expected:
        return Verdict(name, False, f"{found} (p {chance:.1g}): the model seems to be trained on them")
    return Verdict(name, True, found)


def lightfm_biases(biases: np.ndarray, trained: np.ndarray) -> Verdict:
    """Whether items without training events have biases that only a positive event can give.

    LightFM's biases start at 0, rise with positives alone and fall with negatives alone.

    Args:
        biases: (items,).
        trained: whether the item occurs in a training event, (items,) bool.
    """
    name = "biases"
    if trained.all():
        return Verdict(name, None, "every item occurs in training events")
    risen = np.flatnonzero(~trained & (biases > 0))
    if len(risen):
        return Verdict(
            name, False, f"item {risen[0] + 1} and {len(risen) - 1} others have no training event, but were positives in training"
        )
    return Verdict(name, True, f"none of the {(~trained).sum()} items without training events was a positive in training")


def popularity_counts(counts: np.ndarray, sequences: Sequences) -> Verdict:
    """Whether the counts of the popularity retriever are those of the training part.

    Args:
        counts: (items,).
        sequences: all users' events.
    """
    training = np.bincount(sequences.items[sequences.split == TRAIN], minlength=sequences.item_count + 1)[1:]
    wrong = np.flatnonzero(counts != training)
    if len(wrong):
        item = wrong[0]
        return Verdict("counts", False, f"item {item + 1} counts {counts[item]:g} events, but has {training[item]} training events")
    return Verdict("counts", True, f"every item counts its training events ({training.sum():,})")
