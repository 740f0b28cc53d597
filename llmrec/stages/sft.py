"""sft: fine-tune the language model to answer with the letter of the next item."""

from __future__ import annotations

from llmrec import distributed
from llmrec.runs import Run
from llmrec.stages import inputs
from llmrec.stages.tuned import encoder, rows_of, save_tuned, validation_prompts


def sft(run: Run) -> None:
    """Train a fresh LoRA adapter on the SFT rows.

    Reads `pairs`. Writes adapter_model.safetensors, adapter_config.json, tokenizer, prompt.yaml, README.md, train_log.jsonl.
    """
    from llmrec.rankers.backbone import compile_layers, load_base, with_lora
    from llmrec.rankers.sft import train_sft

    config = run.config
    writer = encoder(config)
    model = with_lora(load_base(inputs.base_folder(config), config.base), config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    rows = rows_of(run, "sft")
    labels = dict(zip(writer.answers, writer.labels, strict=True))
    prompts = validation_prompts(run, writer, config.sft)
    result = train_sft(model, rows, config.sft, run.checkpoints, encode=writer.encode, label_ids=labels, seed=config.seed, prompts=prompts)
    if distributed.is_main():
        save_tuned(run, model, writer, result)
