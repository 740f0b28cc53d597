"""HSTU's attention without softmax (arXiv 2402.17152, equations 1 to 3).

    u, v, q, k = SiLU(x W)
    A = SiLU(q k^T + r) / n                causal; r is learned per distance, n is max_length
    y = Linear(LayerNorm(A v) * u)

The norm before the layer, the residual around it and its dropout (here after the last projection, there before it) are the
skeleton's. The paper's bias by elapsed time is left out: the histories carry no times.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.errors import UserError

CAUSAL = True
STEPS = False


class HSTU(nn.Module):
    """HSTU's spatial aggregation and pointwise transformation, (batch, length, dim) to the same, causal.

    Start, biases and norm are those of facebookresearch/generative-recommenders: no bias in the first projection, LayerNorm
    over all heads together and without weights. Its table of relative positions has 2 max_length - 1 entries, of which a
    causal layer reads max_length: these are kept, `rel_pos[i - j]` for query i and key j, shared by the heads.

    Padding stands on the right, where no real position sees it.

    Args:
        dim: width; a multiple of heads.
        heads: number of heads; u, v, q and k have dim / heads channels in each.
        max_length: longest history, and the n of the formula.

    Raises:
        UserError: when dim is not a multiple of heads.
    """

    def __init__(self, dim: int, heads: int, max_length: int):
        super().__init__()
        if dim % heads:
            raise UserError(f"model.dim {dim} is not a multiple of model.mixer.heads {heads}")
        self.heads, self.max_length = heads, max_length
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.rel_pos = nn.Parameter(self.uvqk.weight.new_empty(max_length))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.normal_(self.rel_pos, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """All positions at once.

        Raises:
            ValueError: when the history is longer than max_length.
        """
        batch, length, dim = x.shape
        if length > self.max_length:
            raise ValueError(f"a history of {length} positions is longer than max_length {self.max_length}: cut it to the latest")
        u, *vqk = F.silu(self.uvqk(x)).chunk(4, dim=-1)
        v, q, k = (part.view(batch, length, self.heads, dim // self.heads).transpose(1, 2) for part in vqk)
        causal = x.new_full((length, length), 1 / self.max_length).tril()
        # (batch, heads, length, length) is large: in place wherever the gradient does not need what was there
        weights = F.silu((q @ k.mT).add_(self._bias(length))).mul_(causal)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, dim)
        return self.out(self.norm(mixed) * u)

    def _bias(self, length: int) -> Tensor:
        """rel_pos[i - j] at (i, j), and zeros above the diagonal."""
        line = F.pad(self.rel_pos[:length].flip(0), (0, length - 1))  # distances length - 1 .. 0, then the future
        return line.unfold(0, length, 1).flip(0)


def build(model: SequenceModel, max_length: int) -> HSTU:
    """The layer with the recipe's sizes."""
    return HSTU(model.dim, model.mixer.heads, max_length)
