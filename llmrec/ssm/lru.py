"""The linear recurrent unit: a diagonal recurrence with the same complex decay at every position.

    h_t = lambda h_{t-1} + gamma (W_in x_t + b_in)      state  (d_hidden,), complex
    y_t = Re(W_out h_t + b_out)
    lambda = exp(-exp(nu_log) + i exp(theta_log))

Orvieto et al. 2023 (arXiv 2303.06349), section 3.3, in the form of LRURec (arXiv 2310.02367). The projections are by far
the most work. The recurrence itself is one multiply-add of (batch, d_hidden) per position, on numbers that are still in
the cache: faster on a CPU than a parallel scan, which walks through all of the memory several times.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RING = (0.8, 0.99)  # where the moduli of lambda start


class LRUState(NamedTuple):
    """Everything an `LRU` knows of the past; its size does not depend on the length.

    Attributes:
        real: real part of h, (batch, d_hidden).
        imag: imaginary part, likewise.
    """

    real: Tensor
    imag: Tensor


class LRU(nn.Module):
    """Linear recurrent unit, (batch, length, d_model) to the same, causal.

    Complex weights are real parameters with a last dimension (real part, imaginary part), for optimisers and files that
    know real numbers only; `torch.view_as_real` of LRURec's weights gives them. They start as its weights do: normal,
    std .02, cut at two of them; lambda uniform in a ring, gamma so that h is as large as its input.

    Args:
        d_model: outer width.
        d_hidden: number of complex states; None is 2 * d_model.
    """

    def __init__(self, d_model: int, d_hidden: int | None = None):
        super().__init__()
        hidden = 2 * d_model if d_hidden is None else d_hidden
        self.in_weight = nn.Parameter(torch.empty(hidden, d_model, 2))
        self.in_bias = nn.Parameter(torch.empty(hidden, 2))
        self.out_weight = nn.Parameter(torch.empty(d_model, hidden, 2))
        # The imaginary half does nothing: y is the real part. It stays so that LRURec's weights and parameter counts fit.
        self.out_bias = nn.Parameter(torch.empty(d_model, 2))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        low, high = RING
        square = torch.rand(hidden) * (high**2 - low**2) + low**2  # uniform on the ring's area
        phase = 2 * math.pi * (1 - torch.rand(hidden))  # not zero: it has a logarithm
        self.params_log = nn.Parameter(torch.stack([-square.log() / 2, phase, (1 - square).sqrt()]).log())  # [nu, theta, gamma]

    @overload
    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: LRUState | None = None, return_state: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: LRUState | None = None, *, return_state: Literal[True]
    ) -> tuple[Tensor, LRUState]: ...

    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: LRUState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LRUState]:
        """All positions at once.

        Args:
            u: (batch, length, d_model).
            mask: (batch, length), false at padding: the state skips it as if it were not there, wherever it stands.
            state: what precedes the first position; None is nothing.
            return_state: also return the state after the last real position.
        """
        start = self._complex(self.initial_state(len(u)) if state is None else state)
        if mask is None:
            states = _Recurrence.apply(self._enter(u.transpose(0, 1)), self._decay(), start)
        else:
            # The real positions move together; then each position takes the state of the last real one up to it.
            real = mask.bool()
            order = (~real).byte().argsort(dim=1, stable=True)
            together = u.gather(1, order[..., None].expand_as(u))
            states = _Recurrence.apply(self._enter(together.transpose(0, 1)), self._decay(), start)
            seen = real.cumsum(1).t()[..., None].expand_as(states)
            states = torch.cat([start[None], states]).gather(0, seen)
        y = self._leave(states, u.dtype).transpose(0, 1)
        if not return_state:
            return y
        end = states[-1] if len(states) else start
        return y, _parts(end)

    def step(self, state: LRUState, u: Tensor) -> tuple[Tensor, LRUState]:
        """One position more: u (batch, d_model) to the same, and the new state. The cost does not depend on the past."""
        h = self._decay() * self._complex(state) + self._enter(u)
        return self._leave(h, u.dtype), _parts(h)

    def initial_state(self, batch: int) -> LRUState:
        """The state before the first position: zeros."""
        size = batch, self.params_log.shape[1]
        return LRUState(self.params_log.new_zeros(size), self.params_log.new_zeros(size))

    def _decay(self) -> Tensor:
        """lambda, (d_hidden,) complex."""
        nu, theta, _ = self.params_log.to(self._dtype()).exp()
        return torch.polar((-nu).exp(), theta)

    def _enter(self, u: Tensor) -> Tensor:
        """What enters the state, gamma (W_in u + b_in): (..., d_hidden) complex. Gamma goes into the weights, which are few."""
        gamma = self.params_log[2].exp()[:, None]
        weight, bias = self.in_weight.mT * gamma[:, None], self.in_bias * gamma  # (d_hidden, real or imaginary, ...)
        entering = F.linear(u, weight.flatten(0, 1), bias.flatten()).to(self._dtype())
        return torch.view_as_complex(entering.unflatten(-1, (-1, 2)))

    def _leave(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Re(W_out h + b_out), (..., d_model)."""
        real, imag = self.out_weight.unbind(-1)
        weight = torch.stack([real, -imag], -1).flatten(1)
        return F.linear(torch.view_as_real(states).flatten(-2).to(dtype), weight, self.out_bias[:, 0])

    def _complex(self, state: LRUState) -> Tensor:
        return torch.complex(state.real.to(self._dtype()), state.imag.to(self._dtype()))

    def _dtype(self) -> torch.dtype:
        """Of the recurrence: half precision is computed in float32."""
        return torch.promote_types(self.params_log.dtype, torch.float32)


def _parts(h: Tensor) -> LRUState:
    """Copies, which do not keep the states of all positions in memory."""
    return LRUState(h.real.clone(), h.imag.clone())


class _Recurrence(torch.autograd.Function):
    """h_t = decay h_{t-1} + x_t for x (length, batch, d_hidden), so that a position is contiguous; all complex."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, start: Tensor) -> Tensor:
        states = torch.cat([start[None], x])
        for before, now in pairwise(states.unbind()):
            now.addcmul_(decay, before)
        ctx.save_for_backward(decay, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        # What y says of each state; then, in place, all that later positions say.
        gradients = torch.empty_like(states)
        gradients[0], gradients[1:] = 0, dstates
        decay, ddecay = decay.conj().resolve_conj(), torch.zeros_like(states[0])
        for k in range(len(states) - 1, 0, -1):
            gradients[k - 1].addcmul_(decay, gradients[k])
            ddecay.addcmul_(gradients[k], states[k - 1].conj())
        return gradients[1:], ddecay.sum(0), gradients[0]
