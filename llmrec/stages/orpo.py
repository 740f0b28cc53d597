"""orpo: tune the language model on preference pairs."""

from __future__ import annotations

from llmrec import distributed
from llmrec.runs import Run
from llmrec.stages import inputs
from llmrec.stages.tuned import encoder, rows_of, save_tuned, validation_prompts


def orpo(run: Run) -> None:
    """Go on training the SFT adapter, or begin a fresh one (`orpo.start`), with ORPO.

    Reads `pairs` and `sft`. Writes adapter_model.safetensors, adapter_config.json, tokenizer, prompt.yaml, README.md, train_log.jsonl.
    """
    from llmrec.rankers.backbone import compile_layers, load_adapter, load_base, with_lora
    from llmrec.rankers.orpo import train_orpo
    from llmrec.rankers.preference_losses import check_settings

    config = run.config
    check_settings(config.orpo.loss, config.orpo.nll_on, config.orpo.negatives, config.orpo.beta, config.orpo.gamma)
    writer = encoder(config)
    base = load_base(inputs.base_folder(config), config.base)
    if config.orpo.start == "sft":
        model = load_adapter(base, run.input("sft"), trainable=True)
    else:
        model = with_lora(base, config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    rows = rows_of(run, "preferences")
    labels = dict(zip(writer.answers, writer.labels, strict=True))
    result = train_orpo(
        model,
        writer.tokenizer,
        rows,
        config.orpo,
        run.checkpoints,
        encode=writer.encode,
        label_ids=labels,
        seed=config.seed,
        prompts=validation_prompts(run, writer, config.orpo),
    )
    if distributed.is_main():
        save_tuned(run, model, writer, result)
