"""What stands in a letter ranker's way: the letters or the rows? Trainings on the same rows, ranking the same held-out pools.

    python benchmarks/obstacles.py runs/ml-1m/pairs/NAME --rows 400
    python benchmarks/obstacles.py runs/ml-1m/pairs/NAME --rows 3600 --tasks retriever --training.max_length 12 --training.batch 128

copy        the last film of the history stands in the pool in the place of the target, and its letter is the answer: what must be
            learned is to find a title and to read the letter before it.
next        SFT as it is.
retriever   the run's sequence model from random weights on the histories and targets of the rows and nothing else.
popularity  how often a film is in them.

A ranker that copies has learned letters. What a sequence model, or counting, makes of the same rows is what can be learned from them
without words. Held out are the last rows of sft.parquet. Guessing among 20 candidates has accuracy .050 and mean reciprocal rank .180.
Other options are those of `llmrec evaluate`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from arms import settings_of
from measure import report, same_settings

from llmrec.config import Config
from llmrec.data.sequences import TRAIN, Sequences
from llmrec.data.tables import load_titles
from llmrec.prompting import Prompt, PromptWriter
from llmrec.rankers.backbone import compile_layers, load_base, with_lora
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.sft import train_sft
from llmrec.retrievers.popularity import Popularity
from llmrec.retrievers.training import SequenceScorer, optimiser_of, train_epoch
from llmrec.stages import inputs
from llmrec.stages.pairs import prompt_writer
from llmrec.stages.retrieve import sequence_model

TASKS = ("copy", "next", "retriever", "popularity")


def rows_of(table: pl.DataFrame, writer: PromptWriter, task: str) -> list[dict[str, str]]:
    """Prompts and answers of a task."""
    if task == "next":
        return table.select("prompt", "completion").to_dicts()
    return [copied(writer, row) for row in table.to_dicts()]


def copied(writer: PromptWriter, row: dict[str, Any]) -> dict[str, str]:
    """A row whose answer is the letter of the last film of its history, which has the target's place."""
    history = np.array(row["history_items"])
    pool = [int(history[-1]) if item == row["target_item"] else item for item in row["pool_items"]]
    prompt = writer.write(history, pool)
    if not isinstance(prompt, Prompt):
        raise SystemExit(f"user {row['user']}: {prompt.reason}")
    return {"prompt": prompt.text, "completion": row["completion"]}


def tuned(config: Config, writer: PromptWriter, rows: list[dict[str, str]], held_out: list[dict[str, str]]) -> dict[str, Any]:
    """A fresh adapter, trained on rows and asked the held-out ones."""
    model = with_lora(load_base(inputs.base_folder(config), config.base), config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    letters = {answer: [label] for answer, label in zip(writer.answers, writer.labels, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        result = train_sft(model, rows, config.sft, folder, encode=writer.encode, answers=letters, seed=config.seed)
    prompts = [writer.encode(row["prompt"]) for row in held_out]
    scores = letter_logprobs(model, prompts, writer.labels, batch=config.evaluation.batch)
    losses = [row["loss"] for row in result.log]
    by_tenths = [round(float(np.mean(part)), 3) for part in np.array_split(losses, 10)]
    answers = [writer.answers.index(row["completion"]) for row in held_out]
    return {"steps": result.steps, "seconds": round(result.seconds), "loss_by_tenths": by_tenths} | quality(scores, answers)


def ranked(config: Config, rows: pl.DataFrame, held_out: pl.DataFrame, item_count: int, kind: str) -> dict[str, Any]:
    """A retriever of the histories and targets in `rows`, scoring the pools of the held-out ones."""
    events = [[*row["history_items"], row["target_item"]] for row in rows.to_dicts()]
    items = np.concatenate(events).astype(np.int32)
    offsets = np.cumsum([0, *map(len, events)])
    train = Sequences(offsets, items, np.full(len(items), np.nan, np.float32), np.full(len(items), TRAIN, np.int8), item_count)
    scorer: Popularity | SequenceScorer = Popularity.fit(train)
    if kind == "retriever":
        model = sequence_model(config, item_count)
        optimiser = optimiser_of(model, config.training)
        for epoch in range(1, config.training.epochs + 1):
            train_epoch(model, optimiser, train, config.training, config.seed, epoch)
        scorer = SequenceScorer(model, config.training.max_length)
    histories = [np.array(history, dtype=np.int32) for history in held_out["history_items"]]
    with torch.inference_mode():
        scores = scorer.scores(np.arange(len(histories)), histories).cpu().numpy()
    pools = np.array(held_out["pool_items"].to_list())
    targets = [list(pool).index(target) for pool, target in zip(pools, held_out["target_item"], strict=True)]
    return quality(np.take_along_axis(scores, pools - 1, 1), targets)


def quality(scores: np.ndarray, targets: Sequence[int]) -> dict[str, float]:
    """Accuracy and mean reciprocal rank of the targets by scores, (rows, candidates); equal scores count against them."""
    own = np.take_along_axis(scores, np.array(targets)[:, None], 1)
    rank = (scores >= own).sum(1)
    return {"held_out_accuracy": round(float((rank == 1).mean()), 3), "held_out_mrr": round(float((1 / rank).mean()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a finished folder of `llmrec pairs`")
    parser.add_argument("--rows", type=int, default=400, help="to train on")
    parser.add_argument("--held_out", type=int, default=400)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options, others = parser.parse_known_args()
    same_settings()
    config = settings_of(options.pairs, *others)
    config = replace(config, sft=replace(config.sft, eval_steps=None))
    writer = prompt_writer(config, load_titles(options.pairs.parent.parent / "prepare"))
    if not isinstance(writer, PromptWriter):
        parser.error(f"{options.pairs} asks for titles: these tasks are about letters")
    table = pl.read_parquet(options.pairs / "sft.parquet")
    if len(table) < options.rows + options.held_out:
        parser.error(f"{options.pairs} has {len(table)} rows, fewer than {options.rows} to train on and {options.held_out} held out")
    rows, held_out = table[: options.rows], table[-options.held_out :]
    item_count = len(writer.titles) - 1
    found = {}
    for task in options.tasks:
        if task in ("retriever", "popularity"):
            found[task] = ranked(config, rows, held_out, item_count, task)
        else:
            found[task] = tuned(config, writer, rows_of(rows, writer, task), rows_of(held_out, writer, task))
    report({"rows": options.rows, "held_out": options.held_out, "candidates": config.prompt.candidates, "tasks": found})


if __name__ == "__main__":
    main()
