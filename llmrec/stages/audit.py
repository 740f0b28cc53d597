"""`llmrec audit RUN`: is a number of this run too good, because something knew what it was asked?

A run folder is checked with everything it rests on: its data, its retrievers, the rows its ranker was trained on, its rankings. What is
checked, and why it would be a leak, say `evaluation.leaks` and its neighbours; here the folders are read. An audit
changes nothing and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.data.tables import load_sequences
from llmrec.errors import UserError
from llmrec.evaluation import leaks_of_ranks, leaks_of_tables
from llmrec.evaluation.leaks import Verdict
from llmrec.evaluation.leaks_of_ranks import Claim
from llmrec.stages.audit_folders import Evidence, Made, chain_of
from llmrec.stages.audit_prompts import of_pairs, of_scoring, of_tuning

MARKS = {True: "ok", False: "LEAK", None: "not checked"}


def audit(folder: str) -> dict[str, Any]:
    """Check a run and everything it rests on; print a line per check.

    Args:
        folder: of any stage.

    Returns:
        What the command prints as its last line: the folder, the number of leaks, and every verdict.

    Raises:
        UserError: no finished run, or one whose inputs are gone or were made again since.
    """
    chain = chain_of(Path(folder).resolve())
    prepared = next((made.folder for made in chain.values() if made.stage == "prepare"), None)
    if prepared is None:
        raise UserError(f"{folder} rests on no prepared data: there is nothing to audit")
    evidence = Evidence(chain, load_sequences(prepared), prepared)
    found = [(made.name, verdict) for made in chain.values() if made.stage in CHECKS for verdict in CHECKS[made.stage](made, evidence)]
    width = max(len(name) for name, _ in found)
    for name, verdict in found:
        print(f"{MARKS[verdict.passed]:<15}{name:<{width}}  {verdict.name}: {verdict.detail}")
    leaks, looked = (sum(verdict.passed in of for _, verdict in found) for of in ([False], [False, True]))
    unknown = f"; {len(found) - looked} could not be made or have nothing to look at" if looked < len(found) else ""
    print(f"{leaks or 'no'} {'leak' if leaks == 1 else 'leaks'} in {looked} checks of {len(chain)} run folders{unknown}")
    return {"command": "audit", "folder": folder, "leaks": leaks, "verdicts": [{"run": name} | asdict(verdict) for name, verdict in found]}


def of_prepare(made: Made, evidence: Evidence) -> Iterator[Verdict]:
    """The events, and who is asked about what."""
    interactions = pl.read_parquet(made.folder / "interactions.parquet")
    yield leaks_of_tables.duplicates(interactions, kept=made.config.filter.duplicates == "keep")
    yield leaks_of_tables.time_order(interactions, temporal=made.config.split.kind == "temporal")
    yield leaks_of_tables.empty_histories(evidence.sequences)


def of_retrieve(made: Made, evidence: Evidence) -> Iterator[Verdict]:
    """The model, what it is trained on, its lists, ranks and metrics."""
    from llmrec.stages import audit_models

    sequences, repeats = evidence.sequences, made.config.retrieval.repeats
    yield from audit_models.checks(made.folder, made.config, sequences)
    candidates, per_user = (pl.read_parquet(made.folder / f"{name}.parquet") for name in ("candidates", "per_user"))
    said = runs.read_metrics(made.folder)
    claims: list[Claim] = []
    for split in ("valid", "test"):
        rows, ranks, cases = candidates.filter(split=split), per_user.filter(split=split), sequences.cases(split)
        users = rows["user"].to_numpy()
        yield leaks_of_tables.asked_targets(users, rows["target"].to_numpy(), cases, all_asked=True)
        yield leaks_of_tables.lists(rows, sequences, cases, repeats=repeats)
        claims += [
            Claim(split, said[split], rows["target_rank"].to_numpy(), users),
            Claim(f"{split} masked", said[f"{split}_masked"], rows["target_rank_masked"].to_numpy(), users),
            Claim(f"{split} by user", said[split], ranks["rank"].to_numpy(), ranks["user"].to_numpy()),
        ]
    yield leaks_of_ranks.targets_in_lists(candidates, repeats=repeats)
    yield leaks_of_ranks.metrics_of_ranks(claims)


def of_evaluate(made: Made, evidence: Evidence) -> Iterator[Verdict]:
    """The scored tokens, the rankings against the retriever's lists, the ranks against the scores, the metrics against the ranks."""
    rankings, said = pl.read_parquet(made.folder / "rankings.parquet"), runs.read_metrics(made.folder)
    yield of_scoring(made, evidence, said.get("labels"))
    yield leaks_of_tables.same_lists(rankings, pl.read_parquet(evidence.input_of(made, "retrieve").folder / "candidates.parquet"))
    for split in ("valid", "test"):
        rows, cases = rankings.filter(split=split), evidence.sequences.cases(split)
        yield leaks_of_tables.asked_targets(rows["user"].to_numpy(), rows["target"].to_numpy(), cases, all_asked=False)
        yield leaks_of_tables.lists(rows, evidence.sequences, cases, repeats=made.config.retrieval.repeats)
    rows, ranks = rankings.filter(split="test"), pl.read_parquet(made.folder / "per_user.parquet")
    if rows["user"].to_list() != ranks["user"].to_list():
        yield Verdict("users", False, "per_user.parquet is about other users than rankings.parquet")
        return
    users, targets, items = rows["user"].to_numpy(), rows["target"].to_numpy(), _padded(rows["items"], 0).astype(np.int32)
    columns = {system: "rank" if system == "fused" else f"{system}_rank" for system in ("retriever", "sft", "orpo", "fused")}
    recorded = {system: ranks[column].to_numpy() for system, column in columns.items() if column in ranks.columns}
    for system, column in (("retriever", "retriever_scores"), ("orpo", "ranker_scores"), ("fused", "fused_scores")):
        yield leaks_of_ranks.optimistic_ranks(system, users, recorded[system], _padded(rows[column], -np.inf), items, targets)
    overall = said["overall"]
    yield leaks_of_ranks.metrics_of_ranks([Claim(system, overall[system], ranks, users) for system, ranks in recorded.items()])


CHECKS: dict[str, Callable[[Made, Evidence], Iterator[Verdict]]] = {
    "prepare": of_prepare,
    "retrieve": of_retrieve,
    "pairs": of_pairs,
    "sft": of_tuning,
    "orpo": of_tuning,
    "evaluate": of_evaluate,
}
"""By stage; the others learn nothing and measure no quality."""


def _padded(lists: pl.Series, filler: float) -> np.ndarray:
    """Lists as a matrix, (rows, longest)."""
    rows = lists.to_list()
    found = np.full((len(rows), max(map(len, rows), default=0)), filler)
    for at, values in enumerate(rows):
        found[at, : len(values)] = values
    return found
