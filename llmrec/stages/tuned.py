"""What the stages sft and orpo share: their rows, and the folder a tuned adapter is kept in."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from llmrec import runs
from llmrec.config import Config
from llmrec.data.tables import load_titles
from llmrec.prompting import PromptWriter
from llmrec.runs import Run, say
from llmrec.stages import dataset_name, inputs, retriever_name, run_folder
from llmrec.stages.pairs import prompt_writer
from llmrec.templates import save_prompt

if TYPE_CHECKING:
    from peft import PeftModel

    from llmrec.rankers.tuning import TrainResult


def encoder(config: Config) -> PromptWriter:
    """The writer that made the rows: it has their token ids and labels."""
    return prompt_writer(config, load_titles(run_folder("prepare", config)))


def rows_of(run: Run, table: str) -> list[dict[str, Any]]:
    """The rows of `pairs`, texts only."""
    found = pl.read_parquet(run.input("pairs") / f"{table}.parquet")
    return found.select([name for name in ("prompt", "completion", "chosen", "rejected") if name in found.columns]).to_dicts()


def save_tuned(run: Run, model: PeftModel, writer: PromptWriter, result: TrainResult) -> None:
    """Write the adapter as plain peft reads it, with tokenizer, prompt, card, log and numbers."""
    from llmrec.rankers.backbone import save_adapter
    from llmrec.rankers.cards import model_card

    config, work = run.config, run.work
    save_adapter(model, work, config.base)
    writer.tokenizer.save_pretrained(work)
    save_prompt(work / "prompt.yaml", writer.template, writer.config)
    shutil.copy(run.checkpoints / "train_log.jsonl", work / "train_log.jsonl")
    weights = inputs.weights_origin(config)
    run.origin = {"weights": weights, "licence": config.base.licence or ""}
    made_from = json.loads((run.input("pairs") / "metrics.json").read_text())
    facts: dict[str, Any] = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second),
        "peak_memory_mb": result.peak_memory_mb,
        "final": {name: value for name, value in result.log[-1].items() if name != "seconds"},
    }
    runs.write_json(work / "metrics.json", facts)
    card = model_card(
        stage=run.stage.name,
        base=config.base,
        weights=weights,
        data=f"{dataset_name(config)}, candidates of {retriever_name(config)}",
        data_licence=config.source.licence,
        rows=made_from,
        lora=asdict(config.lora),
        tuning=asdict(config.sft if run.stage.name == "sft" else config.orpo),
        prompt=writer.template.name,
        result=facts,
    )
    (work / "README.md").write_text(card, encoding="utf-8")
    run.headline = {"loss": result.log[-1]["loss"], "steps": result.steps}
    say(f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, last loss {result.log[-1]['loss']:.3f}")
