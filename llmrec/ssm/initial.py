"""How the weights of state-space layers start, where public codes differ."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["mamba", "mamba4rec"]


def initialise(layer: nn.Module, init: Init) -> None:
    """Leaves mamba-ssm's start as it is, or makes it Mamba4Rec's.

    Mamba4Rec sets every linear weight to N(0, .02) and every linear bias to zero. In a Mamba-1 layer that wipes out the
    bias of `dt_proj` too: steps start at softplus(0) = .69 and not in [1e-3, .1]. Mamba-2's `dt_bias` is a parameter of
    its own and survives.

    Raises:
        ValueError: for another name.
    """
    if init not in ("mamba", "mamba4rec"):
        raise ValueError(f"init is 'mamba' or 'mamba4rec', not {init!r}")
    if init == "mamba4rec":
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def log_uniform(count: int, low: float, high: float) -> Tensor:
    """Random step sizes, uniform in their logarithm."""
    return torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low))


def inverse_softplus(step: Tensor) -> Tensor:
    """The b with softplus(b) = step."""
    return step + torch.log(-torch.expm1(-step))
