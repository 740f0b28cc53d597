"""What SFT and ORPO have in common: a loss over whole optimiser steps, an order of rows, checkpoints, the log.

A run that is killed at any moment and started again ends with the same adapter, bit by bit on CPU: the order of rows depends
on seed and epoch alone, random states travel in the checkpoints, and a checkpoint that was cut off while being written is
passed over for the one before.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from llmrec.config import Tuning
from llmrec.errors import UserError
from llmrec.progress import track

Sums = dict[str, tuple[Tensor, Tensor | float]]
"""Metrics of a batch: name -> (sum, how many); logged as their quotient over a step, or as the sum where "how many" is 0."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run was.

    Attributes:
        steps: optimiser steps.
        seconds: time in them, over all starts of a run that was resumed.
        tokens_per_second: prompt tokens, without padding.
        peak_memory_mb: of the GPU where there is one, else of the process.
        log: one row per step, as in train_log.jsonl.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: int
    log: list[dict[str, float]]


class WindowTrainer(Trainer):
    """A Trainer whose loss is a mean over the whole optimiser step: all its forward passes, on all processes.

    The usual way, a mean of the batches' means, weighs the rows of a small last batch more than others. A subclass
    says with `batch_sizes` how much a batch holds and with `window_loss` what it adds to the step's loss.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """What the loss is divided by, as far as this batch goes, (k,) float32."""
        raise NotImplementedError

    def window_loss(self, model: torch.nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """This batch's share of the step's loss, given the sum of `batch_sizes` over the step."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step, and what they hold together on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        window = torch.stack([self.batch_sizes(batch) for batch in samples]).sum(0).to(device)
        return samples, self.accelerator.reduce(window, "sum")

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the step's loss.

        Raises:
            UserError: the loss is not finite; the message names the rows.
        """
        loss, sums = self.window_loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, rows {inputs['rows']}: lower the learning rate"
            )
        sums["tokens"] = (inputs["lengths"].sum(), 0)
        totals = torch.tensor([[float(total), float(count)] for total, count in sums.values()], device=loss.device)
        for name, (total, count) in zip(sums, self.accelerator.reduce(totals, "sum").tolist(), strict=True):
            self._totals[name][0] += total
            self._totals[name][1] += count
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, sums) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the steps' metrics with the loss."""
        if "loss" in logs:
            logs |= {name: total / count if count else total for name, (total, count) in self._totals.items()}
            self._totals.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroups([row["length"] for row in rows], step, self.args.data_seed or self.args.seed)


class LengthGroups(Sampler[int]):
    """Rows of similar length in one optimiser step, steps in random order; both depend on seed and epoch alone.

    Args:
        lengths: tokens of each row.
        step: rows of an optimiser step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) // self.step * self.step
        steps = []
        for start in range(0, whole, self.step * 16):  # a pool of 16 steps keeps the choice random
            pool = sorted(order[start : min(start + self.step * 16, whole)], key=lambda row: self.lengths[row])
            steps += [pool[at : at + self.step] for at in range(0, len(pool), self.step)]
        for at in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[at]
        yield from order[whole:]  # the short step comes last, because batches are cut from this order


def arguments(tuning: Tuning, folder: str | Path, seed: int) -> dict[str, Any]:
    """Our settings in the words of `transformers.TrainingArguments`."""
    return {
        "output_dir": str(folder),
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": tuning.schedule if tuning.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": tuning.warmup,
        "num_train_epochs": tuning.epochs,
        "per_device_train_batch_size": tuning.batch,
        "gradient_accumulation_steps": tuning.accumulation,
        "weight_decay": tuning.weight_decay,
        "max_grad_norm": tuning.gradient_clip,
        "gradient_checkpointing": tuning.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": tuning.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": tuning.report_to,
        "disable_tqdm": True,  # `Log` has its own bar, on stderr
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the weights are in bfloat16 and the adapter in float32; there is no autocast
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
    }


def fit(trainer: WindowTrainer, folder: Path, description: str) -> TrainResult:
    """Train, going on from the last complete checkpoint in the trainer's output `folder`, and write train_log.jsonl there."""
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.add_callback(Log(description))
    set_seed(trainer.args.seed)  # dropout; a checkpoint's own state takes its place
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    log = [row for row in trainer.state.log_history if "loss" in row]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    seconds, tokens = sum(row["seconds"] for row in log), sum(row["tokens"] for row in log)
    return TrainResult(trainer.state.global_step, seconds, tokens / seconds, peak_memory_mb(), log)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; newer ones, which were cut off, are deleted.

    trainer_state.json is the last file the Trainer writes, so a checkpoint where it parses is whole.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def peak_memory_mb() -> int:
    """Peak memory of the GPU where there is one, else of the process, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Log(TrainerCallback):
    """Progress on stderr, and the seconds of each step in the Trainer's log."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar, as far along as a resumed run is."""
        self.bar = iter(track(range(state.max_steps + 1), self.description, total=state.max_steps))
        for _ in range(state.global_step + 1):
            next(self.bar)
        self.mark = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add seconds since the last step, checkpoints included."""
        now = time.perf_counter()
        state.log_history[-1]["seconds"] = round(now - self.mark, 3)
        self.mark = now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        next(self.bar, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the bar away."""
        for _ in self.bar:
            pass


def checked_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Refuse rows that cannot be trained on.

    Raises:
        UserError: no rows; or an empty prompt, or a completion that is not one token. The message names the row.
    """
    if not rows:
        raise UserError("there are no rows to train on: see the pairs stage's README.md for what was skipped and why")
    for number, row in enumerate(rows):
        if not row["prompt_ids"]:
            raise UserError(f"row {number}: the prompt is empty")
        for column in columns:
            if len(row[column]) != 1:
                name = column.removesuffix("_ids")
                raise UserError(f"row {number}: the {name} completion is {len(row[column])} tokens; completions of one token are supported")
