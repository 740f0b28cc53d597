"""sft: fine-tune the language model to answer with the next item: its letter, or its title."""

from __future__ import annotations

from llmrec import distributed
from llmrec.runs import Run
from llmrec.stages import inputs
from llmrec.stages.tuned import answers_of, encoder, refuse_successive_targets, rows_of, save_tuned, validation_prompts


def sft(run: Run) -> None:
    """Train a fresh LoRA adapter, or all weights (`lora.r` 0), on the SFT rows.

    Reads `pairs`. Writes adapter_model.safetensors and adapter_config.json, or model.safetensors and config.json; tokenizer,
    prompt.yaml, README.md, train_log.jsonl.
    """
    from llmrec.rankers.backbone import compile_layers, load_trainable
    from llmrec.rankers.sft import train_sft

    config = run.config
    refuse_successive_targets(config)
    writer = encoder(config)
    model = load_trainable(inputs.base_folder(config), config.base, config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    rows = rows_of(run, "sft")
    answers = answers_of(writer, rows)
    prompts = validation_prompts(run, writer, config.sft)
    result = train_sft(model, rows, config.sft, run.checkpoints, encode=writer.encode, answers=answers, seed=config.seed, prompts=prompts)
    if distributed.is_main():
        save_tuned(run, model, writer, result)
