"""Sequence models: training beside a plain SASRec, a catalogue of a million items, memory and time for paper 002's table.

    python benchmarks/retrievers.py models --prepared runs/ml-1m/prepare
    python benchmarks/retrievers.py models --prepared runs/ml-1m/prepare --yardstick plain_sasrec.py --ratings ratings.dat
    python benchmarks/retrievers.py catalogue
    python benchmarks/retrievers.py efficiency --prepared runs/ml-1m/prepare

Sections: models (every sequence recipe: seconds per million targets), catalogue (sampled losses and exact candidates),
efficiency (5 epochs and a full ranking of the test users). All on the CPU, at the recipes' sizes and losses, but for one
length, width 64 and batches of 128. Every model has a process of its own. Those that are compared train an epoch in turn, the others of
`models` one after the other, as not all fit into memory at once. Peaks are of the whole process, Python, torch and data included.
`--users` cuts the data, `--recipes` the models.

The yardstick is any program with the options and the last line of output (JSON) that `yardstick` below uses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import elsewhere, in_turn, memory, report, same_settings

from llmrec import resources
from llmrec.cli import read_settings
from llmrec.config import Config
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.data.tables import load_sequences
from llmrec.retrievers import training, windows
from llmrec.retrievers.candidates import rank, rows_per_batch
from llmrec.retrievers.sequence_model import SequenceModel
from llmrec.ssm import native
from llmrec.stages.retrieve import sequence_model

DIM, BATCH = 64, 128
CANDIDATES = 100
LOSSES: dict[str, dict[str, Any]] = {
    "sampled_softmax_256": {"loss": "sampled_softmax", "negatives": 256},
    "sampled_softmax_512": {"loss": "sampled_softmax", "negatives": 512},
    "gbce_256": {"loss": "gbce", "negatives": 256},
    "bce": {"loss": "bce"},
}
PAPER_002 = ("sasrec", "mambarec", "recmamba", "2mamba4rec", "2mamba4rec-cpu")
RATIOS = (("sasrec", "yardstick"), ("sasrec", "yardstick_bf16"), ("2mamba4rec-cpu", "sasrec"), ("2mamba4rec", "sasrec"))


def sequence_recipes() -> list[str]:
    """The names of the recipes of sequence models."""
    return [name for name in resources.names("recipes/retrievers") if settings(name).retrieval.kind == "sequence"]


def settings(recipe: str) -> Config:
    """What `llmrec retrieve` makes of a recipe."""
    return read_settings("retrieve", ["--retriever", recipe])[0]


def alike(recipe: str, length: int) -> Config:
    """A recipe at the size that all have here: each user's latest window, or one prefix where the mixer sees the future."""
    own = settings(recipe)
    cut = replace(own.training, max_length=length, batch=BATCH, prefixes_per_user=1)
    if cut.windows != "prefixes":
        cut = replace(cut, windows="last")
    return replace(own, model=replace(own.model, dim=DIM), training=cut)


# ---------------------------------------------------------------- data


def prepared(folder: str, users: int | None) -> Sequences:
    """What `llmrec prepare` wrote; the first users alone where their number is given. The catalogue stays whole."""
    whole = load_sequences(Path(folder))
    offsets = whole.offsets if users is None else whole.offsets[: users + 1]
    events = slice(offsets[-1])
    return Sequences(offsets, whole.items[events], whole.ratings[events], whole.split[events], whole.item_count)


def synthetic(items: int, users: int, length: int = 50) -> Sequences:
    """Users with `length` training targets each and a test history of that length; items by Zipf's law, the k-th as often as 1/k."""
    random = np.random.default_rng(0)
    split = np.tile(np.array([TRAIN] * (length + 1) + [VALID, TEST], dtype=np.int8), users)
    order = np.floor((items + 1) ** random.random(len(split))).astype(np.int32)  # 1..items: log-uniform is Zipf with exponent 1
    names = random.permutation(items).astype(np.int32) + 1  # popular items do not lie side by side
    offsets = np.arange(users + 1, dtype=np.int64) * (length + 3)
    return Sequences(offsets, names[order - 1], np.full(len(split), np.nan, dtype=np.float32), split, items)


def targets_of(config: Config, sequences: Sequences) -> int:
    """The training targets of an epoch."""
    pieces = windows.cut(sequences, config.training, np.random.default_rng(0))
    return len(pieces) if config.training.windows == "prefixes" else sum(len(piece) - 1 for piece in pieces)


# ---------------------------------------------------------------- what a process of its own does


