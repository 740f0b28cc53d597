"""The Mamba-2 mixer (arXiv 2405.21060): projection, convolution, scan, gated norm, projection.

Weights have mamba-ssm's names and layout, so its checkpoints load.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.ssm.conv import conv_silu, conv_step, last_inputs
from llmrec.ssm.heads import count_heads, group_norm
from llmrec.ssm.initial import Init, initialise, inverse_softplus, log_uniform
from llmrec.ssm.ssd import ssd, ssd_step
from llmrec.ssm.state import State, ends_of


class Mamba2(nn.Module):
    """Mamba-2 mixer, (batch, length, d_model) to the same, causal.

    Args:
        d_model: outer width.
        d_state: size of the state per channel.
        d_conv: width of the causal convolution.
        expand: inner width over outer width.
        headdim: channels per head; must divide the inner width.
        ngroups: groups of heads that share B and C.
        chunk_size: positions per block of the scan; changes the speed only.
        init: `mamba` as mamba-ssm, or `mamba4rec`: N(0, .02) for the linear layers.

    Raises:
        ValueError: when headdim does not divide the inner width, or the groups do not divide the heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        init: Init = "mamba",
    ):
        super().__init__()
        inner = expand * d_model
        heads = count_heads(d_model, expand, headdim, ngroups)
        self.heads, self.headdim, self.ngroups, self.chunk_size = heads, headdim, ngroups, chunk_size
        self.sizes = [inner, ngroups * d_state, ngroups * d_state]  # x, B, C go through the convolution together
        mixed = sum(self.sizes)
        self.in_proj = nn.Linear(d_model, inner + mixed + heads, bias=False)  # [z, xBC, dt]
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, 1e-3, 0.1)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
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
        """All positions at once.

        Args:
            u: (batch, length, d_model).
            mask: (batch, length), false at padding. Padding takes a zero step with a zero input, wherever it stands.
            seq_idx: which sequence a position belongs to where several are packed into a row, (batch, length).
            state: what precedes the first position; None is nothing.
            return_state: also return the state after the last real position.
        """
        if mask is not None:
            u = u * mask[..., None]
        z, xBC, dt = self.in_proj(u).split([self.sizes[0], sum(self.sizes), self.heads], dim=-1)
        before = None if state is None else state.conv
        x, B, C = conv_silu(xBC, self.conv1d.weight, self.conv1d.bias, self.sizes, before=before, seq_idx=seq_idx)
        dt = F.softplus(dt + self.dt_bias)
        if mask is not None:
            dt = dt * mask[..., None]
        y, ssm = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.exp(),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            self.D,
            chunk=self.chunk_size,
            state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            return_state=return_state,
        )
        out = self.out_proj(group_norm(y.flatten(2) * F.silu(z), self.norm, self.ngroups))
        if ssm is None:
            return out
        return out, State(last_inputs(xBC, self.conv1d.kernel_size[0], before, ends_of(mask), seq_idx), ssm)

    def step(self, state: State, u: Tensor) -> tuple[Tensor, State]:
        """One position more: u (batch, d_model) to the same, and the new state. The cost does not depend on the past."""
        z, xBC, dt = self.in_proj(u).split([self.sizes[0], sum(self.sizes), self.heads], dim=-1)
        mixed, conv = conv_step(xBC, self.conv1d.weight, self.conv1d.bias, state.conv)
        x, B, C = mixed.split(self.sizes, dim=-1)
        y, ssm = ssd_step(
            x.unflatten(-1, (self.heads, -1)),
            F.softplus(dt + self.dt_bias),
            -self.A_log.exp(),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            self.D,
            state.ssm,
        )
        return self.out_proj(group_norm(y.flatten(1) * F.silu(z), self.norm, self.ngroups)), State(conv, ssm)

    def initial_state(self, batch: int) -> State:
        """The state before the first position: zeros."""
        zeros = self.D.new_zeros
        return State(
            zeros(batch, self.conv1d.kernel_size[0] - 1, sum(self.sizes)),
            zeros(batch, self.heads, self.headdim, self.sizes[1] // self.ngroups),
        )
