"""The scan of Mamba-2: the selective state space computed as block matrix products (SSD).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      state  (heads, headdim, d_state)
    y_t = h_t C_t + D x_t

Dao & Gu 2024 (arXiv 2405.21060), section 6. Within a chunk the recurrence is a masked matrix product (quadratic in
the chunk, fast); between chunks only the state is carried (linear in the length). Two identities make it cheap on a
CPU:

* With a_t the log decay up to t, exp(a_t - a_s) = exp(a_t - m) exp(m - a_s) for any m. The factors go into y and x,
  so that one masked product C B^T serves all heads of a group, with no decay matrix per head. A chunk must not decay
  beyond the floating-point range for that; m in its middle doubles the range, a shorter chunk does the rest.
* No gradient of a decay matrix either: the pair s <= t passes the steps s < u <= t, therefore, with v = dt x,
  dL/d(dt_u A) = sum over t >= u of (y_t dy_t - v_t dv_t). It is exact to the rounding of these terms, so where one
  step forgets everything (|dt A| in the hundreds) and the true gradient vanishes, what is left is that rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrec.ssm import kernels, native, shapes


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk: int = 64,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Selective state-space scan.

    Args:
        x: values, (batch, length, heads, headdim).
        dt: step sizes after softplus, (batch, length, heads). A zero step leaves the state as it is.
        A: negative decay rates, (heads,).
        B: how a value enters the state, (batch, length, groups, d_state).
        C: how the state is read, (batch, length, groups, d_state).
        D: what of x goes straight into y, (heads,); None is nothing.
        chunk: positions per block at most; changes the speed, not the result.
        state: the state before the first step, (batch, heads, headdim, d_state); None is zero.
        seq_idx: the sequence each position belongs to where several are packed into a row, (batch, length) integers,
            each number in one stretch. Nothing passes from one to the next: `state` precedes the first, the state
            returned is the last one's.
        return_state: False saves the work of the last chunk's state.

    Returns:
        y like x, and the state after the last step, None if not asked for. Half precision is computed in float32.

    Raises:
        ValueError: when heads is not a multiple of the number of groups, or shapes do not fit.
    """
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups of B and C")
    per_group = (batch, length, groups, d_state)
    shapes.check(x.device, dt=(dt, (batch, length, heads)), A=(A, (heads,)), B=(B, per_group), C=(C, per_group), D=(D, (heads,)))
    shapes.check(x.device, state=(state, (batch, heads, headdim, d_state)), seq_idx=(seq_idx, (batch, length)))
    if not x.numel():
        state = x.new_zeros(batch, *x.shape[2:], B.shape[3]) if state is None else state
        return x, state if return_state else None
    if kernel := kernels.ssd_kernel(x, B, D, chunk=chunk, state=state, seq_idx=seq_idx, reference=ssd):
        return kernel(x, dt, A, B, C, D, chunk=chunk, state=state, seq_idx=seq_idx, return_state=return_state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x_, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        D = A.new_zeros(heads) if D is None else D.to(dtype)
        state = None if state is None else state.to(dtype)
        if native.takes_scan(x_, B.shape[3]):
            y, end = native.NativeScan.apply(x_, dt, A, B, C, D, state, seq_idx)
        else:
            y, end = _in_blocks(x_, dt, A, B, C, D, state, seq_idx, chunk, return_state)
    return y.to(x.dtype), end if return_state else None


def _in_blocks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The scan as matrix products, the length brought to whole blocks."""
    length = x.shape[1]
    chunk = _chunk_that_fits((dt * A).detach(), chunk)
    padding = -length % chunk  # zero steps at the end change neither outputs nor state
    if padding:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, B, C))
        seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], 1)
    y, end = _SSD.apply(x, dt, A, B, C, D, state, seq_idx, chunk, return_state)
    return y[:, :length], end


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of `ssd`: the same tensors without their length. Returns y (batch, heads, headdim) and the new state."""
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads_per_group, dim=1) for t in (B, C))  # (batch, heads, d_state)
    state = state * (dt * A).exp()[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
    return (state @ C[..., None])[..., 0] + D[:, None] * x, state


def _chunk_that_fits(decay: Tensor, chunk: int) -> int:
    """Positions per block, at most `chunk`, such that no block's log decay (batch, length, heads) leaves the range.

    A divisor of the length where there is one not much smaller: padding copies.
    """
    length = decay.shape[1]
    span = 1.1 * math.log(torch.finfo(decay.dtype).max)  # half of it each side of the middle, and room for the values
    total = decay.cumsum(1)
    chunk = min(chunk, length)
    while chunk > 1 and float((total[:, : length - chunk + 1] - total[:, chunk - 1 :]).max()) > span:
        chunk = (chunk + 1) // 2
    return next((size for size in range(chunk, chunk // 2, -1) if length % size == 0), chunk)


class _Blocks:
    """The inputs cut into blocks, the decay within a block in its two factors.

    Letters in the shapes: b batch, k block, g group, t and s positions in a block, e head in its group, p headdim,
    n d_state. Matrices have one batch dimension, bkg; with one group they are views of the inputs.
    """

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None, chunk: int):
        self.chunk, self.groups = chunk, B.shape[2]
        self.dt = dt.unflatten(1, (-1, chunk))  # (b k t ge)
        total = (self.dt * A).cumsum(2)  # the log of the decay so far
        middle = (total[:, :, :1] + total[:, :, -1:]) / 2
        self.rise, self.fall = (total - middle).exp_(), (middle - total).exp_()
        self.B, self.C = self.matrices(B), self.matrices(C)  # (bkg t n)
        self.v = self.scaled(x, self.fall * self.dt)  # (bkg s ep)

        # factors of the rows of a state, (b k gep 1): from a block's start to its middle, from there to its end, and
        # from its middle to the next one's (to the end, for the last)
        rows = x.shape[3]
        self.into, self.out = (t.exp().transpose(2, 3).repeat_interleave(rows, 2) for t in (middle, total[:, :, -1:] - middle))
        self.across = self.out.clone()
        self.across[:, :-1] *= self.into[:, 1:]

        self.same: Tensor | None = None
        self.reads: Tensor | None = None
        self.adds: Tensor | None = None
        self.whole: Tensor | None = None
        if seq_idx is not None:
            self._keep_apart(seq_idx.unflatten(1, (-1, chunk)))

    def _keep_apart(self, seq_idx: Tensor) -> None:
        """Masks for several sequences in a row; seq_idx is (b k t)."""
        ends = seq_idx[:, :, -1:]
        previous = torch.cat([seq_idx[:, :1, :1], ends[:, :-1]], 1)

        def per_group(mask: Tensor) -> Tensor:
            return mask[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(0, 2)

        self.same = per_group(seq_idx[..., :, None] == seq_idx[..., None, :])  # (bkg t s)
        self.reads = per_group((seq_idx == previous)[..., None])  # (bkg t 1): who sees the state entering the block
        self.adds = per_group((seq_idx == ends)[..., None])  # (bkg s 1): whom the state leaving it has seen
        self.whole = (previous == ends)[..., None]  # (b k 1 1): whether the former reaches the latter

    def matrices(self, t: Tensor) -> Tensor:
        """(b, length, g, m) -> (bkg t m)."""
        return t.unflatten(1, (-1, self.chunk)).transpose(2, 3).flatten(0, 2)

    def positions(self, t: Tensor) -> Tensor:
        """(bkg t m) -> (b, length, g, m)."""
        return t.unflatten(0, (*self.dt.shape[:2], self.groups)).transpose(2, 3).flatten(1, 2)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """(b, length, ge, p) times (b k t ge), as matrices (bkg t ep)."""
        return self.matrices((x * factor.flatten(1, 2)[..., None]).flatten(2).unflatten(2, (self.groups, -1)))

    def heads(self, t: Tensor) -> Tensor:
        """(bkg t ep) -> (b, length, ge, p)."""
        return self.positions(t).flatten(2).unflatten(2, (self.dt.shape[3], -1))

    def past(self, scores: Tensor) -> Tensor:
        """(bkg t s) with zeros where t may not see s, in place."""
        scores = scores.tril_()
        return scores if self.same is None else scores.mul_(self.same)


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor | None,
        seq_idx: Tensor | None,
        chunk: int,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _Blocks(x, dt, A, B, C, seq_idx, chunk)
        scores = blocks.past(torch.bmm(blocks.C, blocks.B.mT))
        y = torch.bmm(scores, blocks.v)
        entering = end = None  # (b k gep n): the state that enters each block, taken to the block's middle
        if state is not None or return_state or dt.shape[1] > chunk:
            added = torch.bmm(_masked(blocks.v, blocks.adds).mT, blocks.B).view(*blocks.into.shape[:3], -1)
            entering = torch.empty_like(added)
            entering[:, 0] = 0 if state is None else state.flatten(1, 2) * blocks.into[:, 0]
            last = added.shape[1] - 1
            for k in range(last + 1):
                leaving = added[:, k].add_(_masked(entering[:, k], None if blocks.whole is None else blocks.whole[:, k]))
                if k < last:
                    torch.mul(leaving, blocks.across[:, k], out=entering[:, k + 1])
            end = (leaving * blocks.across[:, last]).view(len(x), *x.shape[2:], -1) if return_state else None
            y.baddbmm_(_masked(blocks.C, blocks.reads), entering.view(len(y), -1, B.shape[3]).mT)
        y = (blocks.heads(y) * blocks.rise.flatten(1, 2)[..., None]).addcmul_(x, D[:, None])
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, scores, entering, end, y)
        ctx.chunk, ctx.has_state = chunk, state is not None
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.autocast(saved[0].device.type, enabled=False):
            return _SSD._gradients(ctx, saved, dy, dend)

    @staticmethod
    def _gradients(ctx: Any, saved: tuple[Tensor, ...], dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, seq_idx, scores, entering, end, y = saved
        dy = torch.zeros_like(y) if dy is None else dy
        blocks = _Blocks(x, dt, A, B, C, seq_idx, ctx.chunk)
        dy_ = blocks.scaled(dy, blocks.rise)
        dscores = blocks.past(torch.bmm(dy_, blocks.v.mT))
        dB, dC = torch.bmm(dscores.mT, blocks.C), torch.bmm(dscores, blocks.B)
        dv = torch.bmm(scores.mT, dy_)

        dstate = None
        meets = x.new_zeros(())  # <h, dh> at the end of each block
        if entering is not None:
            dy_in, v_out = _masked(dy_, blocks.reads), _masked(blocks.v, blocks.adds)
            dentering = torch.bmm(dy_in.mT, blocks.C).view(entering.shape)
            dadded = torch.empty_like(entering)
            last = entering.shape[1] - 1
            dadded[:, last] = 0 if dend is None else dend.flatten(1, 2) * blocks.across[:, last]
            meets = x.new_zeros(entering.shape[:3])  # (b k gep)
            for k in range(last, -1, -1):
                if k < last:
                    torch.mul(dentering[:, k + 1], blocks.across[:, k], out=dadded[:, k])
                    meets[:, k] = (entering[:, k + 1] * dentering[:, k + 1]).sum(-1)
                dentering[:, k] += _masked(dadded[:, k], None if blocks.whole is None else blocks.whole[:, k])
            if dend is not None:
                meets[:, last] = (end * dend).sum(-1).flatten(1)
            if ctx.has_state:
                dstate = (dentering[:, 0] * blocks.into[:, 0]).view(len(x), *x.shape[2:], -1)
            dadded, entering = dadded.view(len(dv), -1, B.shape[3]), entering.view(len(dv), -1, B.shape[3])
            dv.baddbmm_(_masked(blocks.B, blocks.adds), dadded.mT)
            dB.baddbmm_(v_out, dadded)
            dC.baddbmm_(dy_in, entering)
            meets = meets.unflatten(2, (-1, x.shape[3])).sum(-1)[:, :, None]  # (b k 1 ge)

        dv = blocks.heads(dv)
        to_dt = (dv * x).sum(-1).unflatten(1, (-1, ctx.chunk)) * blocks.fall
        dx = (dv * (blocks.fall * blocks.dt).flatten(1, 2)[..., None]).addcmul_(dy, D[:, None])
        seen = (y * dy).addcmul_(x, dx, value=-1).sum(-1).unflatten(1, (-1, ctx.chunk))  # y dy - v dv: the D terms cancel
        so_far = seen.cumsum(2)
        passed = so_far[:, :, -1:] - so_far + seen + meets  # dL/d(dt A); exactly zero where no later y has a gradient
        ddt = (to_dt + passed * A).flatten(1, 2)
        dA = (passed * blocks.dt).sum((0, 1, 2))
        dD = (x * dy).sum((0, 1)).sum(-1)
        return dx, ddt, dA, blocks.positions(dB), blocks.positions(dC), dD, dstate, None, None, None
