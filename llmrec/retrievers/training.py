"""Train a sequence model, with early stopping on validation NDCG@10: on all positions at once where the mixer is causal.

Every epoch leaves a checkpoint, and an epoch's data order and dropout come from (seed, epoch) alone, so a killed
training goes on from its last epoch and ends with the same weights on CPU.

Several processes share the windows of every step and add their gradients up, which gives one process's weights up to rounding.
Dropout and the negatives of `bce` are each process's own; with them results agree only as those of two seeds do.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrec import config, distributed
from llmrec.data.sequences import Cases, Sequences
from llmrec.errors import UserError
from llmrec.evaluation import metrics
from llmrec.progress import track
from llmrec.retrievers import losses, windows
from llmrec.retrievers.candidates import rank, rows_per_batch
from llmrec.retrievers.mixers import is_causal
from llmrec.retrievers.repeats import Seen
from llmrec.retrievers.sequence_model import SequenceModel

AT_LEAST_ONE = ("max_length", "negatives", "batch", "epochs", "patience", "validate_every", "prefixes_per_user")
FORWARD = 32  # histories per forward pass when scoring; bounds the memory of the mixers


@dataclass
class SequenceScorer:
    """A trained sequence model as a retriever (see `candidates.Scorer`). Make a new one when the weights have changed."""

    model: SequenceModel
    max_length: int

    @torch.inference_mode()
    def scores(self, users: np.ndarray, histories: list[np.ndarray]) -> Tensor:
        """Scores of all items after each history; the user's number does not matter to these models."""
        self.model.eval()
        found = []
        for start in range(0, len(histories), FORWARD):
            rows = windows.pad([history[-self.max_length :] for history in histories[start : start + FORWARD]]).to(self._table.device)
            lengths = (rows > 0).sum(1)
            scores = self.model.last(rows, lengths) @ self._table.T
            if self.model.repeat_bias is not None:
                columns, there = Seen.at(rows, torch.arange(len(rows), device=rows.device), lengths - 1).items()
                scores.scatter_add_(1, columns, there.to(scores.dtype) * self.model.repeat_bias)
            found.append(scores)
        return torch.cat(found)

    @functools.cached_property
    def _table(self) -> Tensor:
        """Made once: with a million items it is the larger part of a batch's cost where rows are normalised."""
        return self.model.item_vectors()[1:]


@dataclass
class Progress:
    """Where a training stands."""

    epoch: int = 0
    best_epoch: int = 0
    best: float = -1.0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def train(
    model: SequenceModel,
    sequences: Sequences,
    training: config.Training,
    validate: Cases,
    checkpoints: Path,
    seed: int,
) -> Progress:
    """Train `model` in place and leave it with the weights of its best epoch.

    Args:
        model: its starting weights are the caller's.
        sequences: all users' events; only their training parts are trained on.
        training: how.
        validate: validation cases; NDCG@10 over the full catalogue, history not masked, decides.
        checkpoints: a folder that survives a kill.
        seed: of data order and dropout.

    Returns:
        The last epoch, the best one, and one log row per epoch.

    Raises:
        UserError: when the loss is not finite; and as `check`.
    """
    check(model.config, training)
    optimiser = optimiser_of(model, training)
    progress = _resume(model, optimiser, checkpoints)
    batch = rows_per_batch(sequences.item_count)
    for epoch in track(range(progress.epoch + 1, training.epochs + 1), "epochs", total=training.epochs - progress.epoch):
        if progress.epoch - progress.best_epoch >= training.patience * training.validate_every:
            break
        begun = time.perf_counter()
        loss = train_epoch(model, optimiser, sequences, training, seed, epoch)
        row = {"epoch": epoch, "loss": loss}
        if epoch % training.validate_every == 0 or epoch == training.epochs:
            scorer = SequenceScorer(model, training.max_length)
            mine = validate.take(distributed.share(len(validate)))
            ranked = distributed.gather_rows(rank(scorer, sequences, mine, 1, repeats=True, batch=batch).target_rank)
            row["valid_ndcg@10"] = metrics.summary(ranked, ks=(10,), users=validate.users)["ndcg@10"]
            if row["valid_ndcg@10"] > progress.best:
                progress.best, progress.best_epoch = row["valid_ndcg@10"], epoch
                _save(checkpoints / "best.safetensors", dict(model.state_dict()))
        progress.epoch = epoch
        progress.seconds += time.perf_counter() - begun
        progress.log.append(row)
        _checkpoint(model, optimiser, progress, checkpoints)
    distributed.barrier()  # rank 0 has written it
    model.load_state_dict(load_file(checkpoints / "best.safetensors"))
    return progress


