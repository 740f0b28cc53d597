"""Preference pairs grouped by prompt: what one forward pass serves.

A group is a prompt with its different completions, each once, and its winners, each with the losers it is compared with, all by
number among the completions. Pair-wise, every pair is a winner with one loser, and a completion that wins twice is two winners,
so that losses are those of TRL. List-wise, a completion is one winner with several losers: those of its own pairs first, then
others of the pool of candidates that its prompt shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import UserError

Group = dict[str, Any]
"""prompt_ids; completions (lists of token ids); winners (numbers); losers (a list of numbers for each winner); rows (the pairs' numbers
in the data set)."""


def grouped(pairs: Iterable[Mapping[str, Any]], *, negatives: int | Literal["all"] = 1, max_length: int, seed: int = 0) -> list[Group]:
    """One group per different prompt, in the order in which they first appear.

    Args:
        pairs: prompt_ids, chosen_ids and rejected_ids; for more negatives than one also pool_ids, the tokens that answer with the
            prompt's candidates.
        negatives: losers of a winner. 1: of its pair. More: of its own pairs and, up to that number, of the rest of the pool, drawn
            once by seed and row, the same in every epoch. "all": the whole pool.
        max_length: tokens of a prompt and a completion.
        seed: of the losers that are drawn.

    Raises:
        UserError: there are no pairs, or one cannot be trained on; the message names its row.
    """
    groups: dict[tuple[int, ...], Group] = {}
    pools: dict[int, list[int]] = {}
    for row, pair in enumerate(pairs):
        _check(row, pair, max_length)
        prompt = list(pair["prompt_ids"])
        group = groups.setdefault(tuple(prompt), {"prompt_ids": prompt, "completions": [], "winners": [], "losers": [], "rows": []})
        group["rows"].append(row)
        winner, loser = (_number(group["completions"], list(pair[side])) for side in ("chosen_ids", "rejected_ids"))
        if negatives == 1 or winner not in group["winners"]:
            group["winners"].append(winner)
            group["losers"].append([])
        losers = group["losers"][-1 if negatives == 1 else group["winners"].index(winner)]
        if negatives == 1 or loser not in losers:
            losers.append(loser)
        if negatives != 1:
            pools.setdefault(group["rows"][0], _pool(row, pair))
    if not groups:
        raise UserError("there are no rows to train on: see the pairs stage's README.md for what was skipped and why")
    if negatives != 1:
        for group in groups.values():
            _fill(group, pools[group["rows"][0]], negatives, seed)
    return list(groups.values())


def comparisons(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Who is compared with whom in a batch, with completions and prompts counted through the batch.

    Returns:
        winners (winners,) and losers (winners, most), numbers of completions; real (winners, most) bool, false where a winner has
        fewer losers; prompt (winners,), the winner's prompt.
    """
    winners: list[int] = []
    losers: list[list[int]] = []
    prompts: list[int] = []
    before = 0
    for place, group in enumerate(groups):
        winners += [before + winner for winner in group["winners"]]
        losers += [[before + loser for loser in of_winner] for of_winner in group["losers"]]
        prompts += [place] * len(group["winners"])
        before += len(group["completions"])
    counts = torch.tensor([len(of_winner) for of_winner in losers], dtype=torch.int64)
    most = max((len(of_winner) for of_winner in losers), default=1)
    return {
        "winners": torch.tensor(winners, dtype=torch.int64),
        "losers": torch.tensor([of_winner + of_winner[:1] * (most - len(of_winner)) for of_winner in losers]).long().view(-1, most),
        "real": torch.arange(most) < counts[:, None],
        "prompt": torch.tensor(prompts, dtype=torch.int64),
    }


def _number(completions: list[list[int]], completion: list[int]) -> int:
    if completion not in completions:
        completions.append(completion)
    return completions.index(completion)


def _check(row: int, pair: Mapping[str, Any], max_length: int) -> None:
    if not pair["prompt_ids"]:
        raise UserError(f"row {row}: the prompt is empty")
    for side in ("chosen", "rejected"):
        if not pair[f"{side}_ids"]:
            raise UserError(f"row {row}: the {side} completion is 0 tokens")
    tokens = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    if tokens > max_length:
        raise UserError(f"row {row}: {tokens} tokens, max_length is {max_length}: shorten the prompt or the completions")


def _pool(row: int, pair: Mapping[str, Any]) -> list[int]:
    if "pool_ids" not in pair:
        raise UserError(
            f"row {row} has no pool_ids: more negatives than 1 need the tokens of the prompt's candidates in that column, or label_ids"
        )
    for side in ("chosen", "rejected"):
        if len(pair[f"{side}_ids"]) != 1 or pair[f"{side}_ids"][0] not in pair["pool_ids"]:
            raise UserError(f"row {row}: the {side} completion is none of the pool's tokens: set negatives to 1, or mend pool_ids")
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise UserError(f"row {row}: the chosen and the rejected completion are the same")
    return list(pair["pool_ids"])


def _fill(group: Group, pool: list[int], negatives: int | Literal["all"], seed: int) -> None:
    """Give each winner of the group losers from its pool, up to the number of negatives, but none that wins against it in a pair."""
    beaten_by = {
        winner: [better for better, losers in zip(group["winners"], group["losers"], strict=True) if winner in losers]
        for winner in group["winners"]
    }
    candidates = [_number(group["completions"], [token]) for token in pool]
    for winner, losers in zip(group["winners"], group["losers"], strict=True):
        rest = [candidate for candidate in candidates if candidate not in (winner, *losers, *beaten_by[winner])]
        drawn = np.random.default_rng([seed, group["rows"][0], winner]).permutation(rest).tolist()
        own = len(losers)  # what the data says stays, even where it is more than asked for
        losers += drawn
        if negatives != "all":
            del losers[max(negatives, own) :]
