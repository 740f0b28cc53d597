"""Time one way to ask a model for recommendations: seconds, tokens and memory, as `bench` reports them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from llmrec.config import Bench
from llmrec.evaluation.latency import device_barrier, outliers, peak_growth_mb, resampled, timed

WARM_UP = 8
"""Users asked before the clock runs; what memory that takes is measured meanwhile."""


@dataclass(frozen=True)
class Way:
    """One way to ask a model.

    Attributes:
        name: "one" (a user on his own), "batch" (many users at once), "step" (one event more, from the user's state) or "first_token".
        ask: from places among the users to the number of tokens that were read or written, 0 where there are none.
        calls: the places of each call.
        users: user number of each place.
    """

    name: str
    ask: Callable[[np.ndarray], int]
    calls: list[np.ndarray]
    users: np.ndarray


@dataclass(frozen=True)
class Timing:
    """What was measured of one model.

    Attributes:
        facts: for metrics.json.
        rows: for latency.parquet.
    """

    facts: dict[str, Any]
    rows: pl.DataFrame


def one_by_one(count: int) -> list[np.ndarray]:
    """Calls with one place each."""
    return list(np.arange(count)[:, None])


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """Calls with `size` places each, all of them full; one with all places where there are fewer."""
    return [np.arange(start, start + min(size, count)) for start in range(0, max(1, count - size + 1), size)]


def time_ways(model: str, ways: list[Way], bench: Bench, seed: int) -> Timing:
    """Warm each way up and time it.

    Returns:
        Facts by name of the way: what `latency.Latency` has, `users_at_once`, `peak_memory_mb` above the loaded model, and for
        language models `tokens_per_second`. A row of the table is one call: `seconds` are those of all its `users` together.
    """
    facts: dict[str, Any] = {}
    tables = []
    for way in ways:
        first = way.calls[: max(1, WARM_UP // len(way.calls[0]))]
        way.ask(first[0])  # what libraries make once is no memory of this way
        memory = peak_growth_mb(lambda way=way, first=first: [way.ask(call) for call in first])  # type: ignore[misc]
        seconds, tokens = timed(way.ask, way.calls, bench.repeats, device_barrier())
        users = np.array([len(call) for call in way.calls])
        found = resampled(seconds / users[:, None], bench.samples, seed=seed)
        facts[way.name] = asdict(found) | {"users_at_once": int(users.max()), "peak_memory_mb": memory and round(memory, 1)}
        if any(tokens):
            facts[way.name]["tokens_per_second"] = sum(tokens) / int(users.sum()) / found.mean
        tables.append(_table(model, way, seconds, tokens))
    return Timing(facts, pl.concat(tables))


def _table(model: str, way: Way, seconds: np.ndarray, tokens: list[int]) -> pl.DataFrame:
    calls, repeats = seconds.shape
    columns = {
        "name": pl.Series([model] * seconds.size),
        "way": pl.Series([way.name] * seconds.size),
        "user": pl.Series(np.repeat([way.users[call[0]] for call in way.calls], repeats), dtype=pl.Int32),
        "users": pl.Series(np.repeat([len(call) for call in way.calls], repeats), dtype=pl.Int32),
        "repeat": pl.Series(np.tile(np.arange(repeats), calls), dtype=pl.Int32),
        "seconds": pl.Series(seconds.ravel(), dtype=pl.Float64),
        "tokens": pl.Series(np.repeat(tokens, repeats), dtype=pl.Int32),
        "outlier": pl.Series(outliers(seconds).ravel()),
    }
    return pl.DataFrame(columns)
