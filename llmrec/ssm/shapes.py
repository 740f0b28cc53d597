"""Arguments of the scans and the convolution are checked: their CPU kernels read what they are told is there."""

from __future__ import annotations

import torch
from torch import Tensor


def check(device: torch.device, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor that has not the shape beside it, or is on another device; None passes."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the values on {device}")
