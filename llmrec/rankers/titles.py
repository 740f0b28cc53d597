"""Candidates scored by their titles: the mean log-probability per token of each title after the prompt.

The mean and not the sum, or short titles would win: a title is scored as a whole, beside others of any length. A prompt is read once for
all its candidates where the model allows (see `completions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmrec.errors import UserError
from llmrec.rankers.completions import Strategy, choose, completion_logps, lay_out
from llmrec.rankers.letters import NotFinite

KEPT = 1024
"""Positions whose logits exist at the same time, where several prompts are scored at once: 200 MB with a vocabulary of 49,152."""

Part = tuple[int, slice]
"""A prompt's number, and which of its candidates."""


def title_logprobs(
    model: Any, rows: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], *, batch: int = 16, pad_id: int = 0
) -> list[np.ndarray]:
    """Mean log-probability per token of each candidate's tokens after its prompt.

    Args:
        model: a causal language model, with or without adapter. It is put into evaluation mode.
        rows: token ids of the prompts.
        candidates: token ids of each prompt's candidates, as they follow the prompt; a prompt may have none.
        batch: rows per forward pass: prompts, each with all its candidates, where they share a row, else candidates, whose prompts
            are read once or again for each, as `choose` says. Fewer where there would be more than `KEPT` logits. Candidates that
            share a prompt stay together.
        pad_id: any token id of the vocabulary.

    Returns:
        Of each prompt (candidates,) float32.

    Raises:
        UserError: a prompt or a candidate has no tokens; the message names it.
        NotFinite: a log-probability is not finite; the error names the prompt.
    """
    _check(rows, candidates)
    found = [np.empty(len(of_prompt), dtype=np.float32) for of_prompt in candidates]
    strategy, _ = choose(model, gradient_checkpointing=False)
    model.eval()
    for parts in batches(strategy, rows, candidates, batch):
        own = [candidates[at][which] for at, which in parts]
        laid_out = lay_out(strategy, [rows[at] for at, _ in parts], own, pad_id)
        with torch.inference_mode():
            moved = {name: value.to(model.device) for name, value in laid_out.items()}
            sums, _ = completion_logps(model, model.config, moved)
            means = (sums / moved["completion_lengths"]).cpu().numpy()
        for (at, which), of_part in zip(parts, np.split(means, np.cumsum([len(of_part) for of_part in own])[:-1]), strict=True):
            if not np.isfinite(of_part).all():
                raise NotFinite(at)
            found[at][which] = of_part
    return found


def batches(
    strategy: Strategy, rows: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], batch: int
) -> Iterator[list[Part]]:
    """Parts that go through the model together, the longest prompts first; in each at most `batch` rows and `KEPT` logits, or one part."""
    parts: list[Part] = []
    for at in sorted(range(len(rows)), key=lambda at: -len(rows[at])):
        count = len(candidates[at])
        if strategy == "concatenated":
            parts += [(at, slice(nth, nth + 1)) for nth in range(count)]
        elif count:
            parts.append((at, slice(count)))
    size, most, together = 0, 0, list[Part]()
    for at, which in parts:
        rows_of_part = len(candidates[at]) if strategy == "continued" else 1
        most = max(most, kept_of := 1 + sum(len(candidate) - 1 for candidate in candidates[at][which]))  # all parts are padded to it
        if together and (size + rows_of_part > batch or (len(together) + 1) * most > KEPT):
            yield together
            size, most, together = 0, kept_of, []
        together.append((at, which))
        size += rows_of_part
    if together:
        yield together


def _check(rows: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]) -> None:
    for number, (row, of_prompt) in enumerate(zip(rows, candidates, strict=True)):
        if not row:
            raise UserError(f"prompt {number} is empty: give it at least one token")
        for nth, candidate in enumerate(of_prompt):
            if not candidate:
                raise UserError(f"candidate {nth} of prompt {number} has no tokens: give an item without a title one, or leave it out")
