"""The Hydra mixer (arXiv 2407.09941): a scan over the past, a scan over the future and a diagonal, in one layer.

With S(A, B, C) the lower triangular matrix a scan multiplies by, shift moving its rows down by one and flip turning
rows and columns round, the layer multiplies the values x by the quasiseparable matrix (section 3)

    M = shift(S(A, B, C)) + flip(shift(S(A, B', C'))) + diag(fc_D(x) + D)

The shift takes a position's own value out of both scans: it enters once, through the diagonal. Weights have the names
and layout of github.com/goombalab/hydra, so its checkpoints load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.ssm.conv import conv_silu
from llmrec.ssm.heads import count_heads, group_norm
from llmrec.ssm.initial import Init, initialise, inverse_softplus, log_uniform
from llmrec.ssm.ssd import ssd


class Hydra(nn.Module):
    """Bidirectional mixer, (batch, length, d_model) to the same: every position sees the past and the future.

    There is no `step` and no state. Both exist to add a position without touching the earlier ones; here a new last
    position changes every output before it. For the same reason the layer must not be trained on all next items at once.

    Args:
        d_model: outer width.
        d_state: size of the state per channel and direction.
        d_conv: width of the convolution, centred if odd. An even one sees one position more of the future than of the
            past: the published 4 one back and two ahead.
        expand: inner width over outer width.
        headdim: channels per head; must divide the inner width.
        ngroups: groups of heads that share B and C. Each group is normalised on its own, as in Mamba-2; goombalab's
            code normalises all heads together, which differs from two groups on.
        chunk_size: positions per block of the scan; changes the speed only.
        init: `mamba` as goombalab, or `mamba4rec`: N(0, .02) for the linear layers.

    Raises:
        ValueError: when headdim does not divide the inner width, or the groups do not divide the heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        init: Init = "mamba",
    ):
        super().__init__()
        inner = expand * d_model
        heads = count_heads(d_model, expand, headdim, ngroups)
        self.heads, self.ngroups, self.chunk_size = heads, ngroups, chunk_size
        self.sizes = [inner] + 4 * [ngroups * d_state]  # x, forward B and C, backward B and C go through the convolution together
        mixed = sum(self.sizes)
        self.in_proj = nn.Linear(d_model, inner + mixed + 2 * heads, bias=False)  # [z, xBC, forward dt, backward dt]
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv // 2)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, 1e-3, 0.1)))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(inner, heads, bias=False)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        initialise(self, init)

    def forward(self, u: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """All positions at once.

        Args:
            u: (batch, length, d_model).
            mask: (batch, length), false at padding, which may stand anywhere. A row needs it as soon as it has
                padding: the backward scan starts there.
            seq_idx: which sequence a position belongs to where several are packed into a row, (batch, length).
        """
        if mask is not None:
            u = u * mask[..., None]
        z, xBC, dt = self.in_proj(u).split([self.sizes[0], sum(self.sizes), 2 * self.heads], dim=-1)
        ahead = self.conv1d.kernel_size[0] // 2
        x, *BC = conv_silu(xBC, self.conv1d.weight, self.conv1d.bias, self.sizes, ahead=ahead, seq_idx=seq_idx)
        B, C, B_back, C_back = (t.unflatten(-1, (self.ngroups, -1)) for t in BC)
        dt = F.softplus(dt.unflatten(-1, (2, -1)) + self.dt_bias)
        if mask is not None:
            dt = dt * mask[..., None, None]
        dt, dt_back = dt.unbind(2)

        diagonal = self.fc_D(x) + self.D
        x = x.unflatten(-1, (self.heads, -1))
        y = x * diagonal[..., None]
        y[:, 1:] += self._from_earlier(x, dt, B, C, seq_idx)
        # one call per direction: both stacked into one batch would copy x and the outputs once more
        x, dt, B, C = (t.flip(1) for t in (x, dt_back, B_back, C_back))
        y[:, :-1] += self._from_earlier(x, dt, B, C, None if seq_idx is None else seq_idx.flip(1)).flip(1)
        # the gate comes after the norm, unlike in Mamba-2
        return self.out_proj(group_norm(y.flatten(2), self.norm, self.ngroups) * F.silu(z))

    def _from_earlier(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None) -> Tensor:
        """What every position but the first gets from those before it: the scan's output one position earlier."""
        y, _ = ssd(x, dt, -self.A_log.exp(), B, C, chunk=self.chunk_size, seq_idx=seq_idx, return_state=False)
        y = y[:, :-1]
        if seq_idx is not None:
            y = y * (seq_idx[:, 1:] == seq_idx[:, :-1])[..., None, None]
        return y
