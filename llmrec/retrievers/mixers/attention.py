"""Causal multi-head self-attention: SASRec's mixer (arXiv 1808.09781)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.errors import UserError

CAUSAL = True
STEPS = False


class CausalAttention(nn.Module):
    """Multi-head self-attention over the past.

    Padding stands on the right, so that under the causal mask no real position sees it.

    Args:
        dim: width; a multiple of heads.
        heads: number of heads.
        dropout: on the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise UserError(f"model.dim {dim} is not a multiple of model.mixer.heads {heads}")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


def build(model: SequenceModel) -> CausalAttention:
    """The layer with the recipe's sizes."""
    return CausalAttention(model.dim, model.mixer.heads, model.dropout)
