"""Can a ranker name the letter of a film at all? Two trainings on the same prompts: one asks for the next film, one for the last again.

    python benchmarks/copying.py runs/ml-1m/pairs/NAME --rows 400
    python benchmarks/copying.py runs/ml-1m/pairs/NAME --rows 4000 --task next --lora.r 32 --sft.learning_rate 3e-4

In the task `copy` the last film of the history stands in the pool in the place of the target, and its letter is the answer: what must
be learned is to find a title and read the letter before it. The task `next` is SFT as it is. A model that copies and does not learn what
comes next lacks knowledge, not letters. Held out are the last rows of sft.parquet; their log-loss and accuracy are among the
letters of the pool, where guessing is ln(candidates) and 1 / candidates. Other options are those of `llmrec sft`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import report, same_settings

from llmrec.cli import read_settings
from llmrec.config import Config
from llmrec.data.tables import load_titles
from llmrec.prompting import Prompt, PromptWriter
from llmrec.rankers.backbone import compile_layers, load_base, with_lora
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.sft import train_sft
from llmrec.stages import inputs
from llmrec.stages.pairs import prompt_writer


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


def trained(config: Config, writer: PromptWriter, rows: list[dict[str, str]], held_out: Iterable[dict[str, str]]) -> dict[str, Any]:
    """A fresh adapter's log-loss and accuracy on held-out rows after these."""
    model = with_lora(load_base(inputs.base_folder(config), config.base), config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    labels = dict(zip(writer.answers, writer.labels, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        result = train_sft(model, rows, config.sft, folder, encode=writer.encode, label_ids=labels, seed=config.seed)
    prompts, answers = zip(*((row["prompt"], writer.answers.index(row["completion"])) for row in held_out), strict=True)
    scores = letter_logprobs(model, [writer.encode(prompt) for prompt in prompts], writer.labels, batch=config.evaluation.batch)
    scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
    own, right = np.take_along_axis(scores, np.array(answers)[:, None], 1), scores.argmax(1) == answers
    return {
        "steps": result.steps,
        "seconds": round(result.seconds),
        "loss_by_tenths": [round(float(np.mean(part)), 3) for part in np.array_split([row["loss"] for row in result.log], 10)],
        "held_out_log_loss": round(-float(own.mean()), 3),
        "held_out_accuracy": round(float(right.mean()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a finished folder of `llmrec pairs`")
    parser.add_argument("--rows", type=int, default=400, help="to train on")
    parser.add_argument("--held_out", type=int, default=400)
    parser.add_argument("--task", choices=("copy", "next", "both"), default="both")
    options, others = parser.parse_known_args()
    same_settings()
    made = json.loads((options.pairs / "stage.json").read_text())["config"]
    names = [word for key in ("dataset", "retriever", "ranker", "recipe", "runs") for word in (f"--{key}", str(made[key]))]
    config = read_settings("evaluate", [*names, "--prompt", json.dumps(made["prompt"]), *others])[0]
    config = replace(config, sft=replace(config.sft, eval_steps=None))
    writer = prompt_writer(config, load_titles(options.pairs.parent.parent / "prepare"))
    table = pl.read_parquet(options.pairs / "sft.parquet")
    if len(table) < options.rows + options.held_out:
        parser.error(f"{options.pairs} has {len(table)} rows, fewer than {options.rows} to train on and {options.held_out} held out")
    found = {}
    for task in ("copy", "next") if options.task == "both" else (options.task,):
        rows = rows_of(table, writer, task)
        found[task] = trained(config, writer, rows[: options.rows], rows[-options.held_out :])
    report({"rows": options.rows, "held_out": options.held_out, "candidates": config.prompt.candidates, "tasks": found})


if __name__ == "__main__":
    main()
