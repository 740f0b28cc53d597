"""Time retrievers: from a user's history to his candidates, on his own, in batches, and from a kept state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmrec import runs
from llmrec.config import Bench, Config
from llmrec.data.sequences import Cases, Sequences
from llmrec.errors import UserError
from llmrec.stages.pairs import sampled
from llmrec.stages.timing import Timing, Way, in_batches, one_by_one, time_ways


def time_retriever(name: str, folder: Path, own: Config, sequences: Sequences, bench: Bench, seed: int) -> Timing:
    """Time a finished retriever on its own history length.

    "one" and "batch" read the last `training.max_length` events again. "step" takes the newest event into a state that has the
    others, which is measured where the model has one.

    Args:
        name: what it is called in the tables.
        folder: its run folder.
        own: the settings that made it.
        sequences: the data it was trained on.
        bench: how many users, how often.
        seed: of the users.

    Raises:
        UserError: its weights do not fit its settings.
    """
    from llmrec.retrievers.candidates import top_items
    from llmrec.stages.retrieve import load

    try:
        scorer = load(folder, own, sequences.item_count)
    except RuntimeError as error:  # torch's word for tensors that do not fit
        raise UserError(
            f"{folder}/model.safetensors is of another version of llmrec: make it again with --force, or leave it out of bench.retrievers"
        ) from error
    cases = sequences.cases("test")
    cases = cases.take(sampled(np.arange(len(cases)), bench.users, seed))

    def ask(places: np.ndarray) -> int:
        top_items(scorer, sequences, cases.users[places], cases.ends[places], own.retrieval.candidates, batch=len(places))
        return 0

    ways = [
        Way("one", ask, one_by_one(len(cases)), cases.users),
        Way("batch", ask, in_batches(len(cases), bench.batch), cases.users),
    ]
    if own.retrieval.kind == "sequence" and has_steps(own):
        ways.append(_stepping(scorer.model, sequences, cases, own))
    made = runs.read_metrics(folder)
    measured = time_ways(name, ways, bench, seed)
    facts: dict[str, Any] = {
        "kind": "retriever",
        "run": f"retrieve/{folder.name}",
        "history": own.training.max_length if own.retrieval.kind == "sequence" else None,
        "parameters": made["parameters"],
        "metrics": {split: headline(made[split]) for split in ("test", "test_masked")},
        "users_evaluated": made["protocol"]["users_evaluated"],
    }
    return Timing(facts | measured.facts, measured.rows)


def has_steps(own: Config) -> bool:
    """Whether a sequence model can go on from a state of constant size."""
    from llmrec.retrievers.mixers import check_steps

    try:
        check_steps(own.model)
    except UserError:
        return False
    return True


def _stepping(model: Any, sequences: Sequences, cases: Cases, own: Config) -> Way:
    """One event more and the candidates after it. The state goes on with every repeat, at a cost that does not depend on it."""
    from llmrec.retrievers import online

    histories = [sequences.history(int(user), int(end)) for user, end in zip(cases.users, cases.ends, strict=True)]
    states = online.read(model, [history[:-1] for history in histories])

    def ask(places: np.ndarray) -> int:
        at = places[0]
        online.update(model, states, places, histories[at][-1:])
        online.recommend(model, states, places, own.retrieval.candidates, exclude=[histories[at]])
        return 0

    return Way("step", ask, one_by_one(len(cases)), cases.users)


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of the papers' tables."""
    return {name: metrics[name] for name in ("hr@10", "ndcg@10", "mrr@10")}
