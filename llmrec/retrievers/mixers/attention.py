"""Multi-head self-attention: SASRec's mixer (arXiv 1808.09781)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.errors import UserError
from llmrec.ssm.initial import initialise

CAUSAL = True
STEPS = False


class Attention(nn.Module):
    """Multi-head self-attention, over the past unless told otherwise.

    Padding stands on the right, so that under the causal mask no real position sees it.

    Args:
        dim: width; a multiple of heads.
        heads: number of heads.
        dropout: on the attention weights.
        causal: whether a position sees the past alone.

    Raises:
        UserError: when dim is not a multiple of heads.
    """

    def __init__(self, dim: int, heads: int, dropout: float, causal: bool = True):
        super().__init__()
        if dim % heads:
            raise UserError(f"model.dim {dim} is not a multiple of model.mixer.heads {heads}")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        initialise(self, "mamba4rec")  # N(0, .02), as RecBole

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """All positions at once.

        Args:
            x: (batch, length, dim).
            mask: (batch, length), false at padding; only a layer that is not causal needs it.
        """
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


def build(model: SequenceModel, max_length: int) -> Attention:
    """The layer with the recipe's sizes."""
    return Attention(model.dim, model.mixer.heads, model.mixer.dropout)
