"""Do the rows a ranker learns from know the future? And is what is scored what was trained?

The builders of `llmrec.preferences` see the training part alone. So every right answer is a training event, and a prompt's history is
the run of training events just before it: two facts of any honest row, checked here on the rows themselves. A held-out item may stand
in a pool as a wrong answer, or lose a pair: who knows nothing of it cannot avoid it, and leaving it out would be the leak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from llmrec.data.sequences import Sequences
from llmrec.evaluation.leaks import Verdict

Encode = Callable[[str], list[int]]
"""Text of a prompt, or of prompt and answer -> token ids, as in training."""


@dataclass(frozen=True)
class Rendered:
    """A prompt written anew from the items that its row names.

    Attributes:
        prompt: its text.
        answers: the texts that answer it, by the column that has them ("completion", or "chosen" and "rejected").
    """

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Label:
    """A training row's text and the token id that the scoring reads for its answer."""

    prompt: str
    answer: str
    scored: int


def answers(file: str, table: pl.DataFrame, sequences: Sequences) -> Verdict:
    """Whether every right answer is a training event of its user, and none his validation or test item.

    Args:
        file: name of the table.
        table: `sft` (target_item) or `preferences` (chosen_item, rejected_item, source) of docs/architecture.md.
        sequences: all users' events.
    """
    name, by_chance = f"answers of {file}", 0
    sides = [side for side in ("target_item", "chosen_item", "rejected_item") if side in table.columns]
    for number, row in enumerate(table.select("user", *sides, *(["source"] if "source" in table.columns else [])).iter_rows(named=True)):
        user = row["user"]
        trained = sequences.train_part(user)
        for side in sides:
            if row[side] in trained:
                continue
            held_out = row[side] in sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
            if side == "rejected_item" and row["source"] != "rating":
                by_chance += held_out
                continue
            what = f"user {user}'s validation or test item" if held_out else f"no training event of user {user}"
            return Verdict(name, False, f"row {number}: {side} {row[side]} is {what}")
    found = f"the right answers of {table.height:,} rows are training events"
    lost = f"; {by_chance} unseen losers happen to be held out" if "rejected_item" in sides else ""
    return Verdict(name, True, found + lost)


def histories(file: str, table: pl.DataFrame, sequences: Sequences) -> Verdict:
    """Whether every prompt's history is the run of training events before its answers.

    SFT rows: just before the target. Preferences: just before the last two training events, which the prompt's pairs are about.

    Args:
        file: name of the table.
        table: `user, history_items`, and target_item in `sft`.
        sequences: all users' events.
    """
    name, aims = f"histories of {file}", "target_item" in table.columns
    columns = ("user", "history_items", *(["target_item"] if aims else []))
    for number, (user, history, *target) in enumerate(table.select(columns).iter_rows()):
        trained = sequences.train_part(user)
        ends = np.flatnonzero(trained == target[0]) if aims else [len(trained) - 2]
        if not any(end >= len(history) and trained[end - len(history) : end].tolist() == history for end in ends):
            later = set(history) - set(trained.tolist())
            what = f"holds item {min(later)}, no training event of user {user}" if later else "does not end just before its answer"
            return Verdict(name, False, f"row {number}: the history {what}")
    return Verdict(name, True, f"the histories of {table.height:,} rows are training events before the answer")


def prompts(file: str, table: pl.DataFrame, render: Callable[[dict], Rendered | None]) -> Verdict:
    """Whether the texts of the rows are those of the items that the rows name: what is checked of the items holds of the texts.

    Args:
        file: name of the table.
        table: rows of `sft` or `preferences`.
        render: writes a row's prompt and answers from its items; None where it cannot.
    """
    name = f"texts of {file}"
    for number, row in enumerate(table.iter_rows(named=True)):
        made = render(row)
        if made is None or made.prompt != row["prompt"]:
            return Verdict(name, False, f"row {number}: its prompt is not that of its history_items and pool_items")
        for side, text in made.answers.items():
            if row[side] != text:
                return Verdict(name, False, f"row {number}: {side} is {row[side]!r}, but its item is answered by {text!r}")
    return Verdict(name, True, f"{table.height:,} prompts and answers read as the items of their rows do")


def verbaliser(rows: Sequence[Label], tokenizers: dict[str, Encode], by: str) -> Verdict:
    """Whether the token that scoring reads for an answer is the one that training rows end with.

    Args:
        rows: prompts, answers and the ids that are scored.
        by: what scores by them: the run, or what this version would do.
        tokenizers: name -> how it makes rows; all of the run: the base model's, and those kept beside the adapters.
    """
    for name, encode in tokenizers.items():
        for row in rows:
            prompt, whole = encode(row.prompt), encode(row.prompt + row.answer)
            trained = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt or trained != [row.scored]:
                return Verdict(
                    "verbaliser",
                    False,
                    f"{by} scores the answer {row.answer!r} by token {row.scored}, but the training rows of the tokenizer of {name} have "
                    f"{trained} there",
                )
    answers = {row.answer for row in rows}
    return Verdict(
        "verbaliser", True, f"{by} scores {len(answers)} answers by the tokens that were trained (tokenizers of {', '.join(tokenizers)})"
    )


def every(table: pl.DataFrame, rows: int) -> pl.DataFrame:
    """At most so many rows, evenly over the table."""
    return table if table.height <= rows else table[np.linspace(0, table.height - 1, rows).astype(np.int64).tolist()]


def labels_of(table: pl.DataFrame, sides: Sequence[str], scored: Mapping[str, int]) -> Iterator[Label]:
    """The rows' answers with the ids that scoring reads for their texts.

    Args:
        table: rows of `sft` or `preferences`.
        sides: the columns with answers.
        scored: the text that answers with each letter -> the token id that scoring reads for it.
    """
    for row in table.select("prompt", *sides).iter_rows(named=True):
        yield from (Label(row["prompt"], row[side], scored[row[side]]) for side in sides if row[side] in scored)
