"""What the stages sft and orpo share: their rows, and the folder a tuned model is kept in."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.config import Config, Tuning
from llmrec.data.tables import load_sequences, load_titles
from llmrec.errors import UserError
from llmrec.prompting import PromptWriter
from llmrec.query_prompts import QueryWriter
from llmrec.runs import Run, say
from llmrec.stages import dataset_name, inputs, retriever_name, run_folder, writes_titles
from llmrec.stages.pairs import prompt_writer
from llmrec.stages.scoring import questions_of
from llmrec.templates import load_template, save_prompt

if TYPE_CHECKING:
    from llmrec.rankers.backbone import TunedModel
    from llmrec.rankers.tuning import TrainResult
    from llmrec.rankers.validation import ValidationPrompts

MEASURED = {"seconds", "tokens_per_second", "peak_memory_mb"}
"""What a row of the log says of this machine."""


def refuse_successive_targets(config: Config) -> None:
    """A language model is asked once per user; retrievers alone answer for every event of a period. Said before hours of tuning.

    Raises:
        UserError: the split asks about successive targets.
    """
    if config.split.target == "successive":
        raise UserError(
            "split.target is successive, which retrievers alone answer: language models rank for one target per user. Use a dataset recipe "
            "with split.target last (split.kind may stay temporal)"
        )


def encoder(config: Config) -> PromptWriter | QueryWriter:
    """The writer that made the rows: it has their token ids."""
    return prompt_writer(config, load_titles(run_folder("prepare", config)))


def rows_of(run: Run, table: str) -> list[dict[str, Any]]:
    """The rows of `pairs`: texts, and the candidates that the prompt shows."""
    found = pl.read_parquet(run.input("pairs") / f"{table}.parquet")
    return found.select([name for name in ("prompt", "completion", "chosen", "rejected", "pool_items") if name in found.columns]).to_dicts()


def answers_of(writer: PromptWriter | QueryWriter, rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Token ids of the rows' answers: of every letter, or of the titles that occur."""
    if isinstance(writer, PromptWriter):
        return {answer: [label] for answer, label in zip(writer.answers, writer.labels, strict=True)}
    texts = dict.fromkeys(row[side] for row in rows for side in ("completion", "chosen", "rejected") if side in row)
    return {text: writer.answer_ids(text) for text in texts}


def validation_prompts(run: Run, writer: PromptWriter | QueryWriter, tuning: Tuning) -> ValidationPrompts | None:
    """What a tuning is validated on: prompts of validation users as `evaluate` asks them, or None where it is not validated.

    Raises:
        UserError: no validation user can be asked, or the answers are titles.
    """
    if tuning.eval_steps is None:
        return None
    if isinstance(writer, QueryWriter):
        raise UserError(
            f"{run.stage.name}.eval_steps is {tuning.eval_steps}: a ranker that writes titles is not validated on the way; set it to null"
        )
    from llmrec.rankers.validation import ValidationPrompts

    config = replace(run.config, evaluation=replace(run.config.evaluation, valid_users=tuning.eval_users, orders=1))
    asked = questions_of(config, run, load_sequences(run.input("prepare")), writer, "valid")
    kept = [at for at, prompts in enumerate(asked.rows) if prompts]
    if not kept:
        raise UserError(
            f"no validation target is among the top {config.prompt.candidates}: nothing to validate on. Try more users, another "
            f"retriever, or {run.stage.name}.eval_steps null"
        )
    shown = np.take_along_axis(asked.items[kept], asked.order[kept, 0], axis=1)
    return ValidationPrompts([asked.rows[at][0] for at in kept], shown, asked.targets[kept], writer.labels, tuning.batch)


def save_tuned(run: Run, model: TunedModel, writer: PromptWriter | QueryWriter, result: TrainResult) -> None:
    """Write the adapter or model as plain peft or transformers reads it, with tokenizer, prompt, card, log and numbers."""
    from llmrec.rankers.backbone import save_tuned_model
    from llmrec.rankers.validation import METRIC

    config, work = run.config, run.work
    save_tuned_model(model, work, config.base)
    writer.tokenizer.save_pretrained(work)
    save_prompt(work / "prompt.yaml", writer.template, writer.config)
    shutil.copy(run.checkpoints / "train_log.jsonl", work / "train_log.jsonl")
    if (events := run.checkpoints / "runs").exists():  # of tensorboard, which transformers keeps beside the checkpoints
        shutil.copytree(events, work / "tensorboard", dirs_exist_ok=True)
    run.origin = {"weights": inputs.weights_origin(config), "licence": config.base.licence or ""}
    facts: dict[str, Any] = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second),
        "peak_memory_mb": result.peak_memory_mb,
        "final": {name: value for name, value in result.log[-1].items() if name not in MEASURED},
        "kept_step": result.kept_step,
        "validation": [{"step": row["step"], "ndcg@10": row[METRIC]} for row in result.log if METRIC in row],
    }
    runs.write_json(work / "metrics.json", facts)
    (work / "README.md").write_text(card(config, run.stage.name, facts), encoding="utf-8")
    run.headline = {"loss": result.log[-1]["loss"], "steps": result.steps}
    say(f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, last loss {result.log[-1]['loss']:.3f}")


def card(config: Config, stage: str, facts: dict[str, Any], *, merged: bool = False) -> str:
    """The model card of what `stage` tuned.

    Args:
        config: of the run.
        stage: "sft" or "orpo".
        facts: its metrics.json.
        merged: the folder holds the whole model, with an adapter in its weights.
    """
    from llmrec.rankers.cards import model_card

    template = load_template(config.prompt.template)
    return model_card(
        stage=stage,
        base=config.base,
        weights=inputs.weights_origin(config),
        data=f"{dataset_name(config)}, candidates of {retriever_name(config)}",
        data_licence=config.source.licence,
        rows=json.loads((run_folder("pairs", config) / "metrics.json").read_text()),
        lora=asdict(config.lora),
        tuning=asdict(config.sft if stage == "sft" else config.orpo),
        prompt=template.name,
        titles=writes_titles(config),
        result=facts,
        merged=merged,
    )
