"""Ask the language model: the prompts of a split's users, and log-probabilities of letters or titles as scores of the candidates."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import distributed
from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.data.tables import padded
from llmrec.errors import UserError
from llmrec.prompting import Prompt, PromptWriter, Refused, Writer, shuffled
from llmrec.query_prompts import QueryWriter
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


def questions_of(config: Config, run: Run, sequences: Sequences, writer: Writer, split: str) -> Questions:
    """The prompts of a split's users. Validation asks only where the target was retrieved: elsewhere every order scores 0.

    Raises:
        UserError: a number of orders that there are not.
    """
    if config.evaluation.orders < 1:
        raise UserError(f"evaluation.orders is {config.evaluation.orders}: each user is asked in at least one order")
    if config.evaluation.orders > 1 and config.prompt.order != "shuffled":
        raise UserError(f"evaluation.orders is {config.evaluation.orders}, but the retriever has one order: set prompt.order to shuffled")
    if config.evaluation.orders > 1 and writer.asks_for_title:
        raise UserError(
            f"evaluation.orders is {config.evaluation.orders}, but prompts that ask for a title show no candidates: set it to 1"
        )
    found = pl.read_parquet(run.input("retrieve") / "candidates.parquet").filter(pl.col("split") == split).sort("user")
    found = found.filter(pl.col("user").is_in(sampled(np.arange(sequences.user_count), config.limit_users).tolist()))
    pool = config.prompt.candidates
    found = found.with_columns(pl.col("items").list.head(pool), pl.col("scores").list.head(pool))
    if split == "valid":
        found = found.filter(pl.col("items").list.contains(pl.col("target")))
    limit = config.evaluation.valid_users if split == "valid" else config.evaluation.test_users
    found = found[sampled(np.arange(found.height), limit)]

    histories = sequences.histories(sequences.cases(split).of(found["user"].to_numpy()))
    items, scores = padded(found["items"].to_list(), width=pool), padded(found["scores"].to_list(), -np.inf, width=pool, dtype=np.float32)
    orders = np.tile(np.arange(pool), (found.height, config.evaluation.orders, 1))
    rows, refused = [], Counter[str]()
    for at, (user, count) in enumerate(found.select("user", pl.col("items").list.len()).iter_rows()):
        if config.prompt.order == "shuffled" and not writer.asks_for_title:
            for number, order in enumerate(orders[at]):
                order[:count] = shuffled(np.arange(count), config.seed, user, number)
        prompts = [writer.write(histories[at], items[at, order[:count]]) for order in orders[at]]
        reasons = [prompt.reason for prompt in prompts if isinstance(prompt, Refused)]
        refused.update(reasons[:1])
        rows.append([] if reasons else [prompt.ids for prompt in prompts if isinstance(prompt, Prompt)])
    if refused:
        say(f"{split}: {sum(refused.values())} prompts refused ({dict(refused)}): their users keep the retriever's order")
    return Questions(split, found["user"].to_numpy(), found["target"].to_numpy(), items, scores, orders, rows, refused)


def tuned_models(run: Run, systems: list[str]) -> Iterator[tuple[str, Any]]:
    """The tuned models of these stages, one after the other."""
    from llmrec.rankers.backbone import load_tuned

    for system in systems:
        yield system, load_tuned(inputs.base_folder(run.config), run.config.base, run.input(system))


@dataclass
class Answers:
    """What the language models answered, by (system, split).

    Attributes:
        scores: log-probabilities of `Questions.items`, the mean over the orders, (users, pool); the retriever's scores of users who were
            not asked.
        by_order: the same in each order, (users, orders, pool).
        asked: who was asked, (users,) bool.
        seconds: of the last system for one user on his own, in all orders.
        seconds_of_one_order: in the first alone.
    """

    scores: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    by_order: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    asked: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_of_one_order: float = 0.0


def score(run: Run, systems: list[str], asked: dict[str, Questions], writer: PromptWriter | QueryWriter, rated: np.ndarray) -> Answers:
    """Ask the tuned models of these stages.

    Args:
        run: of `evaluate`.
        systems: stages that tuned the models.
        asked: the questions, by split.
        writer: of their prompts.
        rated: rows of the validation questions that SFT is asked, too, to learn what ORPO changed: the fusion weight needs ORPO's alone.

    Raises:
        UserError: a score is not finite; the message names system and user.
    """
    from llmrec.rankers.backbone import compile_layers

    answers = Answers()
    for system, model in tuned_models(run, systems):
        if run.config.base.compile:
            compile_layers(model, training=False, states=run.config.evaluation.orders > 1)
        for split, questions in asked.items():
            if (system, split) == ("sft", "valid") and not len(rated):
                continue
            ask = _naming_who(run, system, questions, _asking(model, writer, questions, run.config.evaluation.batch))
            put = np.ones(len(questions.rows), dtype=bool)
            if (system, split) == ("sft", "valid"):
                put = np.isin(np.arange(len(put)), rated)
            elif system == "sft" or run.config.evaluation.ask == "retrieved":  # for a metric an order without the target counts nothing
                put = questions.retrieved
            rows = [row if wanted else [] for row, wanted in zip(questions.rows, put, strict=True)]
            shown = _in_blocks(ask, rows, run.checkpoints, f"{system}.{split}")
            key = system, split
            answers.asked[key] = np.array([bool(prompts) for prompts in rows])
            answers.by_order[key] = _in_candidate_order(shown, questions, answers.asked[key])
            # of users who were not asked all orders are the same, and a mean could round them
            answers.scores[key] = np.where(answers.asked[key][:, None], answers.by_order[key].mean(axis=1), answers.by_order[key][:, 0])
            if key == ("orpo", "test"):
                one_by_one = [np.array([at]) for at, row in enumerate(questions.rows) if row][:TIMED_USERS]
                answers.seconds = answers.seconds_of_one_order = median_seconds(ask, one_by_one)
                if run.config.evaluation.orders > 1:
                    once = replace(questions, rows=[row[:1] for row in questions.rows])
                    answers.seconds_of_one_order = median_seconds(_asking(model, writer, once, run.config.evaluation.batch), one_by_one)
    return answers


def _asking(model: Any, writer: PromptWriter | QueryWriter, questions: Questions, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from places among the questions to scores of the candidates as they are shown, (places, orders, pool)."""
    if isinstance(writer, PromptWriter):
        from llmrec.rankers.orders import letter_logprobs_of_orders

        return lambda places: letter_logprobs_of_orders(model, [questions.rows[at] for at in places], writer.labels, batch=batch)
    from llmrec.rankers.titles import title_logprobs

    def ask(places: np.ndarray) -> np.ndarray:
        titles = [[writer.completion(int(item)) for item in questions.items[at] if item] for at in places]
        found = np.full((len(places), 1, questions.items.shape[1]), -np.inf, dtype=np.float32)
        for place, of_user in enumerate(title_logprobs(model, [questions.rows[at][0] for at in places], titles, batch=batch)):
            found[place, 0, : len(of_user)] = of_user
        return found

    return ask