def check(model: config.SequenceModel, training: config.Training) -> None:
    """Make sure that these settings can train and go together, before anything has been trained.

    Raises:
        UserError: for a number out of range, a mixer that sees the future under windows whose every position is a target, or a
            repeat bias under a sampled loss.
    """
    at_least_one = {f"training.{name}": vars(training)[name] for name in AT_LEAST_ONE}
    if model.mixer.d_latent is not None:
        at_least_one["model.mixer.d_latent"] = model.mixer.d_latent
    at_least_one |= {"model.dim": model.dim, "model.layers": model.layers, "model.inner": model.inner}
    at_least_one |= {
        f"model.mixer.{name}": vars(model.mixer)[name] for name in ("heads", "hidden", "d_state", "headdim", "d_conv", "expand", "chunk")
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    ranges = {
        "model.dropout": 0 <= model.dropout < 1,
        "model.mixer.dropout": 0 <= model.mixer.dropout < 1,
        "training.calibration": 0 <= training.calibration <= 1,
    }
    for name, holds in ranges.items():
        if not holds:
            raise UserError(f"{name} must be from 0 to 1 (dropout: below 1)")
    for name in ("learning_rate", "weight_decay", "warmup"):
        if not vars(training)[name] >= 0:
            raise UserError(f"training.{name} is {vars(training)[name]}: it must be at least 0")
    if not training.gradient_clip > 0:
        raise UserError(f"training.gradient_clip is {training.gradient_clip}: it must be above 0")
    if model.temperature is not None and not model.temperature > 0:
        raise UserError(f"model.temperature is {model.temperature}: it must be above 0 (.05 to .1 is usual), or null")
    if not is_causal(model.mixer) and not model.mixer.legacy_leak and training.windows != "prefixes":
        raise UserError(
            f"mixer {model.mixer.name} sees the future of every position: trained on all positions at once it would look the next item up "
            "and learn nothing else. Set training.windows prefixes: one target per prefix, which ends before it"
        )
    if model.repeat_bias and training.loss != "full_softmax":
        raise UserError(f"model.repeat_bias needs training.loss full_softmax, not {training.loss}")


def optimiser_of(model: SequenceModel, training: config.Training) -> torch.optim.AdamW:
    """AdamW in one kernel; matrices decay, but no biases, norms, and numbers that say how fast a state forgets (as in mamba-ssm)."""
    matrices = {name for name, tensor in model.named_parameters() if "weight" in name and tensor.ndim >= 2}
    decaying = [tensor for name, tensor in model.named_parameters() if name in matrices]
    others = [tensor for name, tensor in model.named_parameters() if name not in matrices]
    groups = [{"params": decaying, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)


def train_epoch(
    model: SequenceModel, optimiser: torch.optim.Optimizer, sequences: Sequences, training: config.Training, seed: int, epoch: int
) -> float:
    """One epoch, whose pieces, order, negatives and dropout come from (seed, epoch) alone.

    Returns:
        The mean loss of its targets, on all processes.

    Raises:
        UserError: when the loss is not finite.
    """
    model.train()
    device = model.items.weight.device
    random = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(random.integers(2**62)))  # dropout and negatives
    pieces = windows.cut(sequences, training, random)
    steps = -(-len(pieces) // training.batch)
    total, count = 0.0, 0
    batches = windows.batches(pieces, training.batch, random, last_only=training.windows == "prefixes")
    for step, (inputs, targets) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * _rate((epoch - 1) * steps + step, steps, training)
        rows = _own_rows(len(inputs))
        real, own = int((targets > 0).sum()), int((targets[rows] > 0).sum())
        weight = own / real if distributed.rank() < len(inputs) else 0.0
        noise = (seed, epoch, step, distributed.rank())
        loss = weight * _loss(model, inputs[rows].to(device), targets[rows].to(device), training, noise)
        if not torch.isfinite(loss):
            raise UserError(f"the loss of epoch {epoch}, step {step} is {loss.item()}: try a lower training.learning_rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        distributed.sum_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimiser.step()
        total += loss.item() * real
        count += real
    return sum(distributed.gather(total)) / count


def _own_rows(count: int) -> slice:
    """This process's rows of a step; a process for which there is none takes the first, to count nothing."""
    return slice(distributed.rank(), None, distributed.world_size()) if distributed.rank() < count else slice(1)


@contextmanager
def _own_noise(*seed: int) -> Iterator[None]:
    """Random numbers of this process's own, while those that are drawn outside of the block stay the same on all processes."""
    if distributed.world_size() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        yield


def _rate(step: int, steps_per_epoch: int, training: config.Training) -> float:
    """The learning rate's factor: linear warm-up, then constant or a cosine to 0."""
    warmed = min(1.0, (step + 1) / max(1, training.warmup))
    if training.schedule == "constant":
        return warmed
    done = min(1.0, step / (steps_per_epoch * training.epochs))
    return warmed * 0.5 * (1 + math.cos(math.pi * done))


def _loss(model: SequenceModel, inputs: Tensor, targets: Tensor, training: config.Training, noise: tuple[int, ...] = ()) -> Tensor:
    """Mean loss of the real targets of a batch, (batch, length) both; `noise` seeds what is each process's own."""
    row, column = targets.nonzero().unbind(1)
    with _own_noise(*noise):
        vectors, targets = model(inputs).flatten(0, 1).index_select(0, row * inputs.shape[1] + column), targets[row, column]
    if training.loss == "full_softmax":
        repeats = None if model.repeat_bias is None else (Seen.at(inputs, row, column), model.repeat_bias)
        return losses.full_softmax(vectors, model.item_vectors(), targets, repeats)
    stop = model.items.num_embeddings
    if training.loss == "bce":
        with _own_noise(*noise, 1):
            others = torch.randint_like(targets, 1, stop - 1)
        others += others >= targets  # all items but the target
        return losses.bce(vectors, model.item_vectors(targets), model.item_vectors(others))
    ids = torch.randint(1, stop, (training.negatives,), device=targets.device)
    sampled = vectors, model.item_vectors(targets), model.item_vectors(ids), targets, ids
    if training.loss == "gbce":
        return losses.gbce(*sampled, stop - 1, training.calibration)
    return losses.sampled_softmax(*sampled)


def _save(path: Path, tensors: dict[str, Tensor], note: str = "") -> None:
    if not distributed.is_main():
        return
    beside = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"note": note})
    os.replace(beside, path)


def _checkpoint(model: SequenceModel, optimiser: torch.optim.Optimizer, progress: Progress, folder: Path) -> None:
    """One file, replaced at once: weights, optimiser and where the training stands belong together."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimiser.{key}.{name}": tensor for key, tensor in optimiser.state[parameter].items()}
    _save(folder / "last.safetensors", tensors, json.dumps(vars(progress)))


def _resume(model: SequenceModel, optimiser: torch.optim.Optimizer, folder: Path) -> Progress:
    path = folder / "last.safetensors"
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
    parameters = dict(model.named_parameters())
    for entry, tensor in tensors.items():
        if entry.startswith("optimiser."):
            _, key, name = entry.split(".", 2)
            optimiser.state[parameters[name]][key] = tensor.to(parameters[name].device)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return Progress(**json.loads(file.metadata()["note"]))
