"""export: the tuned ranker as a folder to hand on."""

from __future__ import annotations

import json
import shutil

from llmrec.errors import UserError
from llmrec.runs import Run, say
from llmrec.stages import inputs
from llmrec.stages.tuned import card

RECORDS = ("stage.json", "metrics.json", "train_log.jsonl")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def export(run: Run) -> None:
    """Copy the adapter or whole model, or write the base model with the adapter merged into it (`merged`), which needs no peft.

    Reads `orpo`. Writes the tokenizer's files, prompt.yaml, README.md, and either adapter_model.safetensors with
    adapter_config.json or *.safetensors with config.json.
    """
    config, work, tuned = run.config, run.work, run.input("orpo")
    if config.merged and config.lora.r == 0:
        raise UserError("--merged merges an adapter, but lora.r is 0: this model has none and is whole without it")
    left = (*RECORDS, *ADAPTER) if config.merged else RECORDS
    for path in tuned.iterdir():
        if path.name not in left:
            shutil.copy(path, work / path.name)
    if config.merged:
        from llmrec.rankers.backbone import save_merged

        save_merged(inputs.base_folder(config), config.base, tuned, work)
        facts = json.loads((tuned / "metrics.json").read_text())
        (work / "README.md").write_text(card(config, "orpo", facts, merged=True), encoding="utf-8")
    run.origin = {"weights": inputs.weights_origin(config), "licence": config.base.licence or ""}
    megabytes = sum(path.stat().st_size for path in work.glob("*.safetensors")) / 2**20
    run.headline = {"megabytes": round(megabytes, 1)}
    what = "the merged model" if config.merged else "the adapter" if config.lora.r else "the model"
    say(f"{what}: {megabytes:,.1f} MB")
