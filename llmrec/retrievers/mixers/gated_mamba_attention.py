"""Mamba and self-attention side by side, blended by a gate: the mixer of MoEMaTrRec.

    g = sigmoid(Linear(mean of x))
    y = g mamba(x) + (1 - g) attention(x)

Public code: alokamgnaneswarasai/MambaRec, class SASmambaRec. There the mean is over the whole sequence and the attention has
no causal mask, so that in training every position sees the item it has to predict; its attention also has a residual and a
LayerNorm of its own, which here stand in the skeleton, around both. Here position t takes the mean up to t and attends to
the past, unless `legacy_leak` asks for the original.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.retrievers.mixers.attention import Attention
from llmrec.ssm import Mamba
from llmrec.ssm.initial import initialise

CAUSAL = True
STEPS = False


class GatedMambaAttention(nn.Module):
    """The gated blend, (batch, length, dim) to the same.

    Args:
        mamba: the one branch, of width dim.
        dim: width; a multiple of heads.
        heads: of the attention, the other branch.
        dropout: on the attention weights.
        legacy_leak: every position sees the whole history, as in the public code.

    Raises:
        UserError: when dim is not a multiple of heads.
    """

    def __init__(self, mamba: Mamba, dim: int, heads: int, dropout: float, legacy_leak: bool = False):
        super().__init__()
        self.mamba = mamba
        self.attention = Attention(dim, heads, dropout, causal=not legacy_leak)
        self.gate = nn.Linear(dim, 1)
        initialise(self.gate, "mamba4rec")
        self.legacy_leak = legacy_leak

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """All positions at once.

        Args:
            x: (batch, length, dim), padding on the right.
            mask: (batch, length), false at padding; None is all real. Only legacy_leak looks at it: elsewhere no real position
                sees padding.
        """
        if self.legacy_leak:
            mean, attended = mean_of_real(x, mask), self.attention(x, mask)
        else:
            mean, attended = running_mean(x), self.attention(x)
        g = torch.sigmoid(self.gate(mean))
        return g * self.mamba(x) + (1 - g) * attended


def running_mean(x: Tensor) -> Tensor:
    """Position t has the mean of positions up to t: (batch, length, dim) to the same."""
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return x.cumsum(1) / count[:, None]


def mean_of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of all positions but padding: (batch, length, dim) to (batch, 1, dim)."""
    if mask is None:
        return x.mean(1, keepdim=True)
    return (x * mask[..., None]).sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]  # a row may be all padding


def build(model: SequenceModel, max_length: int) -> GatedMambaAttention:
    """The layer with the recipe's sizes."""
    mixer = model.mixer
    mamba = Mamba(model.dim, mixer.d_state, mixer.d_conv, mixer.expand, init=mixer.init)
    return GatedMambaAttention(mamba, model.dim, mixer.heads, mixer.dropout, mixer.legacy_leak)
