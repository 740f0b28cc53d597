"""GRU4Rec's mixer (arXiv 1511.06939, 1606.08117) in RecBole's shape: a GRU without biases, then a linear layer back to the model's width.

torch's own GRU takes hardly more time than its matrix products; the loop and its gradient written out are no faster.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from llmrec.config import SequenceModel
from llmrec.ssm.state import ends_of

CAUSAL = True
STEPS = True


class GRU(nn.Module):
    """Gated recurrent unit, (batch, length, dim) to the same, causal.

    Args:
        dim: outer width.
        hidden: width of the state.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gru = nn.GRU(dim, hidden, bias=False, batch_first=True)
        self.dense = nn.Linear(hidden, dim)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)  # as RecBole; the linear layer is left as torch makes it

    @overload
    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: tuple[Tensor] | None = None, return_state: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: tuple[Tensor] | None = None, *, return_state: Literal[True]
    ) -> tuple[Tensor, tuple[Tensor]]: ...

    def forward(
        self, u: Tensor, mask: Tensor | None = None, state: tuple[Tensor] | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor]]:
        """All positions at once.

        Args:
            u: (batch, length, dim).
            mask: (batch, length), false at padding, which must stand on the right: no real position sees it there, and
                the state is the one before it.
            state: what precedes the first position, ((batch, hidden),); None is nothing.
            return_state: also return the state after the last real position.
        """
        (start,) = self.initial_state(len(u)) if state is None else state
        states, last = self.gru(u, start[None])
        y = self.dense(states)
        if not return_state:
            return y
        ends = ends_of(mask)
        if ends is None:
            return y, (last[0],)
        rows = torch.arange(len(u), device=u.device)
        return y, (torch.where((ends > 0)[:, None], states[rows, ends - 1], start),)

    def step(self, state: tuple[Tensor], u: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """One position more: u (batch, dim) to the same, and the new state. The cost does not depend on the past."""
        y, state = self(u[:, None], state=state, return_state=True)
        return y[:, 0], state

    def initial_state(self, batch: int) -> tuple[Tensor]:
        """The state before the first position: zeros."""
        return (self.dense.weight.new_zeros(batch, self.gru.hidden_size),)


def build(model: SequenceModel, max_length: int) -> GRU:
    """The layer with the recipe's sizes."""
    return GRU(model.dim, model.mixer.hidden)
