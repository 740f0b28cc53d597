"""What `llmrec audit` asks of the rows a ranker learns from: whose they are, and by which tokens they are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.data.tables import load_titles
from llmrec.errors import UserError
from llmrec.evaluation import leaks_of_pairs
from llmrec.evaluation.leaks import Verdict
from llmrec.evaluation.leaks_of_pairs import Encode, Rendered, every, labels_of
from llmrec.prompting import PromptWriter, Refused
from llmrec.query_prompts import QueryWriter
from llmrec.stages import inputs
from llmrec.stages.audit_folders import Evidence, Made
from llmrec.stages.pairs import writer_of
from llmrec.templates import load_prompt

ROWS = 200  # written anew
SIDES = {"sft": {"completion": "target_item"}, "preferences": {"chosen": "chosen_item", "rejected": "rejected_item"}}
"""The answers of each table, and the items that they name."""


def of_pairs(made: Made, evidence: Evidence) -> Iterator[Verdict]:
    """The rows, their texts, and the tokens of their answers."""
    tables = _tables(made.folder)
    for file, table in tables.items():
        yield leaks_of_pairs.answers(file, table, evidence.sequences)
        yield leaks_of_pairs.histories(file, table, evidence.sequences)
    writer = _writer(made, evidence)
    if writer is None:
        yield _without(made, "texts and verbaliser")
        return
    for file, table in tables.items():
        yield leaks_of_pairs.prompts(file, every(table, ROWS), _renderer(writer, SIDES[file]))
    yield _verbaliser(tables, writer, {"the base model": writer.encode})


def of_tuning(made: Made, evidence: Evidence) -> Iterator[Verdict]:
    """Whether the tokenizer that is kept with an adapter makes the tokens that are scored."""
    from llmrec.rankers.backbone import load_tokenizer

    writer = _writer(made, evidence)
    if writer is None:
        yield _without(made, "verbaliser")
        return
    try:
        own = type(writer)(load_tokenizer(made.folder), writer.template, writer.config, writer.titles)  # type: ignore[arg-type]
    except UserError as error:
        yield Verdict("verbaliser", False, f"the tokenizer in the folder does not make the answers that were trained: {error}")
        return
    yield _verbaliser(_tables(evidence.input_of(made, "pairs").folder), writer, {"the base model": writer.encode, made.name: own.encode})


def of_scoring(made: Made, evidence: Evidence, labels: dict[str, int] | None) -> Verdict:
    """Whether the tokens that an evaluation read are those that training rows end with; adapters' tokenizers are looked at in `of_tuning`.

    Args:
        made: the evaluation.
        evidence: of the audit.
        labels: the text of each answer -> the token it was scored by, as the run recorded it.
    """
    tuned = evidence.input_of(made, "orpo")
    writer = _writer(tuned, evidence)
    if writer is None:
        return _without(made, "verbaliser")
    if labels is None and isinstance(writer, PromptWriter):
        return Verdict("verbaliser", None, "the run did not record by which tokens it scored: make it again to know")
    return _verbaliser(_tables(evidence.input_of(tuned, "pairs").folder), writer, {"the base model": writer.encode}, labels)


def _tables(folder: Path) -> dict[str, pl.DataFrame]:
    return {file: pl.read_parquet(folder / f"{file}.parquet") for file in SIDES}


def _writer(made: Made, evidence: Evidence) -> PromptWriter | QueryWriter | None:
    """The writer of the run's prompts; None where the base model is not here."""
    if inputs.missing("pairs", made.config):
        return None
    template, prompt = load_prompt(made.folder / "prompt.yaml")
    return writer_of(made.config, template, prompt, load_titles(evidence.prepared))


def _without(made: Made, name: str) -> Verdict:
    return Verdict(name, None, f"{inputs.missing('pairs', made.config)} is not here, nor its tokenizer")


def _renderer(writer: PromptWriter | QueryWriter, sides: dict[str, str]) -> Callable[[dict[str, Any]], Rendered | None]:
    def render(row: dict[str, Any]) -> Rendered | None:
        history, pool = row["history_items"], row["pool_items"]
        if writer.shown and not {row[item] for item in sides.values()} <= set(pool):
            return None
        prompt = writer.write(history, pool)
        if isinstance(prompt, Refused) or prompt.history_items != history:
            return None
        return Rendered(prompt.text, {side: writer.answer(row[item], pool) for side, item in sides.items()})

    return render


def _verbaliser(
    tables: dict[str, pl.DataFrame],
    writer: PromptWriter | QueryWriter,
    tokenizers: dict[str, Encode],
    recorded: dict[str, int] | None = None,
) -> Verdict:
    """The tokens that the run scored by, or that this version would where nothing has been scored yet."""
    if isinstance(writer, QueryWriter):
        return Verdict("verbaliser", None, "the answers are titles, of which every token is scored")
    scored = dict(zip(writer.answers, writer.labels, strict=True)) if recorded is None else recorded
    rows = [label for file, table in tables.items() for label in labels_of(every(table, ROWS), list(SIDES[file]), scored)]
    return leaks_of_pairs.verbaliser(rows, tokenizers, "this version of llmrec" if recorded is None else "the run")
