"""What SFT and ORPO have in common: a loss over whole optimiser steps, their cutting into forward passes, checkpoints, the log.

A run that is killed at any moment and started again ends with the same adapter, bit by bit on CPU: the order of rows depends
on seed and epoch alone, random states travel in the checkpoints, and a checkpoint that was cut off while being written is
passed over for the one before.

Several processes share the rows of each step and make what one process would make, up to rounding; with dropout each draws
its own, so that results agree only as two seeds of the dropout do. The same holds for another `max_tokens_per_batch`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, set_seed
from transformers.integrations import get_available_reporting_integrations

from llmrec import distributed
from llmrec.config import Tuning
from llmrec.errors import UserError
from llmrec.rankers.letters import padded_width
from llmrec.rankers.sharded import unshard
from llmrec.rankers.steps import Steps, deal
from llmrec.rankers.training_log import Bar, Log, Sums, add, by_step, means
from llmrec.rankers.validation import RankingValidation, ValidationPrompts
from llmrec.runs import say


@dataclass(frozen=True)
class TrainResult:
    """What a training run was.

    Attributes:
        steps: optimiser steps.
        seconds: time in them, over all starts of a run that was resumed.
        tokens_per_second: prompt tokens, without padding, of all processes.
        peak_memory_mb: of the GPU where there is one, else of the process; of the process that took most.
        log: one row per step, as in train_log.jsonl.
        kept_step: the step whose adapter the model has: the last, or with validation the best one.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: int
    log: list[dict[str, float]]
    kept_step: int


