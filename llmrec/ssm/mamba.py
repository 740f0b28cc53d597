"""The Mamba-1 mixer (arXiv 2312.00752): projection, convolution, selective scan, gate, projection.

Weights have mamba-ssm's names and layout, so its checkpoints load.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.ssm.conv import conv_silu, conv_step, last_inputs
from llmrec.ssm.initial import Init, initialise, inverse_softplus, log_uniform
from llmrec.ssm.scan import selective_scan, selective_scan_step
from llmrec.ssm.state import State, ends_of


class Mamba(nn.Module):
    """Mamba-1 mixer, (batch, length, d_model) to the same, causal.

    Args:
        d_model: outer width.
        d_state: size of the state per channel.
        d_conv: width of the causal convolution.
        expand: inner width over outer width.
        dt_rank: width through which the step sizes are projected; None is d_model / 16, rounded up.
        init: `mamba` as mamba-ssm, or `mamba4rec`: N(0, .02) for the linear layers, steps that start at softplus(0).
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None, init: Init = "mamba"):
        super().__init__()
        inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.sizes = [rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)  # [x, z]
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)  # [dt, B, C]
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(log_uniform(inner, 1e-3, 0.1).clamp(min=1e-4)))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        initialise(self, init)

    @overload
    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: State | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: State | None = None,
        *,
        return_state: Literal[True],
    ) -> tuple[Tensor, State]: ...

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """All positions at once; the arguments are those of `Mamba2.forward`."""
        if mask is not None:
            u = u * mask[..., None]
        projected, z = self.in_proj(u).chunk(2, dim=-1)
        before = None if state is None else state.conv
        (x,) = conv_silu(projected, self.conv1d.weight, self.conv1d.bias, [len(self.D)], before=before, seq_idx=seq_idx)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        if mask is not None:
            dt = dt * mask[..., None]
        y, ssm = selective_scan(
            x,
            dt,
            -self.A_log.exp(),
            B,
            C,
            self.D,
            state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            return_state=return_state,
        )
        out = self.out_proj(y * F.silu(z))
        if ssm is None:
            return out
        return out, State(last_inputs(projected, self.conv1d.kernel_size[0], before, ends_of(mask), seq_idx), ssm)

    def step(self, state: State, u: Tensor) -> tuple[Tensor, State]:
        """One position more: u (batch, d_model) to the same, and the new state. The cost does not depend on the past."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = conv_step(x, self.conv1d.weight, self.conv1d.bias, state.conv)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        y, ssm = selective_scan_step(x, F.softplus(self.dt_proj(dt)), -self.A_log.exp(), B, C, self.D, state.ssm)
        return self.out_proj(y * F.silu(z)), State(conv, ssm)

    def initial_state(self, batch: int) -> State:
        """The state before the first position: zeros."""
        return State(self.D.new_zeros(batch, self.conv1d.kernel_size[0] - 1, len(self.D)), self.D.new_zeros(batch, *self.A_log.shape))
