"""Users asked in several orders of the same candidates: what the orders share is computed once.

    score(item) = 1/k sum_j log p(letter of the item in order j | prompt in order j)

Language models like some letters and places better than others (Zheng et al. 2024, arXiv 2309.03882; for rankers Hou et al.
2024, arXiv 2305.08845, who average over shuffled candidates too); the mean over orders evens that out. A user's prompts are alike
up to the first candidate: instruction and history. These tokens are computed once; their keys and values, or in Mamba-2
the state after them, are repeated, and each order goes on from there.

Users in one forward pass share the same number of tokens, the smallest of theirs, and what goes beyond it is computed in
each order. So there is no padding before the end of a row: no position is shifted, no state runs through padding, and no mask is
needed but the causal one. On the right rows are padded as in `letters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from llmrec.rankers.completions import PACKED
from llmrec.rankers.letters import letter_logprobs, logprobs_of, pad

CACHE_NAMES = {"mamba2": "cache_params"}
"""What a model type calls the argument with the state of earlier tokens, where it is not past_key_values."""


SHARING = (*PACKED, "mamba2")
"""Families whose states after the shared tokens are known to be all there is to go on from. Others are asked the plain way."""


def shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, but leaving each row at least its last one."""
    first, last = min(map(list, rows)), max(map(list, rows))  # in dictionary order these two differ before any others do
    most = min(map(len, rows)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def last_logits_after(model: Any, rows: Sequence[Sequence[int]], shared: int, orders: int, pad_id: int) -> Tensor:
    """Logits after the last token of each row, (rows, vocabulary) float32, by way of the tokens they share.

    Args:
        model: a causal language model of transformers that takes a cache, with or without adapter.
        rows: token ids, `orders` rows of one user after the other.
        shared: how many tokens each user's rows begin with, at least 1 and less than any row has.
        orders: rows of each user.
        pad_id: any token id of the vocabulary.
    """
    cache: Any = DynamicCache(config=model.config)
    state: dict[str, Any] = {CACHE_NAMES.get(model.config.model_type, "past_key_values"): cache, "use_cache": True}
    heads = torch.tensor([row[:shared] for row in rows[::orders]], device=model.device)
    model(input_ids=heads, logits_to_keep=heads.new_empty(0), **state)  # states are wanted, no logits
    cache.reorder_cache(torch.arange(len(heads), device=model.device).repeat_interleave(orders))
    ids, lengths = (made.to(model.device) for made in pad([row[shared:] for row in rows], pad_id))
    return model(input_ids=ids, logits_to_keep=lengths[:, None] - 1, **state).logits[:, 0].float()


def batches_of_users(shared: Sequence[int], users: int) -> Iterator[list[int]]:
    """Numbers of users with about as many shared tokens, most first; so many users in a batch."""
    by_shared = sorted(range(len(shared)), key=lambda at: -shared[at])
    for start in range(0, len(by_shared), users):
        yield by_shared[start : start + users]


def letter_logprobs_of_orders(
    model: Any, asked: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int], *, batch: int = 16, pad_id: int = 0
) -> np.ndarray:
    """Like `letter_logprobs` for users who are asked in several orders each.

    The log-probabilities are those of `letter_logprobs` up to rounding: 1e-5 in float32, some hundredths in bfloat16.

    Args:
        model: a causal language model of transformers. It is put into evaluation mode.
        asked: token ids of each user's prompts, the same number for each user.
        label_ids: token id of each letter.
        batch: prompts per forward pass.
        pad_id: any token id of the vocabulary.

    Returns:
        (users, orders, letters) float32.

    Raises:
        NotFinite: a log-probability is not finite; the error names the prompt, counted through all users.
    """
    orders = len(asked[0]) if asked else 1
    shared = [shared_tokens(rows) for rows in asked]
    if orders == 1 or not all(shared) or model.config.model_type not in SHARING:  # nothing to share, or not known how
        plain = letter_logprobs(model, list(chain(*asked)), label_ids, batch=batch, pad_id=pad_id)
        return plain.reshape(len(asked), orders, len(label_ids))
    scores = np.empty((len(asked), orders, len(label_ids)), dtype=np.float32)
    model.eval()
    for users in batches_of_users(shared, max(1, batch // orders)):
        rows = [row for user in users for row in asked[user]]
        with torch.inference_mode():
            logits = last_logits_after(model, rows, min(shared[user] for user in users), orders, pad_id)
            found = logprobs_of(label_ids, logits, [user * orders + order for user in users for order in range(orders)])
        scores[users] = found.reshape(len(users), orders, len(label_ids))
    return scores
