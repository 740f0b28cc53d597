"""Queries written by the untrained model and the tuned ones, block by block, so that a killed evaluation goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.query_prompts import QueryWriter
from llmrec.runs import Run
from llmrec.stages import inputs
from llmrec.stages.scoring import kept_blocks, median_seconds, tuned_models

if TYPE_CHECKING:
    from llmrec.rankers.queries import Query

BLOCK = 32  # users between two checkpoints
TIMED_USERS = 5


@dataclass
class Written:
    """What a model wrote, user by user.

    Attributes:
        queries: best first; none where the prompt was refused.
        logprobs: of each query.
        tokens: of all queries together, end of text included where one was written.
        seconds: it took to read the prompts and write them, summed over processes.
    """

    queries: list[list[str]]
    logprobs: list[list[float]]
    tokens: int
    seconds: float


def written_by_all(
    run: Run, systems: list[str], writer: QueryWriter, rows: dict[str, list[list[int]]]
) -> tuple[dict[tuple[str, str], Written], float]:
    """What the untrained model and the tuned ones of these stages write, and the seconds that the last takes for a test user on his own.

    Args:
        run: of `evaluate`.
        systems: stages.
        writer: turns tokens into text.
        rows: token ids of each user's prompt, by split; an empty one gets no queries.

    Returns:
        By (system, split), and the seconds.
    """
    from llmrec.rankers.queries import beam_queries

    how, length = run.config.queries, run.config.prompt.title_tokens + 1
    written, seconds = {}, 0.0
    for system, model in _models(run, systems):
        ask = partial(beam_queries, model, queries=how.count, new_tokens=length, end_ids=writer.end_ids, batch=how.batch)
        for split, of_split in rows.items():
            written[system, split] = write_queries(ask, of_split, writer, run.checkpoints, f"{system}.{split}")
        if system == systems[-1]:
            seconds = median_seconds(ask, [[row] for row in rows["test"] if row][:TIMED_USERS])
        del model, ask  # before the next one is loaded
    return written, seconds


def _models(run: Run, systems: list[str]) -> Iterator[tuple[str, Any]]:
    """The untrained floor, then the tuned models."""
    from llmrec.rankers.backbone import load_untrained

    yield "random", load_untrained(inputs.base_folder(run.config), run.config.base, run.config.seed)
    yield from tuned_models(run, systems)


def write_queries(
    ask: Callable[[list[list[int]]], list[list[Query]]], rows: Sequence[Sequence[int]], writer: QueryWriter, checkpoints: Path, name: str
) -> Written:
    """Queries after every prompt; blocks of similar length are kept, so that a killed run goes on.

    Args:
        ask: from token ids of prompts to their queries.
        rows: token ids of each user's prompt; an empty one gets no queries.
        writer: turns tokens into text.
        checkpoints: where blocks are kept.
        name: of their files.
    """
    places = sorted((at for at, row in enumerate(rows) if row), key=lambda at: len(rows[at]))
    blocks = {checkpoints / f"{name}.{at}.json": np.array(places[at : at + BLOCK]) for at in range(0, len(places), BLOCK)}

    def of_block(block: np.ndarray) -> dict[str, Any]:
        begun = time.perf_counter()
        found = ask([list(rows[at]) for at in block])
        seconds = time.perf_counter() - begun
        return {
            "queries": [[writer.text(query.ids) for query in of_user] for of_user in found],
            "logprobs": [[query.logprob for query in of_user] for of_user in found],
            "tokens": sum(query.tokens for of_user in found for query in of_user),
            "seconds": seconds,
        }

    kept = kept_blocks(of_block, blocks, _read_block, _save_block, f"queries {name}")
    queries: list[list[str]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    for path, block in blocks.items():
        for at, texts, values in zip(block, kept[path]["queries"], kept[path]["logprobs"], strict=True):
            queries[at], logprobs[at] = texts, values
    return Written(queries, logprobs, sum(one["tokens"] for one in kept.values()), sum(one["seconds"] for one in kept.values()))


def _read_block(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _save_block(path: Path, block: dict[str, Any]) -> None:
    path.write_text(json.dumps(block), encoding="utf-8")
