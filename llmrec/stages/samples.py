"""Users to look at in a report: what they had seen, and what each system made of their candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from llmrec.data.sequences import Sequences
from llmrec.evaluation.calibration import probabilities
from llmrec.evaluation.report import Candidate, QuerySample, Sample, WrittenQuery

USERS = 20


@dataclass(frozen=True)
class Shelf:
    """Where titles and histories are looked up.

    Attributes:
        titles: by item id; element 0 is padding.
        sequences: all users' events.
        shown: how many of a history's last titles to show.
    """

    titles: Sequence[str]
    sequences: Sequences
    shown: int

    @cached_property
    def ends(self) -> dict[tuple[int, int], int]:
        """(user, target) of the test cases -> where the history ends."""
        cases = self.sequences.cases("test")
        return dict(zip(zip(cases.users.tolist(), cases.targets.tolist(), strict=True), cases.ends.tolist(), strict=True))

    def history(self, user: int, target: int) -> list[str]:
        """The last titles before a test target, oldest first."""
        return [self.titles[item] for item in self.sequences.history(user, self.ends[user, target])[-self.shown :]]


def draw(rankings: pl.DataFrame, seed: int, count: int = USERS) -> pl.DataFrame:
    """Rows of test users whose target was retrieved, drawn by seed, so that nobody has picked them."""
    found = rankings.filter((pl.col("split") == "test") & pl.col("items").list.contains(pl.col("target")))
    return found.sample(min(count, found.height), seed=seed).sort("user")


def samples(rows: pl.DataFrame, shelf: Shelf) -> list[Sample]:
    """Rows of rankings.parquet as they are shown."""
    return [Sample(str(row["user"]), shelf.history(row["user"], row["target"]), _candidates(row, shelf.titles)) for row in rows.to_dicts()]


def _candidates(row: Mapping[str, list], titles: Sequence[str]) -> list[Candidate]:
    columns = ("retriever_scores", "ranker_scores", "fused_scores")
    places = [np.argsort(np.argsort(-np.array(row[column]), kind="stable")) + 1 for column in columns]
    (probability,) = probabilities(np.array([row["ranker_scores"]]), np.array([row["items"]]))
    return [
        Candidate(titles[item], int(retriever), int(ranker), int(fused), float(share), item == row["target"])
        for item, retriever, ranker, fused, share in zip(row["items"], *places, probability, strict=True)
    ]


def query_samples(queries: pl.DataFrame, shelf: Shelf, count: int = USERS) -> list[QuerySample]:
    """What the last model wrote for the first test users, and what was found by it.

    Args:
        queries: queries.parquet.
        shelf: titles and histories.
        count: how many users.
    """
    return [
        QuerySample(
            user=str(row["user"]),
            history=shelf.history(row["user"], row["target"]),
            target=shelf.titles[row["target"]],
            queries=[WrittenQuery(text, logprob) for text, logprob in zip(row["queries"], row["logprobs"], strict=True)],
            items=[(shelf.titles[item], item == row["target"]) for item in row["items"]],
        )
        for row in queries.filter(pl.col("system") == "orpo").head(count).to_dicts()
    ]
