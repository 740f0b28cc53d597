"""Depthwise convolution over the positions and SiLU, as every Mamba layer has it before its scan.

On a CPU a grouped `conv1d` is slow and whole-tensor operations are bound by memory. Here each tap is one multiply-add
over a slab small enough for the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.ssm import kernels, native, shapes

SLAB = 1 << 20  # elements worked on at a time: 4 MiB of float32


def conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    *,
    ahead: int = 0,
    before: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """silu(depthwise convolution of x), cut along the channels as by `Tensor.split`.

    Args:
        x: (batch, length, channels).
        weight: (channels, 1, width) as in `nn.Conv1d`.
        bias: (channels,) or None.
        sizes: channels of each piece returned.
        ahead: how many later positions a position sees; 0 is causal, (width - 1) // 2 symmetric.
        before: the width - 1 inputs before the first, (batch, width - 1, channels); None is zeros.
        seq_idx: which sequence a position belongs to, (batch, length); no tap reaches into another one.

    Returns:
        Pieces of (batch, length, size).

    Raises:
        ValueError: when shapes do not fit.
    """
    batch, length, channels = x.shape
    reach = weight.shape[-1] - 1
    if sum(sizes) != channels:
        raise ValueError(f"sizes {sizes} do not add up to the {channels} channels of x")
    shapes.check(x.device, weight=(weight, (channels, 1, reach + 1)), bias=(bias, (channels,)))
    shapes.check(x.device, before=(before, (batch, reach, channels)), seq_idx=(seq_idx, (batch, length)))
    if not x.numel():
        return x.split(sizes, 2)
    if kernel := kernels.conv_kernel(x, weight, bias, sizes, ahead=ahead, before=before, seq_idx=seq_idx, reference=conv_silu):
        return kernel(x, weight, bias, sizes, before=before, seq_idx=seq_idx)
    if bias is None:
        bias = x.new_zeros(channels)
    if before is not None:
        x = torch.cat([before.to(x.dtype), x], 1)
        if seq_idx is not None:  # what came before belongs to the first sequence
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, reach), seq_idx], 1)
    function = native.NativeConv if native.takes_conv(x, reach + 1, len(sizes)) else _ConvSilu
    with torch.autocast(x.device.type, enabled=False):
        pieces = function.apply(x, weight[:, 0].to(x.dtype), bias.to(x.dtype), sizes, ahead, seq_idx)
    return pieces if before is None else tuple(piece[:, reach:] for piece in pieces)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """One position of the causal `conv_silu`: x (batch, channels). Returns the same and the new `before`."""
    window = torch.cat([before, x[:, None]], 1)
    mixed = (window * weight[:, 0].t()).sum(1)
    return F.silu(mixed if bias is None else mixed + bias), window[:, 1:]


def last_inputs(x: Tensor, width: int, before: Tensor | None, ends: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
    """The last width - 1 inputs of each row, for the next call's `before`: (batch, width - 1, channels).

    Args:
        x: (batch, length, channels).
        width: of the convolution.
        before: what preceded x; None is zeros.
        ends: number of positions up to and with the last real one, (batch,); None is all.
        seq_idx: as for `conv_silu`; inputs of another sequence than the last are zeros.
    """
    batch, length, channels = x.shape
    if before is None:
        before = x.new_zeros(batch, width - 1, channels)
    if ends is None:
        x = x[:, -width:]
        seq_idx = None if seq_idx is None else seq_idx[:, -width:]
        ends = torch.full((batch,), x.shape[1], device=x.device)
    window = ends[:, None] + torch.arange(width - 1, device=x.device)  # columns of [before, x]
    rows = torch.arange(batch, device=x.device)[:, None]
    last = torch.cat([before, x], 1)[rows, window]
    if seq_idx is None or not length:
        return last
    whose = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)
    return last * (whose[rows, window] == whose[rows, (ends + width - 2)[:, None]])[..., None]


def _slabs(shape: torch.Size) -> Iterator[tuple[slice, int, int]]:
    """Rows and positions [start, end) of pieces that fit the cache."""
    batch, length, channels = shape
    rows = max(1, SLAB // (length * channels))
    span = length if rows > 1 else max(1, min(length, SLAB // channels))
    for row in range(0, batch, rows):
        for start in range(0, length, span):
            yield slice(row, row + rows), start, min(length, start + span)


def _taps(weight: Tensor, ahead: int) -> list[tuple[int, Tensor]]:
    """(shift, weight) of each tap, the unshifted one first: y_t = sum of weight * x_{t + shift}."""
    width = weight.shape[1]
    columns = weight.t().contiguous()
    return sorted(((tap - (width - 1 - ahead), columns[tap]) for tap in range(width)), key=lambda tap: abs(tap[0]))


def _shifted(x: Tensor, shift: int, rows: slice, start: int, end: int, seq_idx: Tensor | None) -> tuple[int, int, Tensor]:
    """The part [low, high) of positions [start, end) whose tap lies inside the row, and x at those taps."""
    low, high = max(start, -shift), min(end, x.shape[1] - shift)
    if low >= high:
        return low, low, x[rows, :0]
    piece = x[rows, low + shift : high + shift]
    if seq_idx is not None and shift:
        piece = piece * (seq_idx[rows, low:high] == seq_idx[rows, low + shift : high + shift])[..., None]
    return low, high, piece


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], ahead: int, seq_idx: Tensor | None
    ) -> tuple[Tensor, ...]:
        taps = _taps(weight, ahead)
        conv = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        pieces = tuple(x.new_empty(*x.shape[:2], size) for size in sizes)
        for rows, start, end in _slabs(x.shape):
            slab = conv[rows, start:end]
            torch.addcmul(bias, x[rows, start:end], taps[0][1], out=slab)
            for shift, tap in taps[1:]:
                low, high, seen = _shifted(x, shift, rows, start, end, seq_idx)
                conv[rows, low:high].addcmul_(seen, tap)
            for piece, part in zip(pieces, slab.split(sizes, 2), strict=True):
                torch.ops.aten.silu.out(part, out=piece[rows, start:end])
        ctx.save_for_backward(x, weight, conv, seq_idx)
        ctx.ahead, ctx.sizes = ahead, sizes
        return pieces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dpieces: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, conv, seq_idx = ctx.saved_tensors
        taps = _taps(weight, ctx.ahead)
        reach = weight.shape[1] - 1 - ctx.ahead
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtaps = [torch.zeros_like(tap) for _, tap in taps]
        dbias = torch.zeros_like(taps[0][1])
        for rows, start, end in _slabs(x.shape):
            first, last = max(0, start - ctx.ahead), min(x.shape[1], end + reach)  # outputs that saw this slab
            dconv = torch.empty_like(conv[rows, first:last])
            for dpiece, part, dpart in zip(dpieces, conv[rows, first:last].split(ctx.sizes, 2), dconv.split(ctx.sizes, 2), strict=True):
                torch.ops.aten.silu_backward.grad_input(dpiece[rows, first:last], part, grad_input=dpart)
            own = dconv[:, start - first : end - first]
            dbias += own.sum((0, 1))
            torch.mul(own, taps[0][1], out=dx[rows, start:end])
            dtaps[0] += (own * x[rows, start:end]).sum((0, 1))
            for (shift, tap), dtap in zip(taps[1:], dtaps[1:], strict=True):
                low, high, seen = _shifted(x, shift, rows, start, end, seq_idx)
                dtap += (dconv[:, low - first : high - first] * seen).sum((0, 1))
                low, high = max(start, shift), min(end, x.shape[1] + shift)  # x_t was seen by the output at t - shift
                if low < high:
                    back = dconv[:, low - shift - first : high - shift - first]
                    if seq_idx is not None:
                        back = back * (seq_idx[rows, low:high] == seq_idx[rows, low - shift : high - shift])[..., None]
                    dx[rows, low:high].addcmul_(back, tap)
        order = sorted(range(len(taps)), key=lambda i: taps[i][0])
        return dx, torch.stack([dtaps[i] for i in order], 1), dbias, None, None, None
