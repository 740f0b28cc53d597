"""Position bias: does a ranker that picks letters look at the candidates, or at the places they stand in?

The same candidates are shown in k random orders and scored in each. A ranker that looks at titles alone

    has the same NDCG@10 in every order, up to rounding             ndcg@10_per_order
    has the same first choice in every order                        same_top
    chooses every letter equally often, as orders are shuffled      letters, and their chi-square (Pearson 1900)

Language models prefer some letters and places (Zheng et al. 2024, arXiv 2309.03882; as rankers Hou et al. 2024, arXiv 2305.08845).
The mean of an item's scores over the orders evens that out, at k prompts a user instead of one.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

import numpy as np
from scipy.special import gammaincc

from llmrec.evaluation import metrics
from llmrec.evaluation.compare import p_value


def position_bias(
    by_order: np.ndarray, order: np.ndarray, items: np.ndarray, targets: np.ndarray, asked: np.ndarray, *, shuffled: bool = True
) -> dict[str, Any]:
    """How much the place of a candidate decides.

    Args:
        by_order: scores of `items` in each order, (users, orders, candidates); -inf for padding.
        order: candidate `order[u, o, letter]` of `items[u]` is shown at that letter, (users, orders, candidates).
        items: (users, candidates), 0 where there are fewer.
        targets: (users,).
        asked: whose scores are a language model's, (users,) bool; the others keep the retriever's.
        shuffled: whether the orders are random; the retriever's own puts better candidates at A.

    Returns:
        "position_bias" of metrics.json:
            orders: prompts per user.
            users: users asked.
            letters: letter -> how often it was the first choice, over the users asked and the orders; each of k letters that share the
                best score was it 1/k times.
            tied: share of these choices that several letters shared: equal scores are common in bfloat16.
            chi_square, p: of the letters against equal shares, and the probability of as large a value without any preference; None
                where orders are not random.
            same_top: share of the users asked whose first choice is the same item in all orders; None for one order. With shared choices
                it is the probability of that when each order draws one of its own.
            ndcg@10_per_order: over all users, one number per order.
            ndcg@10_sd: their standard deviation; None for one order.
            ndcg@10_averaged: NDCG@10 of the mean scores over the orders.

    Raises:
        ValueError: nobody was asked.
    """
    orders = by_order.shape[1]
    if not asked.any():
        raise ValueError("nobody was asked: there is no first choice")
    first = by_order[asked] == by_order[asked].max(axis=2, keepdims=True)
    choice = first / first.sum(axis=2, keepdims=True)  # a first choice that several share is each of them as often
    chosen = np.take_along_axis(choice, order[asked], axis=2).sum(axis=(0, 1))
    shown = (items[asked] > 0).sum(axis=1)
    chi_square, p = _uniform(chosen, shown, orders) if shuffled else (None, None)
    ndcg = [_ndcg(by_order[:, number], items, targets) for number in range(orders)]
    return {
        "orders": orders,
        "users": int(asked.sum()),
        "letters": dict(zip(ascii_uppercase, chosen.tolist(), strict=False)),
        "tied": float((first.sum(axis=2) > 1).mean()),
        "chi_square": chi_square,
        "p": p,
        "same_top": float(choice.prod(axis=1).sum(axis=1).mean()) if orders > 1 else None,
        "ndcg@10_per_order": ndcg,
        "ndcg@10_sd": float(np.std(ndcg, ddof=1)) if orders > 1 else None,
        "ndcg@10_averaged": _ndcg(by_order.mean(axis=1), items, targets),
    }


def sentence(found: dict[str, Any]) -> str:
    """The same in one line for the printed table.

    Args:
        found: of `position_bias`.
    """
    most = sorted(found["letters"], key=lambda letter: -found["letters"][letter])[:3]
    total = sum(found["letters"].values())
    letters = "letters chosen most: " + ", ".join(f"{letter} {found['letters'][letter] / total:.0%}" for letter in most)
    if found["p"] is not None:
        letters += f" (equal shares {1 / len(found['letters']):.0%}; chi-square {found['chi_square']:.0f}, p {p_value(found['p'])})"
    if found.get("tied"):
        letters += f"; in {found['tied']:.1%} of answers several share the first place"
    if found["orders"] == 1:
        return f"position bias: {letters}; --evaluation.orders 4 shows how much the order decides"
    ndcg = found["ndcg@10_per_order"]
    return (
        f"position bias: NDCG@10 from {min(ndcg):.4f} to {max(ndcg):.4f} in {found['orders']} orders, mean {np.mean(ndcg):.4f}; of their "
        f"mean scores {found['ndcg@10_averaged']:.4f}, at {found['orders']} prompts a user; same first choice in all orders for "
        f"{found['same_top']:.0%} of users; {letters}"
    )


def _uniform(chosen: np.ndarray, shown: np.ndarray, orders: int) -> tuple[float, float]:
    """Chi-square of how often each letter was chosen, and its p-value.

    Args:
        chosen: (letters,).
        shown: how many candidates each user was shown, (users,).
        orders: times that each user chose.
    """
    there = shown[:, None] > np.arange(len(chosen))
    expected = orders * (there / shown[:, None]).sum(axis=0)
    chosen, expected = chosen[expected > 0], expected[expected > 0]
    statistic = float(((chosen - expected) ** 2 / expected).sum())
    return statistic, float(gammaincc((len(chosen) - 1) / 2, statistic / 2)) if len(chosen) > 1 else 1.0


def _ndcg(scores: np.ndarray, items: np.ndarray, targets: np.ndarray) -> float:
    return metrics.summary(metrics.rank_of_target(scores, items, targets), ks=(10,))["ndcg@10"]
