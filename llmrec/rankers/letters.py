"""Candidates' letters scored from one forward pass per prompt (LlamaRec's verbalizer, arXiv 2311.02089).

Rows are padded on the right and each row is read at its own last token. A causal model never looks to the right, so padding needs
no attention mask (and attention without one takes its fast path); padding on the left would shift GPT-2's positions and run
through Mamba's state. Only the last position goes through the output layer: one logit vector per prompt, not one per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.errors import UserError


class NotFinite(UserError):
    """A log-probability is not finite: weights are not, or numbers are too large for their dtype.

    Attributes:
        prompt: the number of its prompt among those that were asked.
    """

    def __init__(self, prompt: int):
        super().__init__(f"prompt {prompt} has a log-probability that is not finite; try base.dtype float32")
        self.prompt = prompt


MULTIPLE = 16
"""Of which every width is a multiple. On CPUs oneDNN and attention keep code for each shape of bfloat16 products that they meet, some
10 MB for each width of SmolLM2-135M, and take time to make it; and units that multiply matrices like whole tiles."""


def padded_width(longest: int) -> int:
    """How many tokens wide a batch is whose longest row has so many."""
    return -(-longest // MULTIPLE) * MULTIPLE


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token rows as one batch: ids padded on the right (rows, `padded_width`), and the number of real tokens (rows,), both int64."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), padded_width(int(lengths.max()))), pad_id)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.as_tensor(row)
    return ids, lengths


def last_logits(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """Logits after the last real token of each row of `pad`, (rows, vocabulary) float32.

    They come out of the model's own forward pass, so that adapters on the head and wrappers like DDP take part.
    """
    return model(input_ids=ids, logits_to_keep=lengths[:, None] - 1, use_cache=False).logits[:, 0].float()


def logprobs_of(label_ids: Sequence[int], logits: Tensor, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Log-probabilities of the letters among the whole vocabulary, (rows, letters) float32.

    Args:
        label_ids: token id of each letter.
        logits: (rows, vocabulary) float32.
        numbers: which prompt each row belongs to, for the error.

    Raises:
        NotFinite: a log-probability is not finite; the error names the prompt.
    """
    logprobs = logits.log_softmax(-1)[:, torch.as_tensor(label_ids, device=logits.device)]
    bad = ~torch.isfinite(logprobs).all(1).cpu().numpy()
    if bad.any():
        raise NotFinite(int(np.array(numbers)[bad][0]))
    return logprobs.cpu().numpy()


def batches_of_letter_logprobs(
    model: nn.Module, rows: Sequence[Sequence[int]], label_ids: Sequence[int], *, batch: int, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Like `letter_logprobs`, batch by batch from the longest rows to the shortest.

    Yields:
        (row numbers (batch,), log-probabilities (batch, letters) float32), which a caller may keep as they come.
    """
    by_length = sorted(range(len(rows)), key=lambda at: -len(rows[at]))  # the largest batch first: out of memory at once or never
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(rows), batch):
        numbers = by_length[start : start + batch]
        ids, lengths = pad([rows[at] for at in numbers], pad_id)
        with torch.inference_mode():
            found = logprobs_of(label_ids, last_logits(model, ids.to(device), lengths.to(device)), numbers)
        yield np.array(numbers), found


def letter_logprobs(
    model: nn.Module, rows: Sequence[Sequence[int]], label_ids: Sequence[int], *, batch: int = 16, pad_id: int = 0
) -> np.ndarray:
    """Log-probability of each letter as the next token, normalised over the whole vocabulary (not over the letters).

    Within a row the order is the same either way; across rows these say how much the model answers with a letter at all.

    Args:
        model: a causal language model, with or without adapter. It is put into evaluation mode.
        rows: token ids of the prompts, as `PromptWriter.encode` makes them.
        label_ids: token id of each letter.
        batch: prompts per forward pass; changes speed and memory, and results by rounding only.
        pad_id: any token id of the vocabulary.

    Returns:
        (rows, letters) float32.

    Raises:
        NotFinite: a log-probability is not finite; the error names the row.
    """
    scores = np.empty((len(rows), len(label_ids)), dtype=np.float32)
    for numbers, found in batches_of_letter_logprobs(model, rows, label_ids, batch=batch, pad_id=pad_id):
        scores[numbers] = found
    return scores
