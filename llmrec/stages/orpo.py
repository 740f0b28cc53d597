"""orpo: tune the language model on preference pairs."""

from __future__ import annotations

from llmrec import distributed
from llmrec.errors import UserError
from llmrec.runs import Run
from llmrec.stages import inputs
from llmrec.stages.tuned import answers_of, encoder, refuse_successive_targets, rows_of, save_tuned, validation_prompts


def orpo(run: Run) -> None:
    """Go on training what SFT made, or begin afresh (`orpo.start`), with ORPO.

    Reads `pairs` and `sft`. Writes the files that `sft` writes.
    """
    from llmrec.rankers.backbone import compile_layers, load_trainable, load_tuned
    from llmrec.rankers.orpo import train_orpo
    from llmrec.rankers.preference_losses import check_settings

    config = run.config
    refuse_successive_targets(config)
    check_settings(config.orpo.loss, config.orpo.nll_on, config.orpo.negatives, config.orpo.beta, config.orpo.gamma)
    writer = encoder(config)
    if writer.asks_for_title and config.orpo.negatives != 1:
        raise UserError(f"orpo.negatives is {config.orpo.negatives}, but a prompt that asks for a title shows no pool: set it to 1")
    folder = inputs.base_folder(config)
    if config.orpo.start == "sft":
        model = load_tuned(folder, config.base, run.input("sft"), to_train=True)
    else:
        model = load_trainable(folder, config.base, config.lora, config.seed)
    if config.base.compile:
        compile_layers(model, training=True)
    rows = rows_of(run, "preferences")
    result = train_orpo(
        model,
        writer.tokenizer,
        rows,
        config.orpo,
        run.checkpoints,
        encode=writer.encode,
        answers=answers_of(writer, rows),
        seed=config.seed,
        prompts=validation_prompts(run, writer, config.orpo),
    )
    if distributed.is_main():
        save_tuned(run, model, writer, result)
