"""What a tuning says of itself: means over whole steps, train_log.jsonl, the progress bar."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec.progress import track
from llmrec.rankers.validation import METRIC

Sums = dict[str, tuple[Tensor, Tensor | float]]
"""Metrics of a batch: name -> (sum, how many); logged as their quotient over a step, or as the sum where "how many" is 0."""


def add(totals: dict[str, list[Any]], sums: Sums) -> None:
    """Add a batch to the totals of a step or an evaluation, in place; new names begin at [0, 0]."""
    for name, (total, count) in sums.items():
        totals[name][0] += total
        totals[name][1] += count


def means(parts: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Quotients of the processes' totals."""
    found = {}
    for name in dict.fromkeys(name for totals in parts for name in totals):
        total, count = (sum(totals.get(name, (0.0, 0.0))[at] for totals in parts) for at in (0, 1))
        found[name] = total / count if count else total
    return found


def by_step(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row per optimiser step: its loss and metrics, and what was validated after it."""
    rows: dict[float, dict[str, float]] = defaultdict(dict)
    for row in history:
        if "loss" in row or METRIC in row:  # and not the summary at the end
            rows[row["step"]] |= row
    return list(rows.values())


class Log(TrainerCallback):
    """train_log.jsonl while it grows, for whoever watches, and after a crash."""

    def __init__(self, file: Path):
        self.file = file

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One more row."""
        if state.is_world_process_zero:
            with self.file.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin with the steps up to the checkpoint: those after it are made again."""
        self._write(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What was validated after a step goes into its row."""
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(json.dumps(row) + "\n" for row in by_step(state.log_history)))


class Bar(TrainerCallback):
    """Progress on stderr: steps done, time taken, time left."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar, as far along as a resumed run is."""
        left = range(state.global_step, state.max_steps + 1)
        self.bar = iter(track(left, self.description, total=state.max_steps, done=state.global_step))
        next(self.bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        next(self.bar, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the bar away."""
        for _ in self.bar:
            pass
