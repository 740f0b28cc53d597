"""The feed-forward layer after a mixer, in the papers' versions. Residual, dropout and norms are the skeleton's.

Mamba4Rec and LRURec also have dropout after the activation. Here as in RecBole's SASRec there is none: at four times the
width it would draw more random numbers than the rest of the model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.ssm.initial import initialise


class FeedForward(nn.Module):
    """`W2 act(W1 x + b1) + b2` with W1 (inner, dim) and W2 (dim, inner) (arXiv 2408.05606, section 3.3, its shapes put right)."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.up = nn.Linear(model.dim, model.inner)
        self.down = nn.Linear(model.inner, model.dim)
        self.activation = F.gelu if model.feed_forward == "gelu" else F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)`, no biases (arXiv 2002.05202): the usual reading of arXiv 2504.07398, equation 11."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.gate = nn.Linear(model.dim, model.inner, bias=False)
        self.up = nn.Linear(model.dim, model.inner, bias=False)
        self.down = nn.Linear(model.inner, model.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Gated(nn.Module):
    """`(silu(x W_gate) * x) W_up W_down`, all of them dim x dim, no biases: arXiv 2504.07398, equation 11, as it stands there."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.gate = nn.Linear(model.dim, model.dim, bias=False)
        self.up = nn.Linear(model.dim, model.dim, bias=False)
        self.down = nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(F.silu(self.gate(x)) * x))


def build(model: SequenceModel) -> nn.Module | None:
    """The layer that the recipe names, its weights from N(0, .02) as in RecBole and Mamba4Rec; None for `none`."""
    kinds = {"gelu": FeedForward, "relu": FeedForward, "swiglu": SwiGLU, "gated": Gated}
    if model.feed_forward == "none":
        return None
    layer = kinds[model.feed_forward](model)
    initialise(layer, "mamba4rec")
    return layer
