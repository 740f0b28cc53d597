"""The one skeleton of all sequence models: embedding -> layers of mixer and feed-forward -> tied softmax.

A named model is a recipe: SASRec is the attention mixer with positions and residuals, 2Mamba4Rec the Mamba-2 mixer
without. Post-norm throughout, as in RecBole's SASRec and in Mamba4Rec (arXiv 2403.03900).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec import config
from llmrec.retrievers.mixers import build_mixer, check_steps


class Layer(nn.Module):
    """Mixer, then feed-forward `W2 gelu(W1 x + b1) + b2` with W1 (4D, D) and W2 (D, 4D) (arXiv 2408.05606, section 3.3)."""

    def __init__(self, model: config.SequenceModel):
        super().__init__()
        self.mixer: Any = build_mixer(model)
        self.residual = model.residual
        self.dropout = nn.Dropout(model.dropout)
        self.mixer_norm = nn.LayerNorm(model.dim, eps=1e-12)
        self.up = nn.Linear(model.dim, model.inner)
        self.down = nn.Linear(model.inner, model.dim)
        self.norm = nn.LayerNorm(model.dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self._feed_forward(x, self.mixer(x))

    def read(self, x: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        """All positions at once, going on from a state: (batch, length, dim) to the same, and the new state."""
        mixed, state = self.mixer(x, mask=mask, state=state, return_state=True)
        return self._feed_forward(x, mixed), state

    def step(self, state: Any, x: Tensor) -> tuple[Tensor, Any]:
        """One position: (batch, dim) to the same, and the new state."""
        mixed, state = self.mixer.step(state, x)
        return self._feed_forward(x, mixed), state

    def _feed_forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        mixed = self.dropout(mixed)
        x = self.mixer_norm(mixed + x if self.residual else mixed)
        inner = self.down(self.dropout(F.gelu(self.up(x))))
        return self.norm(self.dropout(inner) + x)


class SequenceModel(nn.Module):
    """Maps histories to vectors whose product with the item embeddings scores the next item.

    Args:
        model: sizes.
        item_count: items are 1..item_count, 0 is padding.
        max_length: longest history; the size of the position table where there is one.
    """

    def __init__(self, model: config.SequenceModel, item_count: int, max_length: int):
        super().__init__()
        self.config = model
        self.items = nn.Embedding(item_count + 1, model.dim, padding_idx=0)
        self.positions = nn.Embedding(max_length, model.dim) if model.positions else None
        self.dropout = nn.Dropout(model.dropout)
        self.norm = nn.LayerNorm(model.dim, eps=1e-12)
        layers = nn.ModuleList(Layer(model) for _ in range(model.layers))
        self.layers: Iterable[Layer] = layers  # type: ignore[assignment]  # a ModuleList does not say of what
        self.apply(_initialise)

    def forward(self, history: Tensor) -> Tensor:
        """(batch, length) items, padded with 0 on the right -> (batch, length, dim)."""
        x = self.items(history)
        if self.positions is not None:
            x = x + self.positions.weight[: history.shape[1]]
        x = self.norm(self.dropout(x))
        for layer in self.layers:
            x = layer(x)
        return x

    def initial_states(self, batch: int) -> list[Any]:
        """One state per layer, as before the first event. A state is a (nested) tuple of tensors whose first dimension is the batch.

        Raises:
            UserError: when the past does not fit into a state of constant size (attention, positions).
        """
        check_steps(self.config)
        return [layer.mixer.initial_state(batch) for layer in self.layers]

    def read(self, history: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """`forward` with the states out, so that the next events need not read these again.

        Args:
            history: (batch, length) items, padded with 0 on the right; a row may be nothing but padding.
            states: what precedes the first item; None is nothing.

        Returns:
            (batch, length, dim), and the states after each row's last real item.

        Raises:
            UserError: as `initial_states`.
        """
        if states is None:
            states = self.initial_states(len(history))
        check_steps(self.config)
        after = []
        x, mask = self.norm(self.dropout(self.items(history))), history > 0
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.read(x, mask, state)
            after.append(state)
        return x, after

    def step(self, states: list[Any], items: Tensor) -> tuple[Tensor, list[Any]]:
        """One event more, at a cost that does not depend on the past. Call `eval` first: dropout is as in `forward`.

        Args:
            states: of `initial_states`, `read` or an earlier step.
            items: (batch,) from 1.

        Returns:
            The vector that scores the next item, (batch, dim), and the new states.

        Raises:
            UserError: as `initial_states`.
        """
        check_steps(self.config)
        after = []
        x = self.norm(self.dropout(self.items(items)))
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.step(state, x)
            after.append(state)
        return x, after

    def last(self, history: Tensor, lengths: Tensor) -> Tensor:
        """The vector at each history's last real position, (batch, dim)."""
        return self(history)[torch.arange(len(history), device=history.device), lengths - 1]

    def parameter_counts(self) -> dict[str, int]:
        """`total`, and `non_embedding` without the item and position tables."""
        total = sum(p.numel() for p in self.parameters())
        tables = self.items.weight.numel() + (0 if self.positions is None else self.positions.weight.numel())
        return {"total": total, "non_embedding": total - tables}


def _initialise(module: nn.Module) -> None:
    """N(0, .02) for every linear and embedding weight, zero biases, as in RecBole and Mamba4Rec."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
