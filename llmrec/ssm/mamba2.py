"""Mamba-2 in plain torch: the selective state space computed as block matrix products (SSD).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      state  (heads, headdim, d_state)
    y_t = h_t C_t + D x_t

Dao & Gu 2024 (arXiv 2405.21060), section 6. Within a chunk the recurrence is a masked matrix product (quadratic in
the chunk, fast); between chunks only the state is carried (linear in the length). Weights have mamba-ssm's names
and layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk: int = 64, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selective state-space scan.

    Args:
        x: values, (batch, length, heads, headdim).
        dt: step sizes after softplus, (batch, length, heads). A zero step leaves the state as it is.
        A: negative decay rates, (heads,).
        B: how a value enters the state, (batch, length, groups, d_state).
        C: how the state is read, (batch, length, groups, d_state).
        chunk: positions per block; changes the speed, not the result.
        state: the state before the first step, (batch, heads, headdim, d_state); None is zero.

    Returns:
        y like x (without the D term), and the state after the last step.

    Raises:
        ValueError: when heads is not a multiple of the number of groups.
    """
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups of B and C")
    chunk = min(chunk, length)
    padding = -length % chunk  # zero steps at the end change neither outputs nor state
    if padding:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, B, C))
    blocks, per_group = (length + padding) // chunk, heads // groups

    # b batch, k block, t and s positions in a block, g group, e head in its group, p headdim, n d_state
    decay = (dt * A).view(batch, blocks, chunk, groups, per_group).permute(0, 1, 3, 4, 2).cumsum(-1)  # (b k g e t), log of the decay so far
    value = (x * dt[..., None]).view(batch, blocks, chunk, groups, per_group, headdim).permute(0, 1, 3, 4, 2, 5)  # (b k g e s p)
    B = B.view(batch, blocks, chunk, groups, d_state).transpose(2, 3)  # (b k g s n)
    C = C.view(batch, blocks, chunk, groups, d_state).transpose(2, 3)  # (b k g t n)

    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()  # (b k g e t s)
    y = ((C @ B.transpose(-1, -2))[:, :, :, None] * between) @ value  # (b k g e t p)

    to_end = (decay[..., -1:] - decay).exp()  # what is left of step s at the block's end
    added = (value * to_end[..., None]).transpose(-1, -2) @ B[:, :, :, None]  # (b k g e p n)
    kept = decay[..., -1].exp()[..., None, None]
    carried = (
        x.new_zeros(batch, groups, per_group, headdim, d_state) if state is None else state.view(batch, groups, per_group, headdim, d_state)
    )
    before = []
    for k in range(blocks):
        before.append(carried)
        carried = kept[:, k] * carried + added[:, k]
    if blocks > 1 or state is not None:
        from_before = C[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)  # (b k g e t p)
        y = y + from_before * decay.exp()[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + padding, heads, headdim)[:, :length]
    return y, carried.reshape(batch, heads, headdim, d_state)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution over the past: (batch, length, channels) with weight (channels, 1, width) and bias (channels,).

    A sum of shifted products: on CPU several times faster than a grouped `conv1d` for the usual width of 4.
    """
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = [padded[:, tap : tap + x.shape[1]] * weight[:, 0, tap] for tap in range(width)]
    return torch.stack(taps).sum(0) + bias if width > 4 else sum(taps[1:], taps[0]) + bias


class Mamba2(nn.Module):
    """Mamba-2 mixer, (batch, length, d_model) to the same.

    Args:
        d_model: outer width.
        d_state: size of the state per channel.
        d_conv: width of the causal convolution.
        expand: inner width over outer width.
        headdim: channels per head; must divide the inner width.
        ngroups: groups of heads that share B and C.
        chunk_size: positions per block of the scan.

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
    ):
        super().__init__()
        inner = expand * d_model
        if inner % headdim:
            raise ValueError(f"headdim {headdim} does not divide the inner width {inner} (expand {expand} x d_model {d_model})")
        heads = inner // headdim
        if heads % ngroups:
            raise ValueError(f"{heads} heads cannot share {ngroups} groups")
        self.d_inner, self.heads, self.headdim, self.ngroups, self.d_state, self.chunk_size = (
            inner,
            heads,
            headdim,
            ngroups,
            d_state,
            chunk_size,
        )
        mixed = inner + 2 * ngroups * d_state  # x, B, C go through the convolution together
        self.in_proj = nn.Linear(d_model, inner + mixed + heads, bias=False)  # [z, xBC, dt]
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv - 1)
        step = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))  # log-uniform in [1e-3, 1e-1]
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        batch, length, _ = u.shape
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv1d.in_channels, self.heads], dim=-1)
        assert self.conv1d.bias is not None
        xBC = F.silu(causal_conv(xBC, self.conv1d.weight, self.conv1d.bias))
        x, B, C = xBC.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], dim=-1)
        x = x.reshape(batch, length, self.heads, self.headdim)
        B, C = (t.reshape(batch, length, self.ngroups, self.d_state) for t in (B, C))
        dt = F.softplus(dt + self.dt_bias)
        y, _ = ssd(x, dt, -self.A_log.exp(), B, C, chunk=self.chunk_size)
        y = (y + self.D[:, None] * x).reshape(batch, length, self.d_inner)
        return self.out_proj(self.norm(y * F.silu(z)))