def epochs(config: Config, model: SequenceModel, sequences: Sequences) -> Iterator[float]:
    """Train on and on: the seconds of each epoch."""
    how = config.training
    optimiser = training.optimiser_of(model, how)
    for epoch in itertools.count(1):
        begun = time.perf_counter()
        training.train_epoch(model, optimiser, sequences, how, config.seed, epoch)
        yield time.perf_counter() - begun


def trained(config: Config, data: Callable[[], Sequences], warm: bool = True) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, the first of them unseen when `warm`."""
    sequences = data()
    targets = targets_of(config, sequences)
    seconds = epochs(config, sequence_model(config, sequences.item_count), sequences)
    if warm:
        next(seconds)
    for value in seconds:
        yield {"targets": targets, "seconds": value, "peak_mb": memory("VmHWM")}


def ranked(config: Config, model: SequenceModel, sequences: Sequences) -> dict[str, Any]:
    """The candidates of all test users."""
    scorer, cases = training.SequenceScorer(model, config.training.max_length), sequences.cases("test")
    begun = time.perf_counter()
    rank(scorer, sequences, cases, CANDIDATES, repeats=False, batch=rows_per_batch(sequences.item_count))
    return {"users": len(cases), "seconds": time.perf_counter() - begun, "peak_mb": memory("VmHWM")}


def ranked_untrained(config: Config, data: Callable[[], Sequences]) -> Iterator[dict[str, Any]]:
    """The candidates of a model with its first weights: they cost what a trained model's do."""
    sequences = data()
    yield ranked(config, sequence_model(config, sequences.item_count), sequences)


def trained_and_ranked(config: Config, data: Callable[[], Sequences], count: int) -> Iterator[dict[str, Any]]:
    """So many epochs from the first on, then the test users."""
    sequences = data()
    model = sequence_model(config, sequences.item_count)
    for seconds in itertools.islice(epochs(config, model, sequences), count):
        yield {"seconds": seconds, "peak_mb": memory("VmHWM")}
    yield ranked(config, model, sequences)


def yardstick(script: str, ratings: str, length: int, *options: str) -> Generator[dict[str, Any]]:
    """Another program's training: a fresh run for every epoch that counts, each with an epoch to warm up."""
    command = [sys.executable, script, "--ratings", ratings, "--max-len", str(length), "--batch", str(BATCH), "--bucket", "--malloc-tuned"]
    command += ["--threads", str(torch.get_num_threads()), "--repeats", "1", *options]
    while True:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        by_unit = {result["unit"]: result for result in json.loads(done.stdout.splitlines()[-1])["results"]}
        epoch, peak = by_unit["s/epoch"], by_unit["MB"]
        yield {"targets": epoch["targets"], "seconds": epoch["value"], "peak_mb": peak["value"]}


# ---------------------------------------------------------------- sections


def models(options: argparse.Namespace) -> dict[str, Any]:
    """Every sequence recipe with its own loss, with the full softmax too where that is another, and the yardstick."""
    configs = {name: alike(name, options.length) for name in options.recipes or sequence_recipes()}
    for name, config in list(configs.items()):
        if config.training.loss != "full_softmax":
            configs[f"{name} full_softmax"] = replace(config, training=replace(config.training, loss="full_softmax"))
    data = partial(prepared, options.prepared, options.users)
    runs = {name: elsewhere(trained, config, data) for name, config in configs.items()}
    if options.yardstick:
        runs["yardstick"] = yardstick(options.yardstick, options.ratings, options.length)
        runs["yardstick_bf16"] = yardstick(options.yardstick, options.ratings, options.length, "--bf16")
    peers = {name for pair in RATIOS for name in pair}
    measured = in_turn({name: run for name, run in runs.items() if name in peers}, options.epochs)
    for name, run in runs.items():
        if name not in peers:
            measured |= in_turn({name: run}, options.epochs)
    rows: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        how = {"loss": configs[name].training.loss, "windows": configs[name].training.windows} if name in configs else {}
        seconds, targets = [value["seconds"] for value in values], values[0]["targets"]
        rows[name] = how | {
            "targets": targets,
            "epochs_s": [round(value, 2) for value in seconds],
            "s_per_1m_targets": round(1e6 * statistics.median(seconds) / targets, 2),
            "peak_mb": round(max(value["peak_mb"] for value in values)),
        }
    ratios = {
        f"{above}_over_{below}": round(rows[above]["s_per_1m_targets"] / rows[below]["s_per_1m_targets"], 3)
        for above, below in RATIOS
        if above in rows and below in rows
    }
    return {"length": options.length, "dim": DIM, "batch": BATCH, "users": options.users or "all", "models": rows, **ratios}


