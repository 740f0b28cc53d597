"""Validation of a ranker while it is tuned: NDCG@10 of the target among its candidates, over a fixed sample of prompts.

The loss says how well the right letter is predicted among all tokens; this says where the target comes to stand, which is what
the ranker is for. Early stopping and the choice of the adapter go by it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec import distributed
from llmrec.evaluation.metrics import rank_of_target, summary
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.sharded import trained_weights

if TYPE_CHECKING:
    from llmrec.rankers.tuning import WindowTrainer

METRIC = "valid_ndcg@10"


@dataclass(frozen=True)
class ValidationPrompts:
    """What the ranker is asked.

    Attributes:
        rows: token ids of the prompts.
        items: the candidate behind each letter, (prompts, letters) int; 0 where a prompt has fewer.
        targets: the right candidate of each prompt, (prompts,) int.
        labels: token id of each letter.
        batch: prompts per forward pass.
    """

    rows: Sequence[Sequence[int]]
    items: np.ndarray
    targets: np.ndarray
    labels: Sequence[int]
    batch: int = 16

    def ndcg(self, model: nn.Module) -> float:
        """Mean NDCG@10 of the targets; the processes share the prompts and all get the same number."""
        mine = distributed.share(len(self.rows))
        # where the weights are split over the processes all must make the same number of forward passes
        asked = np.resize(mine if len(mine) else [0], -(-len(self.rows) // distributed.world_size()))
        scores = letter_logprobs(model, [self.rows[at] for at in asked], self.labels, batch=self.batch)[: len(mine)]
        return summary(rank_of_target(distributed.gather_rows(scores), self.items, self.targets), ks=(10,))["ndcg@10"]


class RankingValidation(TrainerCallback):
    """Validates every so many optimiser steps and after the last, keeps the best adapter, stops when it gets no better.

    All it remembers are the values in the Trainer's log and one file per best adapter so far, so that a run that is taken up
    from a checkpoint decides as if it had never been interrupted.

    Args:
        trainer: whose model is validated, and whose log takes the values.
        prompts: the sample.
        folder: where best adapters are kept.
        every: optimiser steps from one validation to the next.
        patience: validations without a better value before the training ends; None never ends it.
    """

    def __init__(self, trainer: WindowTrainer, prompts: ValidationPrompts, folder: Path, every: int, patience: int | None):
        self.trainer, self.prompts, self.folder, self.every, self.patience = trainer, prompts, folder, every, patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Validate when it is time."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        log_the_step = control.should_log
        begun = time.perf_counter()
        value = self.prompts.ndcg(kwargs["model"])
        self.trainer.leave_out(time.perf_counter() - begun)
        self.trainer.log({METRIC: value})
        control.should_log = log_the_step  # logging a value of our own has withdrawn it
        values = [value for _, value in validated(state.log_history)]
        since_best = len(values) - 1 - int(np.argmax(values))  # argmax gives the first of equals
        if since_best == 0:
            self._keep(state.global_step)
        if self.patience is not None and since_best >= self.patience:
            control.should_training_stop = True
            control.should_save = False  # taken up from the checkpoint before, it ends here again

    def restore_best(self) -> int:
        """Put the best adapter back into the model, after the training; returns its step."""
        step = max(validated(self.trainer.state.log_history), key=lambda row: row[1])[0]
        distributed.barrier()  # rank 0 has written it
        sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        if distributed.is_main() or not sharded:  # sharded weights are whole on rank 0 alone by now
            best = load_file(self._path(step))
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            with torch.no_grad():
                for name, parameter in _trainable(model).items():
                    parameter.copy_(best[name])
        distributed.barrier()  # before rank 0 tidies up
        return step

    def _keep(self, step: int) -> None:
        state = trained_weights(self.trainer)
        if distributed.is_main():
            names = _trainable(self.trainer.accelerator.unwrap_model(self.trainer.model))
            save_file({name: state[name].detach().cpu().contiguous() for name in names}, self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"


def validated(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, NDCG@10) of every validation in a training log."""
    return [(row["step"], row[METRIC]) for row in history if METRIC in row]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
