"""The scan of Mamba-1, with a decay of its own for every channel and state.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        state  (channels, d_state)
    y_t = h_t C_t + D x_t

Gu & Dao 2023 (arXiv 2312.00752), section 3. No matrix product does it, and whole-tensor operations on (batch, length,
channels, d_state) would be bound by memory. So the sequence is walked in segments that fit the cache: one fused
multiply-add per position, everything else at once for the segment. Of the states only each segment's first is kept;
the backward pass makes the others again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.ssm import kernels, native, shapes

SEGMENT = 1 << 19  # entries of the states of a segment: 2 MiB of float32


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan.

    Args:
        x: values, (batch, length, channels).
        dt: step sizes after softplus, like x. A zero step leaves the state as it is.
        A: negative decay rates, (channels, d_state).
        B: how a value enters the state, (batch, length, d_state).
        C: how the state is read, (batch, length, d_state).
        D: what of x goes straight into y, (channels,); None is nothing.
        state: the state before the first step, (batch, channels, d_state); None is zero.
        seq_idx: the sequence each position belongs to where several are packed into a row, (batch, length) integers,
            each number in one stretch. Nothing passes from one to the next: `state` precedes the first, the state
            returned is the last one's.
        return_state: whether the state after the last step is wanted.

    Returns:
        y like x, and the state after the last step, None if not asked for. Half precision is computed in float32.

    Raises:
        ValueError: when shapes do not fit.
    """
    batch, length, channels = x.shape
    read = (batch, length, A.shape[-1])
    shapes.check(x.device, dt=(dt, (batch, length, channels)), A=(A, (channels, A.shape[-1])), B=(B, read), C=(C, read), D=(D, (channels,)))
    shapes.check(x.device, state=(state, (batch, *A.shape)), seq_idx=(seq_idx, (batch, length)))
    if kernel := kernels.selective_scan_kernel(x, A, D, state=state, seq_idx=seq_idx, return_state=return_state, reference=selective_scan):
        return kernel(x, dt, A, B, C, D, return_state=return_state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x_, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        D = A.new_zeros(len(A)) if D is None else D.to(dtype)
        start = x_.new_zeros(x.shape[0], *A.shape) if state is None else state.to(dtype)
        if not x.numel():
            y, end = x_, start
        elif native.takes_scan(x_, A.shape[1]):  # there a channel is a head of width one
            y, end = native.NativeScan.apply(x_[..., None], dt, A, B[:, :, None], C[:, :, None], D, start[:, :, None], seq_idx)
            y, end = y[..., 0], end[:, :, 0]
        else:
            y, end = _SelectiveScan.apply(x_, dt, A, B, C, D, start, seq_idx)
    return y.to(x.dtype), end if return_state else None


def selective_scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of `selective_scan`: the same tensors without their length. Returns y (batch, channels) and the new state."""
    state = state * (dt[..., None] * A).exp() + (dt * x)[..., None] * B[:, None]
    return (state @ C[..., None])[..., 0] + D * x, state


def _segments(length: int, entries: int) -> Iterator[slice]:
    """Positions worked on at a time, where a state has that many entries."""
    size = max(1, SEGMENT // entries)
    return (slice(start, min(length, start + size)) for start in range(0, length, size))


class _SelectiveScan(torch.autograd.Function):
    """Inside, the length comes first: (length, batch, channels), so that a position is contiguous."""

    @staticmethod
    def _decay(dt: Tensor, A: Tensor, seq_idx: Tensor | None, part: slice) -> Tensor:
        """exp(dt A) of a segment, (length, batch, channels, d_state); zero where another sequence begins."""
        decay = (dt[part, :, :, None] * A).exp_()
        if seq_idx is not None:
            before = torch.cat([seq_idx[:, :1], seq_idx[:, :-1]], 1)
            decay *= (seq_idx == before).t()[part, :, None, None]
        return decay

    @staticmethod
    def _states(decay: Tensor, v: Tensor, B: Tensor, state: Tensor) -> Tensor:
        """The state after each position of a segment, (length, batch, channels, d_state)."""
        states = v[..., None] * B[:, :, None]
        for now, kept in zip(states, decay, strict=True):
            state = now.addcmul_(kept, state)
        return states

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        steps, v = dt.transpose(0, 1).contiguous(), (dt * x).transpose(0, 1).contiguous()
        B_, C_ = B.transpose(0, 1), C.transpose(0, 1)
        y = torch.empty_like(v)
        starts = []
        for part in _segments(len(v), state.numel()):
            starts.append(state)
            states = _SelectiveScan._states(_SelectiveScan._decay(steps, A, seq_idx, part), v[part], B_[part], state)
            y[part] = (states @ C_[part, :, :, None])[..., 0]
            state = states[-1].clone()
        y = y.transpose(0, 1) + D * x
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, *starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _SelectiveScan._gradients(ctx, dy, dstate)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, seq_idx, *starts = ctx.saved_tensors
        steps, v, dy_ = (t.transpose(0, 1).contiguous() for t in (dt, dt * x, dy))
        B_, C_ = B.transpose(0, 1), C.transpose(0, 1)
        dv, ddt, dB, dC = torch.empty_like(v), torch.empty_like(v), torch.empty_like(B_), torch.empty_like(C_)
        dA = torch.zeros_like(starts[0])
        parts = list(_segments(len(v), dA.numel()))
        for part, start in zip(reversed(parts), reversed(starts), strict=True):
            decay = _SelectiveScan._decay(steps, A, seq_idx, part)
            states = _SelectiveScan._states(decay, v[part], B_[part], start)
            dC[part] = (dy_[part, :, None] @ states)[:, :, 0]
            dstates = dy_[part, ..., None] * C_[part, :, None]  # what y says; then, in place, all that later positions say
            dstates[-1] += dstate
            for k in range(len(dstates) - 1, 0, -1):
                dstates[k - 1].addcmul_(decay[k], dstates[k])
            dB[part] = (v[part, :, None] @ dstates)[:, :, 0]
            dv[part] = (dstates @ B_[part, :, :, None])[..., 0]
            passed = dstates.mul_(decay)  # to the state before
            dstate = passed[0].clone()
            passed[1:] *= states[:-1]
            passed[0] *= start  # dL/d(dt A)
            ddt[part] = (passed * A).sum(-1)
            dA += (passed * steps[part, ..., None]).sum(0)
        dv, ddt, dB, dC = (t.transpose(0, 1) for t in (dv, ddt, dB, dC))
        return dt * dv + D * dy, ddt + x * dv, dA.sum(0), dB, dC, (x * dy).sum((0, 1)), dstate, None
