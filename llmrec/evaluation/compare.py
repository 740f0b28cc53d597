"""Retriever, language models and their fusion side by side on the same users: the table, the tests and the verdict.

A ranker can only reorder what the retriever found. So every number stands twice: over all evaluated users (what a
service would see; bounded by the share of users whose target was retrieved), and over those users alone (what
ranking papers print).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from llmrec.errors import UserError
from llmrec.evaluation.metrics import KS, per_user, summary
from llmrec.evaluation.significance import SIGNIFICANT, holm, interval, paired_bootstrap, paired_permutation

SYSTEMS = ("retriever", "sft", "orpo", "fused")
PAIRS = (("orpo", "retriever"), ("orpo", "sft"), ("fused", "retriever"))
TESTED = ("ndcg@10", "hr@10")

Metrics = dict[str, dict[str, float]]
"""System -> metric -> mean."""


class Comparison(TypedDict):
    """Mean of system a minus mean of system b over all evaluated users."""

    a: str
    b: str
    metric: str
    difference: float
    ci95: list[float]
    p: float
    """Of the bootstrap, for this comparison alone, as older runs have it; nothing goes by it."""
    p_permutation: float
    """Of the permutation test, for this comparison alone."""
    p_holm: float
    """The latter, corrected for all comparisons of the table: this one decides (see `direction`)."""


class Table(TypedDict):
    """What goes into metrics.json, beside the protocol."""

    users: dict[str, int]
    """evaluated, and hit: those whose target is among the candidates."""
    bound: dict[str, float]
    """Share of users whose target is among the N candidates, as "hr@N": no reordering can score higher."""
    overall: Metrics
    hit_subset: Metrics
    intervals: dict[str, dict[str, dict[str, list[float]]]]
    """"overall" or "hit_subset" -> system -> metric -> [low, high], 95 %."""
    comparisons: list[Comparison]


def rank_column(system: str) -> str:
    """Where per_user.parquet of `evaluate` has a system's ranks: the fused ranking is what is recommended, its column is plain "rank"."""
    return "rank" if system == "fused" else f"{system}_rank"


def table(ranks: dict[str, np.ndarray], candidates: int, resamples: int = 10_000, seed: int = 0) -> Table:
    """Measure every system and compare the pairs of `PAIRS` that are there.

    Args:
        ranks: rank of the target by system (of `SYSTEMS`), each (users,) over all evaluated users in the same order; 0 where the target
            is not among the candidates.
        candidates: length of the candidate lists.
        resamples: bootstrap resamples behind each interval.
        seed: their seed.

    Raises:
        UserError: when no evaluated user's target was retrieved.
        ValueError: when the systems did not rank the same lists.
    """
    hit = next(iter(ranks.values())) > 0
    for name, rank in ranks.items():
        if not np.array_equal(rank > 0, hit):
            raise ValueError(f"{name} did not rank the same candidates as {next(iter(ranks))}")
    if not hit.any():
        raise UserError(
            f"None of the {len(hit)} evaluated users has the target among the {candidates} candidates, so there is nothing to rank: "
            "evaluate more users (--evaluation.test_users) or train a better retriever."
        )
    subsets = {"overall": ranks, "hit_subset": {name: rank[hit] for name, rank in ranks.items()}}
    metrics = {name: per_user(rank) for name, rank in ranks.items()}
    pairs = [(a, b) for a, b in PAIRS if a in ranks and b in ranks]
    return Table(
        users={"evaluated": len(hit), "hit": int(hit.sum())},
        bound={f"hr@{candidates}": float(hit.mean())},
        overall={name: summary(rank) for name, rank in ranks.items()},
        hit_subset={name: summary(rank) for name, rank in subsets["hit_subset"].items()},
        intervals={
            subset: {name: _intervals(rank, resamples, seed) for name, rank in members.items()} for subset, members in subsets.items()
        },
        comparisons=compared(metrics, pairs, TESTED, resamples, seed),
    )


def compared(
    metrics: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[str, str]], tested: Sequence[str], resamples: int, seed: int
) -> list[Comparison]:
    """Every pair on every tested metric; p-values corrected for all of them together.

    Args:
        metrics: system -> metric -> value of each user, the same users in the same order.
        pairs: (a, b): is a better than b?
        tested: metrics.
        resamples: of each test.
        seed: their seed.
    """
    cases = [(a, b, metric, metrics[a][metric], metrics[b][metric]) for a, b in pairs for metric in tested]
    alone = [paired_permutation(of_a, of_b, resamples, seed) for *_, of_a, of_b in cases]
    found = []
    for (a, b, metric, of_a, of_b), p_permutation, p_holm in zip(cases, alone, holm(alone), strict=True):
        d = paired_bootstrap(of_a, of_b, resamples, seed)
        found.append(
            Comparison(
                a=a,
                b=b,
                metric=metric,
                difference=d.difference,
                ci95=[d.low, d.high],
                p=d.p,
                p_permutation=p_permutation,
                p_holm=p_holm,
            )
        )
    return found


