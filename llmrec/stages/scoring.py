"""Ask the language model: the prompts of a split's users, and the letters' log-probabilities as scores of the candidates."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import distributed
from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.errors import UserError
from llmrec.prompting import Prompt, PromptWriter, Refused, shuffled
from llmrec.runs import Run, say
from llmrec.stages import inputs
from llmrec.stages.pairs import sampled

BLOCK = 128  # prompts between two checkpoints, or as many users as have that many together
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
        order: how each prompt shows them: candidate `order[u, prompt, letter]` of `items[u]`, (users, orders, pool).
        rows: token ids of each user's prompts, one for every order; none where one of them was refused.
        refused: users whose prompts were refused, by reason.
    """

    split: str
    users: np.ndarray
    targets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    order: np.ndarray
    rows: list[list[list[int]]]
    refused: Counter[str]

    @property
    def retrieved(self) -> np.ndarray:
        """Whether the target is among the items, (users,)."""
        return (self.items == self.targets[:, None]).any(1)


def questions_of(config: Config, run: Run, sequences: Sequences, writer: PromptWriter, split: str) -> Questions:
    """The prompts of a split's users. Validation asks only where the target was retrieved: elsewhere every order scores 0.

    Raises:
        UserError: a number of orders that there are not.
    """
    if config.evaluation.orders < 1:
        raise UserError(f"evaluation.orders is {config.evaluation.orders}: each user is asked in at least one order")
    if config.evaluation.orders > 1 and config.prompt.order != "shuffled":
        raise UserError(f"evaluation.orders is {config.evaluation.orders}, but the retriever has one order: set prompt.order to shuffled")
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
    orders = np.tile(np.arange(pool), (found.height, config.evaluation.orders, 1))
    rows, refused = [], Counter[str]()
    for at, (user, listed, listed_scores) in enumerate(found.select("user", "items", "scores").iter_rows()):
        count = len(listed)
        items[at, :count], scores[at, :count] = listed, listed_scores
        if config.prompt.order == "shuffled":
            for number, order in enumerate(orders[at]):
                order[:count] = shuffled(np.arange(count), config.seed, user, number)
        prompts = [writer.write(sequences.history(user, ends[user]), items[at, order[:count]]) for order in orders[at]]
        reasons = [prompt.reason for prompt in prompts if isinstance(prompt, Refused)]
        refused.update(reasons[:1])
        rows.append([] if reasons else [prompt.ids for prompt in prompts if isinstance(prompt, Prompt)])
    if refused:
        say(f"{split}: {sum(refused.values())} prompts refused ({dict(refused)}): their users keep the retriever's order")
    return Questions(split, found["user"].to_numpy(), found["target"].to_numpy(), items, scores, orders, rows, refused)


def score(
    run: Run, systems: list[str], asked: dict[str, Questions], writer: PromptWriter
) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """Letter log-probabilities in the order of `items` by (system, split), and seconds of one user on his own."""
    from llmrec.rankers.backbone import compile_layers, load_adapter, load_base
    from llmrec.rankers.orders import letter_logprobs_of_orders

    base = load_base(inputs.base_folder(run.config), run.config.base)
    answers = {}
    seconds = 0.0
    for system in systems:
        model = load_adapter(base, run.input(system))
        if run.config.base.compile and run.config.evaluation.orders == 1:  # states that are shared would be compiled in layer by layer
            compile_layers(model, training=False)

        def ask(rows: list[list[list[int]]], model: Any = model) -> np.ndarray:
            return letter_logprobs_of_orders(model, rows, writer.labels, batch=run.config.evaluation.batch)

        for split, questions in asked.items():
            if (system, split) == ("sft", "valid"):
                continue  # the fusion weight is for the last adapter alone
            rows = questions.rows
            if system == "sft" or run.config.evaluation.ask == "retrieved":  # for a metric an order without the target counts nothing
                rows = [row if found else [] for row, found in zip(rows, questions.retrieved, strict=True)]
            shown = _in_blocks(ask, rows, run.checkpoints, f"{system}.{split}")
            answers[system, split] = _in_candidate_order(shown, questions, rows)
        if system == "orpo":
            seconds = median_seconds(ask, [[row] for row in asked["test"].rows if row][:TIMED_USERS])
        base = model.unload()
    return answers, seconds


def _in_blocks(ask: Callable[[list[list[list[int]]]], np.ndarray], rows: list[list[list[int]]], checkpoints: Path, name: str) -> np.ndarray:
    """Answers to all users' rows, (users, orders, letters); blocks of similar length are kept, so that a killed scoring goes on.

    Several processes take a block each, the same blocks as one process would make.
    """
    from llmrec.progress import track

    by_length = np.argsort([len(prompts[0]) if prompts else 0 for prompts in rows], kind="stable")
    by_length = np.array([at for at in by_length if rows[at]], dtype=np.int64)
    if not len(by_length):
        raise UserError(f"{name}: not one prompt fits the budget: raise prompt.budget")
    users = max(1, BLOCK // max(1, *map(len, rows)))
    blocks = {checkpoints / f"{name}.{start}.npy": by_length[start : start + users] for start in range(0, len(by_length), users)}
    found = {path: np.load(path) for path in blocks if path.exists()}
    distributed.barrier()  # nobody writes before all have looked
    missing = [path for path in blocks if path not in found]
    rounds = [missing[at : at + distributed.world_size()] for at in range(0, len(missing), distributed.world_size())]
    for paths in track(rounds, f"scoring {name}"):
        own = paths[distributed.rank() : distributed.rank() + 1]  # none for some in the last round
        mine = [ask([rows[at] for at in blocks[path]]) for path in own]
        for path, answer in zip(paths, itertools.chain.from_iterable(distributed.gather(mine)), strict=True):
            found[path] = answer
            if distributed.is_main():
                beside = path.with_suffix(".tmp.npy")
                np.save(beside, answer)
                beside.replace(path)
    answers = np.zeros((len(rows), *next(iter(found.values())).shape[1:]), dtype=np.float32)
    for path, block in blocks.items():
        answers[block] = found[path]
    return answers


def _in_candidate_order(shown: np.ndarray, questions: Questions, rows: list[list[list[int]]]) -> np.ndarray:
    """From letters as shown back to the order of `items`, the mean over orders; where nothing was asked the retriever's scores."""
    by_item = np.empty_like(shown)
    np.put_along_axis(by_item, questions.order, shown, axis=2)
    restored = by_item.mean(axis=1)
    unasked = np.array([not prompts for prompts in rows])
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
