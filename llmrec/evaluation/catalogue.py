"""Recommendations from the whole catalogue, as a ranker that writes queries makes them: hits, diversity, coverage, floors beside it.

Every K has lists of its own, with K/m items for each of m queries (arXiv 2304.03879), so a list of 5 need not be the head of a list
of 20. HR, NDCG and MRR are those of `metrics`; coverage, the share of the catalogue that is recommended to anyone, and diversity, how
little a list's titles have in common, are those of `beyond_accuracy`. The paper has a Diversity@K and a Coverage@K, too, the latter of
the interests of one user: they are other measures, and its numbers no measure of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

import numpy as np

from llmrec.data.tables import padded
from llmrec.evaluation.beyond_accuracy import coverage, diversity
from llmrec.evaluation.compare import Comparison, Metrics, compared, render_comparison
from llmrec.evaluation.metrics import per_user

KS = (5, 10, 20)
COLUMNS = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr", "diversity", "coverage") for k in KS]
TESTED = ("hr@10", "ndcg@10")

Lists = Mapping[int, Sequence[Sequence[int]]]
"""K -> each user's K items, best first."""


class CatalogueTable(TypedDict):
    """What goes into metrics.json as "catalogue", beside the cost."""

    users: int
    items: int
    overall: Metrics
    comparisons: list[Comparison]


def table(
    systems: Mapping[str, Lists], targets: Sequence[int], words: Sequence[Collection[str]], resamples: int = 10_000, seed: int = 0
) -> CatalogueTable:
    """Measure every system, and compare the last one with each other.

    Args:
        systems: what each recommends to the same users, for every K of `KS`.
        targets: the right item of each user.
        words: words of each item's title; element 0 is padding.
        resamples: bootstrap resamples behind each interval.
        seed: their seed.
    """
    overall, of_users = {}, {}
    for name, lists in systems.items():
        found = {f"{metric}@{k}": values for k in KS for metric, values in _hits(lists[k], targets, k).items()}
        means = {metric: float(values.mean()) for metric, values in found.items()}
        for k in KS:
            rows = padded(lists[k])
            means |= {f"diversity@{k}": diversity(rows, words), f"coverage@{k}": coverage(rows, len(words) - 1)}
        overall[name], of_users[name] = {metric: means[metric] for metric in COLUMNS}, found
    *others, last = systems
    comparisons = compared(of_users, [(last, other) for other in others], TESTED, resamples, seed)
    return CatalogueTable(users=len(targets), items=len(words) - 1, overall=overall, comparisons=comparisons)


def _hits(lists: Sequence[Sequence[int]], targets: Sequence[int], k: int) -> dict[str, np.ndarray]:
    ranks = [1 + list(items).index(target) if target in items else 0 for items, target in zip(lists, targets, strict=True)]
    return {name.partition("@")[0]: values for name, values in per_user(np.array(ranks, dtype=np.int32), ks=(k,)).items()}


def render(found: CatalogueTable) -> str:
    """The table as plain text for a terminal."""
    lines = [f"The whole catalogue of {found['items']:,} items, {found['users']:,} users"]
    short = {name: name.upper().replace("DIVERSITY", "DIV").replace("COVERAGE", "COV") for name in COLUMNS}
    lines.append(f"{'':<12}" + "".join(f"{short[name]:>8}" for name in COLUMNS))
    lines += [f"{system:<12}" + "".join(f"{values[name]:>8.4f}" for name in COLUMNS) for system, values in found["overall"].items()]
    lines.append("")
    lines += [render_comparison(c) for c in found["comparisons"]]
    return "\n".join(lines)
