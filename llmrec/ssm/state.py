"""What a causal layer remembers between calls, and the padding mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class State(NamedTuple):
    """Everything a Mamba layer knows of the past; its size does not depend on the length.

    Attributes:
        conv: the last inputs of the convolution, (batch, d_conv - 1, channels).
        ssm: the state of the scan, (batch, heads, headdim, d_state), Mamba-1 (batch, channels, d_state).
    """

    conv: Tensor
    ssm: Tensor


def ends_of(mask: Tensor | None) -> Tensor | None:
    """The number of positions up to and with the last real one, (batch,), from a (batch, length) mask."""
    if mask is None:
        return None
    real = F.pad(mask.bool(), (1, 0))  # before the first position stands nothing
    return (real * torch.arange(real.shape[1], device=mask.device)).amax(1)
