"""pairs: prompts, SFT rows and preference pairs, from the training part alone."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from llmrec import runs
from llmrec.config import Config, Prompting
from llmrec.data.tables import load_sequences, load_titles
from llmrec.errors import UserError
from llmrec.pair_statistics import dataset_card
from llmrec.preferences import preference_rows, sft_rows
from llmrec.prompting import PromptWriter
from llmrec.query_prompts import QueryWriter
from llmrec.runs import Run, say
from llmrec.stages import dataset_name, inputs, lightfm_config, retriever_name
from llmrec.templates import QueryTemplate, Template, load_template, save_prompt


def pairs(run: Run) -> None:
    """Build what the language model learns from.

    Reads `prepare`, `retrieve` and LightFM's `retrieve`. Writes sft.parquet, preferences.parquet, README.md, prompt.yaml.
    """
    from llmrec.retrievers.candidates import rows_per_batch, top_items
    from llmrec.stages.retrieve import load

    config = run.config
    sequences = load_sequences(run.input("prepare"))
    train = sequences.train_only()
    writer = prompt_writer(config, load_titles(run.input("prepare")))
    if isinstance(writer, QueryWriter):
        writer.check_titles()
    users = sampled(np.arange(train.user_count), config.limit_users)
    batch = rows_per_batch(train.item_count)

    retriever = load(run.input("retrieve"), config, train.item_count)

    def pool_for(some: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return top_items(retriever, train, some, ends, config.retrieval.candidates, batch)

    scores_for = None
    if config.pairs.lightfm != "none":
        losers_from = lightfm_config(config)
        lightfm = load(run.input("retrieve", losers_from), losers_from, train.item_count)

        def scores_for(some: np.ndarray) -> np.ndarray:
            return lightfm.scores(some, []).numpy()

    pool = pool_for if config.pairs.pool == "retriever" and not writer.asks_for_title else None
    sft, sft_facts = sft_rows(train, writer, config.pairs, config.seed, users, pool)
    preferences, facts = preference_rows(train, writer, config.pairs, config.seed, users, pool, scores_for)
    sft.write_parquet(run.work / "sft.parquet")
    preferences.write_parquet(run.work / "preferences.parquet")
    save_prompt(run.work / "prompt.yaml", writer.template, writer.config)
    card = dataset_card(
        sft_facts,
        facts,
        config.pairs,
        config.prompt,
        dataset=dataset_name(config),
        retriever=retriever_name(config),
        seed=config.seed,
        licence=config.source.licence,
        titles=writer.asks_for_title,
    )
    (run.work / "README.md").write_text(card, encoding="utf-8")
    runs.write_json(run.work / "metrics.json", {"sft": asdict(sft_facts), "preferences": asdict(facts)})
    run.headline = {"sft_rows": sft_facts.rows, "prompts": facts.prompts, "pairs": preferences.height}
    counts = ", ".join(f"{loser.pairs} {source} pairs ({loser.distinct} losers)" for source, loser in facts.losers.items())
    refused = {**sft_facts.refused, **facts.refused}
    say(f"{sft_facts.rows} SFT rows; {facts.prompts} prompts with {counts}; no pair: {facts.skipped}; refused: {refused or 'none'}")


def prompt_writer(config: Config, titles: list[str]) -> PromptWriter | QueryWriter:
    """The writer for the base model's tokenizer and the catalogue's titles; the template says of which family.

    Raises:
        UserError: the base model cannot read as many tokens as the budget allows.
    """
    positions = inputs.positions(config)
    if positions is not None and config.prompt.budget > positions:
        raise UserError(f"prompt.budget is {config.prompt.budget}, but {config.base.id} reads {positions} tokens at most: lower it")
    return writer_of(config, load_template(config.prompt.template), config.prompt, titles)


def writer_of(config: Config, template: Template | QueryTemplate, prompt: Prompting, titles: list[str]) -> PromptWriter | QueryWriter:
    """The writer for the base model's tokenizer and a template at hand, as the prompt.yaml of a run keeps it."""
    from llmrec.rankers.backbone import load_tokenizer

    tokenizer = load_tokenizer(inputs.base_folder(config))
    if isinstance(template, QueryTemplate):
        return QueryWriter(tokenizer, template, prompt, titles)
    return PromptWriter(tokenizer, template, prompt, titles)


def sampled(users: np.ndarray, limit: int | None, seed: int = 0) -> np.ndarray:
    """At most `limit` of `users`, drawn by seed, in their old order.

    Runs of several training seeds must ask and show the same users, or their spread is that of users, too: those who train and evaluate
    leave this seed alone.
    """
    if limit is None or limit >= len(users):
        return users
    return np.sort(np.random.default_rng([seed, limit]).permutation(users)[:limit])
