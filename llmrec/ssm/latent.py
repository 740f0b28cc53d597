"""Multi-head latent Mamba (arXiv 2504.07398, section 4.2.1): small Mamba-2 layers side by side, gated by the item.

    X = split(silu(W_X H))              one piece of width d_c per head                      (eq. 5)
    Z = RoPE(silu(W_Z H))               what the item itself says, turned by its position    (eq. 6)
    Y = concat(Mamba-2_i(X_i))          what the history says, head by head                  (eq. 7, 8)
    out = W_out (Y * Z / sqrt(heads))   without the residual, which belongs to the block     (eq. 9)

The paper calls its model Hydra; it has nothing to do with the bidirectional mixer of that name. Where it is silent:
RoPE turns each head's channels apart from the others', in Llama's pairs and with Llama's base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.ssm.initial import Init, initialise
from llmrec.ssm.mamba2 import Mamba2
from llmrec.ssm.state import State, ends_of


class LatentState(NamedTuple):
    """Everything a `LatentMamba` knows of the past; its size does not depend on the length.

    Attributes:
        heads: the state of each head's Mamba-2.
        position: the number of positions seen, (batch,) integers: RoPE continues there.
    """

    heads: tuple[State, ...]
    position: Tensor


class LatentMamba(nn.Module):
    """Multi-head latent Mamba, (batch, length, d_model) to the same, causal.

    Args:
        d_model: outer width.
        n_heads: number of Mamba-2 layers, each with weights of its own.
        d_latent: width of each, even; None is a quarter of d_model.
        d_state: size of the state per channel.
        d_conv: width of the causal convolution.
        expand: inner width of a head over d_latent.
        headdim: channels of a head that share a step size; must divide its inner width. None is the largest power of
            two that does, at most 64.
        chunk_size: positions per block of the scan; changes the speed only.
        rope_base: the slowest pair of channels turns by almost 1 / rope_base a position.
        init: `mamba` as mamba-ssm, or `mamba4rec`: N(0, .02) for the linear layers.

    Raises:
        ValueError: when there is no head, d_latent is not even and positive, or headdim does not divide the inner width.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        d_latent: int | None = None,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        chunk_size: int = 64,
        rope_base: float = 10000.0,
        init: Init = "mamba",
    ):
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads must be 1 or more, not {n_heads}")
        if d_latent is None:
            d_latent = d_model // 4
        if d_latent < 2 or d_latent % 2:
            raise ValueError(f"d_latent must be even and positive, not {d_latent}: RoPE turns pairs of channels (None takes d_model // 4)")
        if headdim is None:
            headdim = next(size for size in (64, 32, 16, 8, 4, 2, 1) if expand * d_latent % size == 0)
        self.n_heads, self.rope_base = n_heads, rope_base
        self.in_proj = nn.Linear(d_model, 2 * n_heads * d_latent, bias=False)  # [W_X, W_Z]
        heads = nn.ModuleList(Mamba2(d_latent, d_state, d_conv, expand, headdim, chunk_size=chunk_size) for _ in range(n_heads))
        self.heads: Iterable[Mamba2] = heads  # type: ignore[assignment]  # a ModuleList does not say of what
        self.out_proj = nn.Linear(n_heads * d_latent, d_model, bias=False)
        initialise(self, init)

    @overload
    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LatentState | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LatentState | None = None,
        *,
        return_state: Literal[True],
    ) -> tuple[Tensor, LatentState]: ...

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LatentState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LatentState]:
        """All positions at once.

        Args:
            u: (batch, length, d_model).
            mask: (batch, length), false at padding, which belongs on the right: the scans skip it wherever it stands,
                but RoPE counts columns, so that padding before an item moves the item.
            seq_idx: which sequence a position belongs to where several are packed into a row, (batch, length).
                RoPE starts again with each.
            state: what precedes the first position; None is nothing.
            return_state: also return the state after the last real position.
        """
        start = u.new_zeros(len(u), dtype=torch.long) if state is None else state.position
        position = _positions(start, u.shape[1], seq_idx)
        x, z = F.silu(self.in_proj(u)).chunk(2, dim=-1)
        before = (None,) * self.n_heads if state is None else state.heads
        pieces = zip(self.heads, x.chunk(self.n_heads, dim=-1), before, strict=True)
        if not return_state:
            return self._interact([head(piece, mask, seq_idx, past) for head, piece, past in pieces], z, position)
        y, states = zip(*(head(piece, mask, seq_idx, past, return_state=True) for head, piece, past in pieces), strict=True)
        ends = ends_of(mask)
        seen = torch.cat([start[:, None], position + 1], 1)
        seen = seen[:, -1] if ends is None else seen.gather(1, ends[:, None])[:, 0]
        return self._interact(y, z, position), LatentState(states, seen)

    def step(self, state: LatentState, u: Tensor) -> tuple[Tensor, LatentState]:
        """One position more: u (batch, d_model) to the same, and the new state. The cost does not depend on the past."""
        x, z = F.silu(self.in_proj(u)).chunk(2, dim=-1)
        pieces = zip(self.heads, state.heads, x.chunk(self.n_heads, dim=-1), strict=True)
        y, states = zip(*(head.step(past, piece) for head, past, piece in pieces), strict=True)
        return self._interact(y, z, state.position), LatentState(states, state.position + 1)

    def initial_state(self, batch: int) -> LatentState:
        """The state before the first position: zeros."""
        position = torch.zeros(batch, dtype=torch.long, device=self.in_proj.weight.device)
        return LatentState(tuple(head.initial_state(batch) for head in self.heads), position)

    def _interact(self, y: list[Tensor] | tuple[Tensor, ...], z: Tensor, position: Tensor) -> Tensor:
        """Equation 9, with the rotation of equation 6."""
        z = rope(z.unflatten(-1, (self.n_heads, -1)), position, self.rope_base).flatten(-2)
        return self.out_proj(torch.cat(y, -1) * z / self.n_heads**0.5)


def rope(z: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): channels j and j + d/2 turn by position * base^(-2j/d), as in Llama.

    Args:
        z: (..., heads, d) with d even.
        position: (...) integers.
        base: see `LatentMamba`.
    """
    half = z.shape[-1] // 2
    dtype = torch.promote_types(z.dtype, torch.float32)  # half precision cannot count positions
    angle = position[..., None, None] * base ** -(torch.arange(half, dtype=dtype, device=z.device) / half)
    cos, sin = angle.cos().to(z.dtype), angle.sin().to(z.dtype)
    first, second = z.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _positions(start: Tensor, length: int, seq_idx: Tensor | None) -> Tensor:
    """Where each position stands in its sequence, (batch, length); the first sequence goes on from `start` (batch,)."""
    columns = torch.arange(length, device=start.device)
    if seq_idx is None:
        return start[:, None] + columns
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    first_column = (begins * columns).cummax(1).values  # of the position's sequence
    return columns - first_column + start[:, None] * (first_column == 0)
