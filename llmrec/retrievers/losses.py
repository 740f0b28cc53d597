"""Full-softmax cross-entropy over the catalogue, in memory that does not grow with batch x catalogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS = 1 << 22  # made at a time: 16 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes loss and both gradients chunk by chunk in the forward pass, so that no logits are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        vector_gradient = torch.empty_like(vectors)
        table_gradient = torch.zeros_like(table)
        total = vectors.new_zeros(())
        chunk = min(2048, max(1, LOGITS // len(table)))
        for start in range(0, len(vectors), chunk):
            rows = slice(start, start + chunk)
            h, y = vectors[rows], targets[rows, None]
            logits = h @ table.T
            logits[:, 0] = -torch.inf  # padding is no item
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, y)).sum()
            gradient = logits.sub_(normaliser).exp_()  # softmax
            gradient.scatter_add_(1, y, gradient.new_full(y.shape, -1.0))
            torch.mm(gradient, table, out=vector_gradient[rows])
            table_gradient.addmm_(gradient.T, h)
        ctx.save_for_backward(vector_gradient.div_(len(vectors)), table_gradient.div_(len(vectors)))
        return total / len(vectors)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        vector_gradient, table_gradient = ctx.saved_tensors
        return vector_gradient * outer[0], table_gradient * outer[0], None


def full_softmax(vectors: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next item over all items.

    Args:
        vectors: (positions, dim).
        table: item embeddings, (items + 1, dim); row 0 is padding and never an answer.
        targets: (positions,) int64, 1..items.

    Returns:
        A scalar; differentiable once, with respect to vectors and table.
    """
    return _ChunkedCrossEntropy.apply(vectors, table, targets)