def catalogue(options: argparse.Namespace) -> dict[str, Any]:
    """Sampled losses and exact candidates where a users x items matrix, or all logits of a batch, would not fit."""
    config = settings("2mamba4rec-cpu")
    few = partial(synthetic, options.items, options.steps * BATCH)
    rows = {}
    for name, loss in LOSSES.items():
        one = replace(config, training=replace(config.training, batch=BATCH, windows="last", **loss))
        [value] = in_turn({name: elsewhere(trained, one, few)}, 1)[name]
        rows[name] = {
            "steps_per_s": round(options.steps / value["seconds"], 2),
            "targets_per_s": round(value["targets"] / value["seconds"]),
            "peak_mb": round(value["peak_mb"]),
        }
    one = replace(config, training=replace(config.training, batch=BATCH, windows="last", loss="full_softmax"))
    [value] = in_turn({"step": elsewhere(trained, one, partial(synthetic, options.items, BATCH), False)}, 1)["step"]
    rows["full_softmax"] = {"seconds_of_one_step": round(value["seconds"], 1), "peak_mb": round(value["peak_mb"])}
    candidates = {}
    most = options.users or 10_000
    for users in (most // 10, most):
        run = elsewhere(ranked_untrained, config, partial(synthetic, options.items, users))
        [value] = in_turn({"rank": run}, 1)["rank"]
        candidates[f"{users}_users"] = {
            "seconds": round(value["seconds"], 1),
            "users_per_s": round(users / value["seconds"], 1),
            "peak_mb": round(value["peak_mb"]),
        }
    sizes = {"items": options.items, "dim": DIM, "batch": BATCH, "steps": options.steps, "candidates_kept": CANDIDATES}
    return sizes | {"recipe": "2mamba4rec-cpu", "training": rows, "candidates": candidates}


def efficiency(options: argparse.Namespace, count: int = 5) -> dict[str, Any]:
    """The table of paper 002: memory, seconds of five epochs, seconds of the evaluation."""
    configs = {name: alike(name, options.length) for name in options.recipes or PAPER_002}
    data = partial(prepared, options.prepared, options.users)
    runs = {name: elsewhere(trained_and_ranked, config, data, count) for name, config in configs.items()}
    rows = {}
    for name, values in in_turn(runs, count + 1).items():
        *trained_epochs, evaluation = values
        rows[name] = {
            "training_s": round(sum(value["seconds"] for value in trained_epochs), 2),
            "training_peak_mb": round(trained_epochs[-1]["peak_mb"]),
            "evaluation_s": round(evaluation["seconds"], 2),
            "peak_mb": round(evaluation["peak_mb"]),
        }
    return {"length": options.length, "epochs": count, "test_users": evaluation["users"], "models": rows}


def main() -> None:
    sections = {"models": models, "catalogue": catalogue, "efficiency": efficiency}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="models, catalogue, efficiency; all by default")
    parser.add_argument("--prepared", help="models, efficiency: the folder of `llmrec prepare`")
    parser.add_argument("--length", type=int, default=200, help="models, efficiency: events of history")
    parser.add_argument("--recipes", type=lambda names: names.split(","), help="models, efficiency: these recipes alone, a,b")
    parser.add_argument("--users", type=int, help="models, efficiency: the first users alone; catalogue: how many, 10,000 by default")
    parser.add_argument("--epochs", type=int, default=3, help="models: epochs that count, after one that does not")
    parser.add_argument("--yardstick", help="models: a program to measure beside")
    parser.add_argument("--ratings", help="models: the yardstick's data; --users does not cut it")
    parser.add_argument("--items", type=int, default=1_000_000, help="catalogue: number of items")
    parser.add_argument("--steps", type=int, default=24, help="catalogue: training steps that count, after as many that do not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chosen = options.sections or list(sections)
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(sections)}")
    if options.prepared is None and {"models", "efficiency"} & set(chosen):
        parser.error("models and efficiency need --prepared, the folder that `llmrec prepare` made")
    if (options.yardstick is None) != (options.ratings is None):
        parser.error("--yardstick and --ratings go together")
    same_settings()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes to come
    torch.set_num_threads(options.threads)
    report({"native": native.library() is not None} | {name: sections[name](options) for name in chosen})


if __name__ == "__main__":
    main()
