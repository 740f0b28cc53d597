"""Losses of next-item prediction, against the whole catalogue or against sampled items. All are means over positions.

The sampled ones take embedding rows, never the table, so that their memory does not grow with the catalogue.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.retrievers.repeats import Seen

LOGITS = 1 << 20  # made at a time: 4 MB, of which the cores' caches hold much
FEWEST = 32  # positions at a time, however large the catalogue: fewer make slow products


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes loss and both gradients chunk by chunk in the forward pass, so that no logits are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, table: Tensor, targets: Tensor, seen: Seen | None, bias: Tensor | None) -> Tensor:
        items, answers = table[1:], targets[:, None] - 1  # without the padding
        losses = vectors.new_empty(len(vectors), 1)
        vector_gradient, table_gradient = torch.empty_like(vectors), torch.zeros_like(table)
        bias_gradient = None if bias is None else torch.zeros_like(bias)
        chunk = max(FEWEST, LOGITS // len(items))
        for start in range(0, len(vectors), chunk):
            rows = slice(start, start + chunk)
            h, y = vectors[rows], answers[rows]
            logits = h @ items.T
            if seen is not None and bias is not None:
                columns, there = seen.items(rows)
                logits.scatter_add_(1, columns, there.to(logits.dtype) * bias)
            shares = logits.softmax(1)
            # logsumexp is the largest logit minus the log of its share: no second pass of exp, and never the log of 0.
            losses[rows] = logits.amax(1, keepdim=True) - logits.gather(1, y) - shares.amax(1, keepdim=True).log()
            gradient = shares.scatter_add_(1, y, shares.new_full(y.shape, -1.0))
            torch.mm(gradient, items, out=vector_gradient[rows])
            table_gradient[1:].addmm_(gradient.T, h)
            if seen is not None and bias_gradient is not None:
                bias_gradient += (gradient.gather(1, columns) * there).sum() / len(vectors)
        ctx.save_for_backward(vector_gradient.div_(len(vectors)), table_gradient.div_(len(vectors)), bias_gradient)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor | None]:
        vector_gradient, table_gradient, bias_gradient = ctx.saved_tensors
        of_bias = None if bias_gradient is None else bias_gradient * outer[0]
        return vector_gradient * outer[0], table_gradient * outer[0], None, None, of_bias


def full_softmax(vectors: Tensor, table: Tensor, targets: Tensor, repeats: tuple[Seen, Tensor] | None = None) -> Tensor:
    """Mean cross-entropy of the next item over all items.

    Args:
        vectors: (positions, dim).
        table: item embeddings, (items + 1, dim); row 0 is padding and never an answer.
        targets: (positions,) int64, 1..items.
        repeats: the items that the positions have behind them, and the bias of their logits, a scalar.

    Returns:
        A scalar; differentiable once, with respect to vectors, table and the bias.
    """
    return _ChunkedCrossEntropy.apply(vectors, table, targets, *(repeats or (None, None)))


def sampled_softmax(vectors: Tensor, positives: Tensor, negatives: Tensor, targets: Tensor, negative_ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next item over itself and sampled items, -log(e^s+ / (e^s+ + sum of e^s-)).

    This is InfoNCE (van den Oord et al., arXiv 1807.03748, equation 4). With vectors and rows of unit length, and the vectors
    divided by a temperature, it is the loss of Hydra (arXiv 2504.07398, equation 15), whose negatives come from outside the
    user's history; here only the target itself is left out. An item drawn twice counts twice.

    Args:
        vectors: (positions, dim).
        positives: embedding rows of the targets, (positions, dim).
        negatives: embedding rows of the sampled items, (k, dim), shared by all positions.
        targets: (positions,) int64.
        negative_ids: (k,) int64; where one is a position's target, it does not count there.

    Returns:
        A scalar.
    """
    positive, others = _scores(vectors, positives, negatives, targets, negative_ids)
    return -F.logsigmoid(positive - others.logsumexp(1)).mean()


def gbce(
    vectors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    targets: Tensor,
    negative_ids: Tensor,
    items: int,
    calibration: float,
) -> Tensor:
    """Generalised binary cross-entropy of gSASRec (Petrov and Macdonald, arXiv 2308.07192).

    -(log sigmoid(s+)^beta + sum of log(1 - sigmoid(s-))) / (k + 1), where beta = alpha (t (1 - 1/alpha) + 1/alpha)
    = 1 - t (1 - alpha) and alpha = k / (items - 1) is the share of negatives that are drawn.

    Args:
        vectors: (positions, dim).
        positives: embedding rows of the targets, (positions, dim).
        negatives: embedding rows of the sampled items, (k, dim), shared by all positions.
        targets: (positions,) int64.
        negative_ids: (k,) int64; where one is a position's target, it adds nothing there.
        items: in the catalogue.
        calibration: t; 0 is plain binary cross-entropy (beta 1), 1 undoes the effect of sampling on probabilities (beta alpha).

    Returns:
        A scalar.
    """
    positive, others = _scores(vectors, positives, negatives, targets, negative_ids)
    alpha = min(1.0, len(negatives) / (items - 1))
    beta = 1 - calibration * (1 - alpha)
    return -(beta * F.logsigmoid(positive) + F.logsigmoid(-others).sum(1)).mean() / (len(negatives) + 1)


def bce(vectors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy with one negative per position (SASRec: Kang and McAuley, arXiv 1808.09781, equation 7).

    Args:
        vectors: (positions, dim).
        positives: embedding rows of the targets, (positions, dim).
        negatives: embedding rows of other items, (positions, dim); published from outside the user's history.

    Returns:
        The mean of -log sigmoid(s+) - log(1 - sigmoid(s-)), a scalar.
    """
    return -(F.logsigmoid((vectors * positives).sum(1)) + F.logsigmoid(-(vectors * negatives).sum(1))).mean()


def _scores(vectors: Tensor, positives: Tensor, negatives: Tensor, targets: Tensor, negative_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the targets (positions,) and of the negatives (positions, k), -inf where a negative is the target."""
    hits = targets[:, None] == negative_ids
    return (vectors * positives).sum(1), (vectors @ negatives.T).masked_fill(hits, -torch.inf)
