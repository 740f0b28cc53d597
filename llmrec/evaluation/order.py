"""Does the order of a history matter? The same events in another order, asked of the same model.

    reversed        the latest event first
    shuffled        any order
    last kept       any order, but the latest event stays the latest

On some data sets sequence models gain little from order: what was taken says most, when it was taken little (Klenitskiy et al. 2024,
arXiv 2408.12008; Woolridge et al. 2021). The model is not trained again, so what it loses is the most that order can be worth to it:
trained on shuffled histories it might do better on them. Only the events that the model reads at once change places, so that it sees
the same events in every variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmrec.evaluation import compare, metrics

AS_IT_IS = "as it is"
RANDOM = ("shuffled", "last kept")
VARIANTS = (*RANDOM, "reversed")


def rearranged(history: np.ndarray, how: str, window: int, random: np.random.Generator) -> np.ndarray:
    """The history with its last `window` events in another order.

    Args:
        history: items, oldest first, (events,).
        how: of `VARIANTS`, or `AS_IT_IS`.
        window: events that the model reads; what is older stays where it is.
        random: of the random orders.
    """
    older, read = np.split(history, [max(0, len(history) - window)])
    if how == "reversed":
        read = read[::-1]
    elif how == "shuffled":
        read = random.permutation(read)
    elif how == "last kept":
        read = np.concatenate([random.permutation(read[:-1]), read[-1:]])
    return np.concatenate([older, read])


def table(ranks: Mapping[str, Sequence[np.ndarray]], users: np.ndarray, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """What each order of the histories is worth.

    Args:
        ranks: variant, `AS_IT_IS` among them -> rank of every target, once per random order, each (cases,).
        users: whose case each is, (cases,): a user with several counts once, as does one with several random orders.
        resamples: of intervals and tests.
        seed: their seed.

    Returns:
        For metrics.json: "users"; "variants", means by variant and metric; "per_order", NDCG@10 of each random order; "comparisons",
        every variant against the histories as they are, as in the table of `evaluate`.
    """
    names, owner, cases = np.unique(users, return_inverse=True, return_counts=True)
    values: dict[str, dict[str, np.ndarray]] = {}
    for variant, orders in ranks.items():
        each = [metrics.per_user(rank) for rank in orders]
        means = {metric: np.mean([found[metric] for found in each], axis=0) for metric in each[0]}
        values[variant] = {metric: np.bincount(owner, mean) / cases for metric, mean in means.items()}
    pairs = [(variant, AS_IT_IS) for variant in ranks if variant != AS_IT_IS]
    return {
        "users": len(names),
        "variants": {variant: {metric: float(of_user.mean()) for metric, of_user in found.items()} for variant, found in values.items()},
        "per_order": {variant: [metrics.summary(rank, users=users)["ndcg@10"] for rank in ranks[variant]] for variant in ranks},
        "comparisons": compare.compared(values, pairs, compare.TESTED, resamples, seed),
    }


def render(found: Mapping[str, Any]) -> str:
    """The table and its verdict as text.

    Args:
        found: of `table`.
    """
    shown = ("hr@10", "ndcg@10", "mrr@10")
    lines = [f"{'history':<12}" + "".join(f"{metric.upper():>9}" for metric in shown)]
    lines += [f"{name:<12}" + "".join(f"{of[metric]:>9.4f}" for metric in shown) for name, of in found["variants"].items()]
    lines += ["", *(compare.render_comparison(comparison) for comparison in found["comparisons"]), "", verdict(found)]
    return "\n".join(lines)


def verdict(found: Mapping[str, Any]) -> str:
    """Whether order matters, in two sentences.

    Args:
        found: of `table`, with the variants "shuffled" and "last kept".
    """
    shuffled, kept = (
        next(c for c in found["comparisons"] if c["a"] == variant and c["metric"] == "ndcg@10") for variant in ("shuffled", "last kept")
    )
    whole = found["variants"][AS_IT_IS]["ndcg@10"]
    low, high = shuffled["ci95"]
    change = f"NDCG@10 {shuffled['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    if compare.direction(shuffled) == 0:
        p = compare.p_value(shuffled["p_holm"])
        return f"Not shown that order matters here: shuffling the histories changes {change}, p {p} (Holm)."
    if compare.direction(shuffled) > 0:
        return f"Order misleads this model: shuffling the histories changes {change}."
    lost = shuffled["difference"] / whole
    back = 1 - kept["difference"] / shuffled["difference"]
    return (
        f"Order matters here: shuffling the histories changes {change}, {-lost:.0%} of {whole:.4f} is lost; with the last event in its "
        f"place {max(0.0, back):.0%} of that comes back. A model trained on shuffled histories might lose less."
    )