def _intervals(rank: np.ndarray, resamples: int, seed: int) -> dict[str, list[float]]:
    bounds = {name: interval(values, resamples, seed) for name, values in per_user(rank).items()}
    return {name: [bound.low, bound.high] for name, bound in bounds.items()}


def headings(table: Table) -> list[tuple[str, str, Metrics]]:
    """The two parts of the table, as (key, heading, metrics)."""
    evaluated, hit = table["users"]["evaluated"], table["users"]["hit"]
    (name, bound), *_ = table["bound"].items()
    return [
        (
            "overall",
            f"All {evaluated:,} users. {hit:,} have the target among their candidates: no ranking can exceed {name.upper()} {bound:.4f}",
            table["overall"],
        ),
        ("hit_subset", f"The {hit:,} users whose target is among the candidates", table["hit_subset"]),
    ]


def render(table: Table) -> str:
    """The table as plain text for a terminal, about 110 columns wide."""
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in KS]
    lines = []
    for _, heading, systems in headings(table):
        lines += [heading, f"{'':<10}" + "".join(f"{name.upper():>8}" for name in names)]
        lines += [f"{system:<10}" + "".join(f"{values[name]:>8.4f}" for name in names) for system, values in systems.items()]
        lines.append("")
    lines += [render_comparison(c) for c in table["comparisons"]]
    return "\n".join(lines)


def render_comparison(c: Comparison) -> str:
    """A comparison as a line of text, with the corrected p-value."""
    change, (low, high) = f"{c['a']} - {c['b']}", c["ci95"]
    return f"{change:<20} {c['metric'].upper():<8} {c['difference']:+.4f} [{low:+.4f}, {high:+.4f}]  p {p_value(c['p_holm'])} (Holm)"


def p_value(p: float) -> str:
    """A p-value with three decimals, or <0.001."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def direction(c: Comparison) -> int:
    """Whether a is shown to be better than b, 1, or worse, -1; 0 where neither is shown, or the test was never corrected."""
    if c.get("p_holm", 1.0) >= SIGNIFICANT:
        return 0
    return 1 if c["difference"] > 0 else -1


def verdict(comparisons: list[Comparison], weight: float, seconds_retriever: float, seconds_ranker: float) -> str:
    """What the language model bought and what it costs, in two or three sentences.

    "Worth it" needs fused - retriever to be above zero by the corrected test, as the marks of the table do, and "hurts" below;
    anything else is "not shown", whatever its sign. Intervals say how large a difference is, and decide nothing.

    Args:
        comparisons: of `table`; fused and orpo against the retriever are read, both on NDCG@10.
        weight: the fusion weight chosen on validation users.
        seconds_retriever: to retrieve one user's candidates.
        seconds_ranker: to rank one user's candidates by the language model, on top of that.
    """
    fused, alone = (next(c for c in comparisons if (c["a"], c["b"], c["metric"]) == (a, "retriever", "ndcg@10")) for a in ("fused", "orpo"))
    both = seconds_retriever + seconds_ranker
    ratio = both / seconds_retriever
    cost = f"at {ratio:,.0f} times the latency" if ratio >= 10 else f"at {ratio:.1f} times the latency"
    cost += f" ({duration(seconds_retriever)} -> {duration(both)} per user)"
    if weight == 0:
        first = "Left out: validation chose fusion weight 0, so the fused ranking is the retriever's and the LLM need not run"
        advice = "; choose the weight on more validation users" if direction(alone) > 0 else ""
        return f"{first}. By itself the LLM would change NDCG@10 by {_amount(alone)} {cost}{_reading(alone)}{advice}."
    if direction(fused) > 0:
        first = f"Worth it where {duration(both)} per user is affordable: the LLM adds {_amount(fused)} NDCG@10 {cost}"
    elif direction(fused) < 0:
        first = f"It hurts: fusing the LLM in changes NDCG@10 by {_amount(fused)} {cost}, although validation chose it"
    else:
        first = f"Not shown: fusing the LLM in changes NDCG@10 by {_amount(fused)}, p {p_value(fused['p_holm'])} (Holm), {cost}"
    return f"{first}. Fusion weight {weight:.2f}. By itself the LLM changes it by {_amount(alone)}{_reading(alone)}."


def _amount(c: Comparison) -> str:
    return f"{c['difference']:+.4f} [{c['ci95'][0]:+.4f}, {c['ci95'][1]:+.4f}]"


def _reading(c: Comparison) -> str:
    return {1: ", better than the retriever", -1: ", worse than the retriever", 0: ", not shown to differ from the retriever"}[direction(c)]


def duration(seconds: float) -> str:
    """Seconds as people say them: 850 µs, 12 ms, 1.4 s, 3 min 20 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds > 0.01 else f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds > 10 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