def _naming_who(run: Run, system: str, questions: Questions, ask: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """`ask`, with a score that is not finite as an error that a user can mend: said at once, not after all users were asked."""
    from llmrec.rankers.letters import NotFinite

    orders = questions.order.shape[1]

    def named(places: np.ndarray) -> np.ndarray:
        try:
            return ask(places)
        except NotFinite as found:
            user = questions.users[places[found.prompt // orders]]
            raw = pl.read_parquet(run.input("prepare") / "users.parquet").filter(pl.col("user") == user)["raw_id"].item()
            raise UserError(
                f"{system} gives user {raw} ({questions.split}) a score that is not finite, so there is no order: set base.dtype float32, "
                f"or train it again with a lower {system}.learning_rate (its losses: {run.input(system) / 'train_log.jsonl'})"
            ) from found

    return named


def _in_blocks(ask: Callable[[np.ndarray], np.ndarray], rows: list[list[list[int]]], checkpoints: Path, name: str) -> np.ndarray:
    """Answers to all users' rows, (users, orders, letters), given a function from places among the rows to theirs."""
    by_length = np.argsort([len(prompts[0]) if prompts else 0 for prompts in rows], kind="stable")
    by_length = np.array([at for at in by_length if rows[at]], dtype=np.int64)
    if not len(by_length):
        raise UserError(f"{name}: not one prompt fits the budget: raise prompt.budget")
    users = max(1, BLOCK // max(1, *map(len, rows)))
    blocks = {checkpoints / f"{name}.{start}.npy": by_length[start : start + users] for start in range(0, len(by_length), users)}
    found = kept_blocks(ask, blocks, np.load, np.save, f"scoring {name}")
    answers = np.zeros((len(rows), *next(iter(found.values())).shape[1:]), dtype=np.float32)
    for path, block in blocks.items():
        answers[block] = found[path]
    return answers


def kept_blocks(
    work: Callable[[np.ndarray], Any],
    blocks: dict[Path, np.ndarray],
    read: Callable[[Path], Any],
    write: Callable[[Path, Any], Any],
    description: str,
) -> dict[Path, Any]:
    """What `work` makes of each block, kept in the block's file as it comes, so that a killed stage goes on.

    Several processes take a block each, the same blocks as one process would make. Blocks of similar length belong together.

    Args:
        work: from a block to what is kept.
        blocks: file of each block -> places of its rows.
        read: reads a file.
        write: writes one.
        description: of the progress bar.
    """
    from llmrec.progress import track

    kept = {path: read(path) for path in blocks if path.exists()} if distributed.is_main() else {}
    found = distributed.gather(kept)[0]  # what rank 0 sees: on other machines a shared disk may show less
    missing = [path for path in blocks if path not in found]
    rounds = [missing[at : at + distributed.world_size()] for at in range(0, len(missing), distributed.world_size())]
    for paths in track(rounds, description):
        own = paths[distributed.rank() : distributed.rank() + 1]  # none for some in the last round
        mine = [work(blocks[path]) for path in own]
        for path, answer in zip(paths, itertools.chain.from_iterable(distributed.gather(mine)), strict=True):
            found[path] = answer
            if distributed.is_main():
                beside = path.with_suffix(f".tmp{path.suffix}")
                write(beside, answer)
                beside.replace(path)
    return found


def _in_candidate_order(shown: np.ndarray, questions: Questions, asked: np.ndarray) -> np.ndarray:
    """From letters as shown back to the order of `items`, (users, orders, pool); the retriever's scores of users who were not asked."""
    by_item = np.empty_like(shown)
    np.put_along_axis(by_item, questions.order, shown, axis=2)
    by_item[~asked] = questions.scores[~asked][:, None]
    by_item[np.broadcast_to((questions.items == 0)[:, None], by_item.shape)] = -np.inf
    return by_item


def median_seconds(work: Callable[[Any], Any], cases: list[Any]) -> float:
    times = []
    for case in cases[:2] + cases:  # the first two warm up
        begun = time.perf_counter()
        work(case)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))
