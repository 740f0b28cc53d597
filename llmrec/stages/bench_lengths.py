"""Sweep the length of the history: time of a user and memory of a training step, of a retriever's shape with random weights.

A model with a state is timed twice at each length: reading the whole history, and taking its newest event into the state of the rest.
Weights decide nothing of this, so lengths that the trained model has no positions for can be measured too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from llmrec.config import Bench, Config
from llmrec.data.sequences import TRAIN, Sequences
from llmrec.errors import UserError
from llmrec.evaluation.latency import peak_growth_mb
from llmrec.runs import say
from llmrec.stages.bench_retrievers import has_steps
from llmrec.stages.retrieve import sequence_model
from llmrec.stages.timing import Timing, Way, one_by_one, time_ways

if TYPE_CHECKING:
    from torch import Tensor

    from llmrec.retrievers.sequence_model import SequenceModel

HISTORIES = 5
"""Synthetic users of each length."""
PREFIX_OF = 50
"""How many times as long a history is of which a random prefix is drawn: nearly all of them are then full windows."""


def lengths_of(bench: Bench) -> list[int]:
    """The lengths that `bench.lengths` asks for, ascending.

    Raises:
        UserError: one of them is no whole number from 1.
    """
    found = [] if bench.lengths is None else [length.strip() for length in bench.lengths.split(",")]
    for length in found:
        if not length.isdecimal() or int(length) < 1:
            raise UserError(f"bench.lengths: '{length}' is no length of a history: give whole numbers such as 50,200,1000")
    return sorted({int(length) for length in found})


def sweep(name: str, own: Config, item_count: int, lengths: list[int], bench: Bench, seed: int) -> Timing:
    """Measure a sequence model at every length.

    A length is left out when its training step might not fit into the free memory, should that grow with the square of the length.

    Args:
        name: what the model is called in the tables.
        own: the settings that made it.
        item_count: of the catalogue, real or not.
        lengths: ascending.
        bench: how often.
        seed: of histories; that of the weights is the model's.

    Returns:
        Facts {"lengths": one row per length: `length`, `training_memory_mb` of a step with one window, what `timing.time_ways` has of a
        user whose whole history is read, and under `step` the same of one event more, where the model has a state}; the rows' way is
        "length N" or "length N, step", their user -1.
    """
    found: list[dict[str, Any]] = []
    tables = []
    _train_step(_stretched(own, 2), item_count, seed)  # what libraries make once is no memory of a step
    for length in lengths:
        need, free = _bound_mb(found, length), free_mb()
        if need > free:
            say(f"{name} at length {length}: left out, as a training step may need {need:,.0f} MB, and {free:,.0f} MB are free")
            continue
        stretched = _stretched(own, length)
        memory = peak_growth_mb(lambda stretched=stretched: _train_step(stretched, item_count, seed))  # type: ignore[misc]
        model = sequence_model(stretched, item_count)
        histories = [_items(length, item_count, seed, number) for number in range(HISTORIES)]
        measured = time_ways(name, [_way(f"length {length}", whole(model, histories))], bench, seed)
        found.append({"length": length, "training_memory_mb": memory and round(memory, 1), **measured.facts[f"length {length}"]})
        tables.append(measured.rows)
        if has_steps(own):
            measured = time_ways(name, [_way("step", step(model, histories))], bench, seed)
            found[-1]["step"] = measured.facts["step"]
            tables.append(measured.rows.with_columns(way=pl.lit(f"length {length}, step")))
    return Timing({"lengths": found}, pl.concat(tables))


def whole(model: SequenceModel, histories: list[np.ndarray]) -> Callable[[int], Tensor]:
    """Scores of all items after one of the histories, (1, items), which is read from its beginning."""
    from llmrec.retrievers.training import SequenceScorer

    scorer = SequenceScorer(model, len(histories[0]))
    return lambda at: scorer.scores(np.array([at]), [histories[at]])


def step(model: SequenceModel, histories: list[np.ndarray]) -> Callable[[int], Tensor]:
    """The same from the state before the history's last event. The state goes on with every repeat, at a cost that stays."""
    import torch

    from llmrec.retrievers import online

    states = online.read(model, [history[:-1] for history in histories])
    with torch.inference_mode():
        table = model.item_vectors()[1:]

    @torch.inference_mode()
    def scores(at: int) -> Tensor:
        online.update(model, states, [at], histories[at][-1:])
        return states.hidden[[states.rows[at]]].to(table.device) @ table.T

    return scores


def _way(name: str, scores: Callable[[int], Tensor]) -> Way:
    def ask(places: np.ndarray) -> int:
        scores(int(places[0])).cpu()
        return 0

    return Way(name, ask, one_by_one(HISTORIES), np.full(HISTORIES, -1))


def _stretched(own: Config, length: int) -> Config:
    """The same model for histories of another length, trained one window at a time."""
    return replace(own, training=replace(own.training, max_length=length, batch=1, prefixes_per_user=1))


def _train_step(config: Config, item_count: int, seed: int) -> None:
    """One step with one window of `training.max_length` inputs; weights, gradients and AdamW's moments are made in it."""
    from llmrec.retrievers.training import optimiser_of, train_epoch

    training = config.training
    events = PREFIX_OF * training.max_length if training.windows == "prefixes" else training.max_length + 1
    items = _items(events, item_count, seed, HISTORIES)
    nothing = np.full(events, np.nan, dtype=np.float32)
    history = Sequences(np.array([0, events]), items, nothing, np.full(events, TRAIN, dtype=np.int8), item_count)
    model = sequence_model(config, item_count)
    train_epoch(model, optimiser_of(model, training), history, training, seed, epoch=1)


def _items(length: int, item_count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, length, number]).integers(1, item_count + 1, length).astype(np.int32)


def _bound_mb(found: list[dict[str, Any]], length: int) -> float:
    """The most that a step of this length may take, from the longest one so far."""
    if not found or found[-1]["training_memory_mb"] is None:
        return 0.0
    return found[-1]["training_memory_mb"] * (length / found[-1]["length"]) ** 2


def free_mb() -> float:
    """Memory that is free for a computation: of the GPU where there is one, else of the machine; without limit where it is not known."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 1024
