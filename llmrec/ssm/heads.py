"""What the layers with heads, Mamba-2 and Hydra, have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def count_heads(d_model: int, expand: int, headdim: int, ngroups: int) -> int:
    """Heads of the inner width expand * d_model.

    Raises:
        ValueError: when headdim does not divide the inner width, or the groups do not divide the heads.
    """
    inner = expand * d_model
    if inner % headdim:
        raise ValueError(f"headdim {headdim} does not divide the inner width {inner} (expand {expand} x d_model {d_model})")
    heads = inner // headdim
    if heads % ngroups:
        raise ValueError(f"{heads} heads cannot share {ngroups} groups")
    return heads


def group_norm(y: Tensor, norm: nn.RMSNorm, ngroups: int) -> Tensor:
    """RMS norm of y (..., inner) within each group of heads, with the weights of `norm`."""
    if ngroups == 1:
        return norm(y)
    y = y.unflatten(-1, (ngroups, -1))
    return F.rms_norm(y, y.shape[-1:], eps=norm.eps).flatten(-2) * norm.weight