class WindowTrainer(Trainer):
    """A Trainer whose loss is a mean over the whole optimiser step: all its forward passes, on all processes.

    The usual way, a mean of the batches' means, weighs the rows of a small last batch more than others. A subclass
    says with `batch_sizes` how much a batch holds and with `window_loss` what it adds to the step's loss.

    A step has batch x accumulation x processes rows, as in any Trainer. How they are cut into forward passes is decided
    here: at most the batch size, or with `max_tokens_per_batch` as many as that holds; see `steps.deal`.

    Rows are dicts with prompt_ids, length (tokens), copies (how many token rows of that length it is in a forward pass) and lists of
    what is asked about the prompt. With these lists empty a
    row weighs nothing, which keeps a process busy that has fewer passes than others; collator and loss must take such rows.

    Args:
        *args: of the next trainer's constructor.
        max_tokens_per_batch: tokens of a forward pass at most, padding (`letters.pad`) included; a longer row has a pass of its own.
            Completions that have a pass to themselves (Mamba-2) count as they are, without padding.
        prompts_per_step: rows of an optimiser step, on all processes together, in place of the product above.
        **kwargs: of the next trainer's constructor.

    Raises:
        UserError: of `refuse_mixed_weights`, under ZeRO-3; or the config has auto_find_batch_size.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, max_tokens_per_batch: int | None = None, prompts_per_step: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.auto_find_batch_size:
            raise UserError("auto_find_batch_size: what goes through the model at once is decided here; set max_tokens_per_batch instead")
        self.args = copy.copy(self.args)  # the caller may make another trainer with his
        self.args._n_gpu = min(1, self.args.n_gpu)  # several GPUs are for several processes, not for nn.DataParallel
        self.max_tokens_per_batch = max_tokens_per_batch
        accumulated = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.prompts_per_step = prompts_per_step or accumulated
        if self.prompts_per_step < self.args.world_size:
            say(f"{self.args.world_size} processes share steps of {self.prompts_per_step} prompts: some idle. Raise batch or accumulation")
        self.args.gradient_accumulation_steps = 1  # the Trainer's loop gets a whole step at a time
        self.zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        model: Any = self.model
        if self.zero3:
            refuse_mixed_weights(model)
        self._sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])
        self._tokens = 0
        self._mark = time.perf_counter()

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """What the loss is divided by, as far as this batch goes, (k,) float32."""
        raise NotImplementedError

    def window_loss(self, model: nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """This batch's share of the step's loss, given the sum of `batch_sizes` over the step."""
        raise NotImplementedError

    def leave_out(self, seconds: float) -> None:
        """Of a step's time in the log: validating is no training."""
        self._mark += seconds

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer`."""
        self._mark = time.perf_counter()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The rows of one optimiser step at a time, the same on all processes."""
        rows: Any = self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StepLoader(rows, batch_sampler=Steps([row["length"] for row in rows], self.prompts_per_step, seed), collate_fn=list)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """This process's forward passes of the next step, and what the step holds on all processes."""
        rows = next(epoch_iterator)
        lengths = [padded_width(row["length"]) for row in rows]
        self._tokens += sum(row["length"] * row["copies"] for row in rows)
        at_most = self.args.train_batch_size if self.max_tokens_per_batch is None else None
        copies = [row["copies"] for row in rows]
        passes = deal(lengths, copies, at_most, self.max_tokens_per_batch, self.args.world_size)[self.args.process_index]
        batches = [self.data_collator([rows[at] for at in places] or [weightless(rows[0])]) for places in passes]
        window = torch.stack([self.batch_sizes(batch) for batch in batches]).sum(0).to(device)
        return [{"passes": batches}], self.accelerator.reduce(window, "sum")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all passes of a step; the processes exchange gradients once, with the last."""
        loss = torch.zeros((), device=self.args.device)
        *first, last = inputs["passes"]
        for batch in first:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self._alone(model):
                loss += super().training_step(model, batch, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(True)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _alone(self, model: nn.Module) -> contextlib.AbstractContextManager:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return contextlib.nullcontext()  # it looks at sync_gradients by itself
        return self.accelerator.no_sync(model=model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """This batch's share of the step's loss.

        Raises:
            UserError: the loss is not finite; the message names the rows.
        """
        loss, sums = self.window_loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, rows {inputs['rows']}: lower the learning rate"
            )
        add(self._sums, sums)
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, sums) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss the means of the steps' metrics over all processes, tokens, seconds and memory."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds, self._mark = now - self._mark, now
            mine = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
            found = distributed.gather((mine, peak_memory_mb()))
            logs |= means([totals for totals, _ in found])
            logs |= {"tokens": self._tokens, "seconds": round(seconds, 3), "tokens_per_second": round(self._tokens / seconds, 1)}
            logs["peak_memory_mb"] = max(peak for _, peak in found)
            self._sums.clear()
            self._tokens = 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a step, as the Trainer counts them for a batch."""
        return sum(super(WindowTrainer, self).floating_point_ops(batch) for batch in inputs["passes"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Random states of all processes are there before the file that marks a checkpoint as whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


class StepLoader(DataLoader):
    """A loader that tells its sampler the epoch; the Trainer looks for `set_epoch` here."""

    batch_sampler: Steps

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.batch_sampler.set_epoch(epoch)


def weightless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of one token about which nothing is asked."""
    asked: dict[str, list[Any]] = {name: [] for name, value in row.items() if isinstance(value, list)}
    return {**row, **asked, "prompt_ids": row["prompt_ids"][:1], "length": 1, "copies": 1}


def refuse_mixed_weights(model: nn.Module) -> None:
    """ZeRO-3 fails at the first optimiser step where a base in bfloat16 carries an adapter in float32 (DeepSpeed issue 8072).

    Raises:
        UserError: the weights are of more than one kind.
    """
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.is_floating_point()}
    if len(kinds) > 1:
        raise UserError(f"ZeRO-3 takes weights of one kind, and these are {' and '.join(sorted(kinds))}: use fsdp2, or base.dtype float32")


def arguments(tuning: Tuning, folder: str | Path, seed: int) -> dict[str, Any]:
    """Our settings in the words of `transformers.TrainingArguments`.

    Raises:
        UserError: of `check`.
    """
    check(tuning)
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
        "disable_tqdm": True,  # `Bar` is ours, on stderr
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the weights are in bfloat16 and the adapter in float32; there is no autocast
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every pass goes through all of the adapter
        "remove_unused_columns": False,
    }


def check(tuning: Tuning) -> None:
    """Refuse what makes no training.

    Raises:
        UserError: a setting out of its range, or without effect; the message names it.
    """
    for name in ("batch", "accumulation", "save_steps", "max_tokens_per_batch", "eval_steps", "eval_users", "patience"):
        value = vars(tuning)[name]
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    if not tuning.epochs > 0:
        raise UserError(f"epochs is {tuning.epochs}: it must be more than 0")
    if tuning.warmup < 0:
        raise UserError(f"warmup is {tuning.warmup} steps: it must be at least 0")
    if tuning.patience is not None and tuning.eval_steps is None:
        raise UserError(f"patience is {tuning.patience} validations, but eval_steps is null, which never validates: set both or neither")
    if tuning.report_to not in ("none", *(here := get_available_reporting_integrations())):
        raise UserError(f"report_to is {tuning.report_to}, which is not installed: pip install it. Here are: {', '.join(['none', *here])}")


def limits(tuning: Tuning) -> dict[str, int | None]:
    """Our settings in the words of `WindowTrainer`: the same rows make a step however many processes share them."""
    return {"max_tokens_per_batch": tuning.max_tokens_per_batch, "prompts_per_step": tuning.batch * tuning.accumulation}


def fit(trainer: WindowTrainer, folder: Path, description: str, tuning: Tuning, prompts: ValidationPrompts | None) -> TrainResult:
    """Train, going on from the last complete checkpoint in the trainer's output `folder`, and write train_log.jsonl there.

    Args:
        trainer: with rows and settings.
        folder: its output folder.
        description: of the progress bar.
        tuning: how often `prompts` are asked, and the patience.
        prompts: for validation; the best adapter is the one that stays in the model.

    Raises:
        UserError: a loss is not finite.
    """
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.add_callback(Bar(description))
    trainer.add_callback(Log(folder / "train_log.jsonl"))
    validation = None
    if prompts is not None and tuning.eval_steps is not None:
        validation = RankingValidation(trainer, prompts, folder, tuning.eval_steps, tuning.patience)
        trainer.add_callback(validation)
    set_seed(trainer.args.seed + trainer.args.process_index)  # dropout; a checkpoint's own state takes its place
    # rank 0's answer is everybody's: on other machines a shared disk may show something older
    checkpoint = distributed.gather(last_complete_checkpoint(folder) if distributed.is_main() else None)[0]
    trainer.train(resume_from_checkpoint=checkpoint)
    unshard(trainer)
    kept = trainer.state.global_step if validation is None else validation.restore_best()
    log = by_step(trainer.state.log_history)
    seconds, tokens = sum(row["seconds"] for row in log), sum(row["tokens"] for row in log)
    peak = max(int(row["peak_memory_mb"]) for row in log)
    return TrainResult(trainer.state.global_step, seconds, tokens / seconds, peak, log, kept)


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
