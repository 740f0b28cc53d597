"""What `llmrec audit` asks of a retriever itself: with its weights loaded, its future replaced, and what it was trained on made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from llmrec import runs
from llmrec.config import Config
from llmrec.data.sequences import TRAIN, Cases, Sequences
from llmrec.evaluation import leaks, leaks_of_ranks, leaks_of_training
from llmrec.evaluation.leaks import Verdict
from llmrec.retrievers.candidates import Scorer, rank, rows_per_batch
from llmrec.stages import trained_on
from llmrec.stages.retrieve import load

CASES = 200  # users whose answers are made anew
HISTORIES, LONGEST = 64, 128  # histories whose positions are compared


def checks(folder: Path, config: Config, sequences: Sequences) -> Iterator[Verdict]:
    """Every check of a retriever's training and of its weights."""
    kind, said = config.retrieval.kind, runs.read_metrics(folder)
    trained = np.bincount(sequences.items[sequences.split == TRAIN], minlength=sequences.item_count + 1) > 0
    yield leaks_of_training.training_part(said.get("trained_on"), trained_on.checksum(config, sequences.train_only()), sequences)
    table = pl.read_parquet(folder / "candidates.parquet").filter(split="test")
    yield _untrained(table, trained, sequences)
    try:
        scorer = load(folder, config, sequences.item_count)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        yield Verdict("model", None, f"model.safetensors is of another version of llmrec, so the model cannot be asked ({reason} ...)")
        return
    if kind == "sequence":
        yield _future(scorer, config, sequences)
    elif kind == "lightfm":
        yield leaks_of_training.lightfm_biases(scorer.biases.numpy(), trained[1:])
    else:
        yield leaks_of_training.popularity_counts(scorer.counts.numpy(), sequences)

    cases = sequences.cases("test")
    cases = cases.take(np.unique(np.linspace(0, len(cases) - 1, CASES).astype(np.int64)))
    yield leaks.after_the_end(lambda events, some: answers(scorer, events, some, config), sequences, cases)
    recorded = dict(zip(table.select("user", "target").iter_rows(), table["target_rank"], strict=True))
    known = cases.take(np.array([pair in recorded for pair in zip(cases.users.tolist(), cases.targets.tolist(), strict=True)]))
    ranks = np.array([recorded[pair] for pair in zip(known.users.tolist(), known.targets.tolist(), strict=True)])
    yield leaks_of_ranks.ranks_of_the_model(ranks, _scores(scorer, sequences, known), known.users, known.targets)


def answers(scorer: Scorer, sequences: Sequences, cases: Cases, config: Config) -> np.ndarray:
    """Scores of some cases' candidates, best first, as the stage makes them, (cases, candidates)."""
    count, batch = config.retrieval.candidates, rows_per_batch(sequences.item_count)
    return rank(scorer, sequences, cases, count, repeats=config.retrieval.repeats, batch=batch).scores


def _future(scorer: Any, config: Config, sequences: Sequences) -> Verdict:
    if config.training.windows == "prefixes":
        return Verdict("future of positions", None, "trained on prefixes, which end before their one target")
    parts = [sequences.train_part(user) for user in range(sequences.user_count)]
    parts = sorted(parts, key=len)[-HISTORIES:]
    length = min(LONGEST, config.training.max_length, len(parts[0]))
    if length < 2:
        return Verdict("future of positions", None, "no history has two events that the model reads together")
    scorer.model.eval()
    device = scorer.model.items.weight.device

    def outputs(histories: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return scorer.model(torch.from_numpy(histories.astype(np.int64)).to(device)).float().cpu().numpy()

    return leaks.future_of_positions(outputs, np.stack([part[-length:] for part in parts]), sequences.item_count)


def _scores(scorer: Scorer, sequences: Sequences, cases: Cases) -> np.ndarray:
    """Scores of all items, (cases, items)."""
    histories = [sequences.history(user, end) for user, end in zip(cases.users, cases.ends, strict=True)]
    return scorer.scores(cases.users, histories).cpu().numpy()


def _untrained(table: pl.DataFrame, trained: np.ndarray, sequences: Sequences) -> Verdict:
    """Of the users whose history the model knows: untrained items in it say that new things come next."""
    new = np.concatenate([[0], np.cumsum(~trained[sequences.items])])
    users = table["user"].to_numpy()
    # a target is in no history of its own; all other events of the user are
    others = new[sequences.offsets[users + 1]] - new[sequences.offsets[users]] - ~trained[table["target"].to_numpy()]
    kept = table.filter(pl.Series(others == 0))
    lists = kept["items"].to_list()
    candidates = np.zeros((len(lists), max(map(len, lists), default=0)), dtype=np.int32)
    for row, items in enumerate(lists):
        candidates[row, : len(items)] = items
    return leaks_of_training.untrained_targets(candidates, kept["user"].to_numpy(), kept["target"].to_numpy(), trained)
