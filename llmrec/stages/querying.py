"""Recommend from the whole catalogue by queries that the language model writes, beside floors that need none of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from llmrec import distributed
from llmrec.bm25 import TitleIndex, choose_bm25, words
from llmrec.config import Config
from llmrec.data.sequences import TRAIN, Sequences
from llmrec.errors import UserError
from llmrec.evaluation import catalogue
from llmrec.prompting import Refused
from llmrec.query_prompts import QueryWriter
from llmrec.runs import Run, say
from llmrec.stages.pairs import sampled
from llmrec.stages.scoring import Questions
from llmrec.stages.writing import Written, written_by_all

HEADLINE = 10
"""K of the lists in queries.parquet, and of the recall that k1 and b are chosen by."""


@dataclass
class Asked:
    """Users of a split, and what their queries are written after.

    Attributes:
        users: (users,) int32.
        targets: (users,) int32.
        last: the last item of each history, 0 where there is none.
        unwanted: items that are not recommended to each user.
        rows: token ids of each user's prompt; none where it was refused.
    """

    users: np.ndarray
    targets: np.ndarray
    last: list[int]
    unwanted: list[set[int]]
    rows: list[list[int]]


@dataclass
class Catalogue:
    """What came of it.

    Attributes:
        facts: for metrics.json.
        queries: queries.parquet: one row per user and system that writes.
        table: of `evaluation.catalogue`.
    """

    facts: dict[str, Any]
    queries: pl.DataFrame
    table: catalogue.CatalogueTable


def recommend(run: Run, systems: list[str], sequences: Sequences, writer: QueryWriter, questions: Questions) -> Catalogue | None:
    """Lists of the test users by popularity, the last title, the retriever, and the queries of untrained and tuned models.

    All processes write queries; the first one alone searches and measures, and the others return None.
    """
    config = run.config
    test = _asked(config, sequences, writer, "test", questions.users)
    among = np.intersect1d(sequences.cases("valid").users, sampled(np.arange(sequences.user_count), config.limit_users))
    valid = _asked(config, sequences, writer, "valid", sampled(among, config.queries.valid_users))
    written, seconds = written_by_all(run, systems, writer, {"test": test.rows, "valid": valid.rows})
    if not distributed.is_main():
        return None

    titles = ["", *(writer.searched(item) for item in range(1, sequences.item_count + 1))]
    popularity = np.bincount(sequences.items[sequences.split == TRAIN], minlength=sequences.item_count + 1)
    queries = {"last title": {"test": [[titles[item]] for item in test.last], "valid": [[titles[item]] for item in valid.last]}}
    for system, split in written:
        queries.setdefault(system, {})[split] = written[system, split].queries
    found, bm25 = _found(config, TitleIndex(titles, popularity), queries, test, valid)
    lists = {
        "popularity": found.pop("popularity"),
        "last title": found.pop("last title"),
        "retriever": _retrieved(run, test.users),
        **found,
    }

    targets = [int(target) for target in test.targets]
    table = catalogue.table(lists, targets, [words(title) for title in titles], config.evaluation.resamples, config.seed)
    answers = {system: written[system, "test"] for system in found}
    facts: dict[str, Any] = {
        **table,
        "history_masked": {"queries": filters_history(config), "retriever": not config.retrieval.repeats},
        "bm25": {**bm25, "valid_users": len(valid.users)},
        "refused": {"test": test.rows.count([]), "valid": valid.rows.count([])},
        "tokens_per_second": {system: one.tokens / one.seconds for system, one in answers.items()},
        "seconds_per_user": seconds,
    }
    rows = [_rows(system, test, one, lists[system][HEADLINE]) for system, one in answers.items()]
    return Catalogue(facts, pl.concat(rows), table)


def _asked(config: Config, sequences: Sequences, writer: QueryWriter, split: str, users: np.ndarray) -> Asked:
    cases = sequences.cases(split).of(users)
    histories = sequences.histories(cases)
    prompts = [writer.write(history) for history in histories]
    rows = [[] if isinstance(prompt, Refused) else prompt.ids for prompt in prompts]
    if refused := rows.count([]):
        say(f"{split}: {refused} users have no queries, as their prompts were refused: they are recommended what is popular")
    unwanted = [set(history.tolist()) if filters_history(config) else set() for history in histories]
    return Asked(users, cases.targets, [int(history[-1]) if len(history) else 0 for history in histories], unwanted, rows)


def _found(
    config: Config, index: TitleIndex, queries: dict[str, dict[str, list[list[str]]]], test: Asked, valid: Asked
) -> tuple[dict[str, catalogue.Lists], dict[str, Any]]:
    """What every system's queries find, and with which k1 and b: each has its own, as those fitted to one would favour it."""
    how, bm25 = config.queries, {}
    found = {"popularity": _lists(index, [[] for _ in test.users], test)}
    for system, of_system in queries.items():
        tried = choose_bm25(index, of_system["valid"], valid.targets.tolist(), HEADLINE, valid.unwanted, how.k1, how.b)
        bm25[system] = {**tried[0], "tried": tried}
        found[system] = _lists(index, of_system["test"], test)
    return found, bm25


def _lists(index: TitleIndex, queries: Sequence[Sequence[str]], asked: Asked) -> catalogue.Lists:
    of_users = [index.lists(of_user, catalogue.KS, without) for of_user, without in zip(queries, asked.unwanted, strict=True)]
    return {k: [of_user[k] for of_user in of_users] for k in catalogue.KS}


def _retrieved(run: Run, users: np.ndarray) -> catalogue.Lists:
    """The retriever's lists as `retrieve` wrote them: longer than the pool that is ranked, where prompt.candidates is small."""
    found = pl.read_parquet(run.input("retrieve") / "candidates.parquet").filter(split="test")
    by_user = dict(found.select("user", "items").iter_rows())
    return {k: [by_user[user][:k] for user in users.tolist()] for k in catalogue.KS}


def filters_history(config: Config) -> bool:
    """Whether queries leave out the user's history: as `queries.filter_history` says, or else as the retriever's lists do."""
    own = config.queries.filter_history
    return not config.retrieval.repeats if own is None else own


def check_settings(config: Config) -> None:
    """Refuse settings of queries that cannot work, before anything is computed.

    Raises:
        UserError: one is out of range.
    """
    how = config.queries
    for name in ("count", "batch", "valid_users"):
        if vars(how)[name] < 1:
            raise UserError(f"queries.{name} is {vars(how)[name]}: it must be at least 1")
    for name in ("k1", "b"):
        if not vars(how)[name]:
            raise UserError(f"queries.{name} is empty: give it at least one value")
    if config.retrieval.candidates < max(catalogue.KS):
        raise UserError(
            f"retrieval.candidates is {config.retrieval.candidates}: the table of the whole catalogue shows the retriever's best "
            f"{max(catalogue.KS)}; retrieve again with at least that many"
        )
    if filters_history(config) == config.retrieval.repeats:
        say(
            f"queries leave out a user's history: {filters_history(config)}, the retriever: {not config.retrieval.repeats}; "
            "in the table of the whole catalogue only one of them may recommend what a user has taken before"
        )


def _rows(system: str, asked: Asked, written: Written, lists: Sequence[Sequence[int]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": asked.users,
            "split": ["test"] * len(asked.users),
            "system": [system] * len(asked.users),
            "target": asked.targets,
            "queries": pl.Series(written.queries, dtype=pl.List(pl.String)),
            "logprobs": pl.Series(written.logprobs, dtype=pl.List(pl.Float32)),
            "items": pl.Series([list(items) for items in lists], dtype=pl.List(pl.Int32)),
        }
    )
