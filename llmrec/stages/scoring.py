"""Ask the language model: the prompts of a split's users, and the letters' log-probabilities as scores of the candidates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.errors import UserError
from llmrec.prompting import PromptWriter, Refused, shuffled
from llmrec.runs import Run, say
from llmrec.stages import inputs
from llmrec.stages.pairs import sampled

BLOCK = 128  # prompts between two checkpoints
TIMED_USERS = 20


@dataclass
class Questions:
    """What the language model is asked: one row per user of a split.

    Attributes:
        split: "valid" or "test".
        users: (users,) int32.
        targets: (users,) int32.
        items: the retriever's best, (users, pool) int32, 0 where there are fewer.
        scores: the retriever's scores of them, -inf for padding.
        order: how a prompt shows them: candidate `order[u, letter]` of `items[u]`, (users, pool).
        rows: token ids of each prompt; empty where it was refused.
        refused: refused prompts by reason.
    """

    split: str
    users: np.ndarray
    targets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    order: np.ndarray
    rows: list[list[int]]
    refused: Counter[str]

    @property
    def retrieved(self) -> np.ndarray:
        """Whether the target is among the items, (users,)."""
        return (self.items == self.targets[:, None]).any(1)


def questions_of(config: Config, run: Run, sequences: Sequences, writer: PromptWriter, split: str) -> Questions:
    """The prompts of a split's users. Validation asks only where the target was retrieved: elsewhere every order scores 0."""
    found = pl.read_parquet(run.input("retrieve") / "candidates.parquet").filter(pl.col("split") == split).sort("user")
    found = found.filter(pl.col("user").is_in(sampled(np.arange(sequences.user_count), config.limit_users, config.seed).tolist()))
    pool = config.prompt.candidates
    found = found.with_columns(pl.col("items").list.head(pool), pl.col("scores").list.head(pool))
    if split == "valid":
        found = found.filter(pl.col("items").list.contains(pl.col("target")))
    limit = config.evaluation.valid_users if split == "valid" else config.evaluation.test_users
    found = found[sampled(np.arange(found.height), limit, config.seed)]

    cases = sequences.cases(split)
    ends = dict(zip(cases.users.tolist(), cases.ends.tolist(), strict=True))
    items, scores = np.zeros((found.height, pool), dtype=np.int32), np.full((found.height, pool), -np.inf, dtype=np.float32)
    order = np.tile(np.arange(pool), (found.height, 1))
    rows, refused = [], Counter[str]()
    for at, (user, listed, listed_scores) in enumerate(found.select("user", "items", "scores").iter_rows()):
        count = len(listed)
        items[at, :count], scores[at, :count] = listed, listed_scores
        if config.prompt.order == "shuffled":
            order[at, :count] = shuffled(np.arange(count), config.seed, user)
        prompt = writer.write(sequences.history(user, ends[user]), items[at, order[at, :count]])
        if isinstance(prompt, Refused):
            refused[prompt.reason] += 1
        rows.append([] if isinstance(prompt, Refused) else prompt.ids)
    if refused:
        say(f"{split}: {sum(refused.values())} prompts refused ({dict(refused)}): their users keep the retriever's order")
    return Questions(split, found["user"].to_numpy(), found["target"].to_numpy(), items, scores, order, rows, refused)


def score(
    run: Run, systems: list[str], asked: dict[str, Questions], writer: PromptWriter
) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """Letter log-probabilities in the order of `items` by (system, split), and seconds of one prompt on its own."""
    from llmrec.rankers.backbone import load_adapter, load_base
    from llmrec.rankers.letters import letter_logprobs

    base = load_base(inputs.base_folder(run.config), run.config.base)
    answers = {}
    seconds = 0.0
    for system in systems:
        model = load_adapter(base, run.input(system))

        def ask(rows: list[list[int]], model: Any = model) -> np.ndarray:
            return letter_logprobs(model, rows, writer.labels, batch=run.config.evaluation.batch)

        for split, questions in asked.items():
            if (system, split) == ("sft", "valid"):
                continue  # the fusion weight is for the last adapter alone
            rows = questions.rows
            if system == "sft":  # for the table, and there an order without the target counts nothing
                rows = [row if found else [] for row, found in zip(rows, questions.retrieved, strict=True)]
            shown = _in_blocks(ask, rows, run.checkpoints, f"{system}.{split}")
            answers[system, split] = _in_candidate_order(shown, questions, rows)
        if system == "orpo":
            seconds = median_seconds(ask, [[row] for row in asked["test"].rows if row][:TIMED_USERS])
        base = model.unload()
    return answers, seconds


def _in_blocks(ask: Callable[[list[list[int]]], np.ndarray], rows: list[list[int]], checkpoints: Path, name: str) -> np.ndarray:
    """Answers to all rows, (rows, letters); blocks of similar length are kept, so that a killed scoring goes on."""
    from llmrec.progress import track

    answers: np.ndarray | None = None
    by_length = np.argsort([len(row) for row in rows], kind="stable")
    by_length = np.array([at for at in by_length if rows[at]], dtype=np.int64)
    for start in track(range(0, len(by_length), BLOCK), f"scoring {name}"):
        block = by_length[start : start + BLOCK]
        path = checkpoints / f"{name}.{start}.npy"
        if path.exists():
            found = np.load(path)
        else:
            found = ask([rows[at] for at in block])
            beside = path.with_suffix(".tmp.npy")
            np.save(beside, found)
            beside.replace(path)
        if answers is None:
            answers = np.zeros((len(rows), found.shape[1]), dtype=np.float32)
        answers[block] = found
    if answers is None:
        raise UserError(f"{name}: not one prompt fits the budget: raise prompt.budget")
    return answers


def _in_candidate_order(shown: np.ndarray, questions: Questions, rows: list[list[int]]) -> np.ndarray:
    """From letters as shown back to the order of `items`. Where nothing was asked the retriever's scores stand in."""
    restored = np.empty_like(questions.scores)
    np.put_along_axis(restored, questions.order, shown, axis=1)
    unasked = np.array([not row for row in rows])
    restored[unasked] = questions.scores[unasked]
    restored[questions.items == 0] = -np.inf
    return restored


def median_seconds(work: Callable[[Any], Any], cases: list[Any]) -> float:
    times = []
    for case in cases[:2] + cases:  # the first two warm up
        begun = time.perf_counter()
        work(case)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))
