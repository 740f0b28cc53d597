"""The one skeleton of all sequence models: embedding -> layers of mixer and feed-forward -> tied softmax.

A named model is a recipe: SASRec is the attention mixer with positions and residuals, 2Mamba4Rec the Mamba-2 mixer
without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec import config
from llmrec.errors import UserError
from llmrec.retrievers import feed_forward
from llmrec.retrievers.dropout import Dropout
from llmrec.retrievers.mixers import build_mixer, check_steps, is_causal


class Layer(nn.Module):
    """Mixer, then feed-forward, each with dropout and, as the recipe says, residual and norm.

    The norm stands after the sum (`post`: RecBole's SASRec, Mamba4Rec, arXiv 2403.03900) or before the part (`pre`). Before
    the first mixer stands none: the embeddings have been normalised (arXiv 2504.07398, section 4.2.1).
    """

    def __init__(self, model: config.SequenceModel, max_length: int, first: bool):
        super().__init__()
        self.mixer: Any = build_mixer(model, max_length)
        self.feed_forward = feed_forward.build(model)
        self.causal, self.residual, self.norm_place = is_causal(model.mixer), model.residual, model.norm
        self.dropout = Dropout(model.dropout)
        self.mixer_norm = nn.Identity() if first and model.norm == "pre" else build_norm(model)
        self.feed_forward_norm = nn.Identity() if self.feed_forward is None else build_norm(model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_in = self._before(x)
        # padding stands on the right, where causal mixers do not see it
        return self._after(x, self.mixer(x_in) if self.causal else self.mixer(x_in, mask=mask))

    def read(self, x: Tensor, mask: Tensor, state: Any) -> tuple[Tensor, Any]:
        """All positions at once, going on from a state: (batch, length, dim) to the same, and the new state."""
        mixed, state = self.mixer(self._before(x), mask=mask, state=state, return_state=True)
        return self._after(x, mixed), state

    def step(self, state: Any, x: Tensor) -> tuple[Tensor, Any]:
        """One position: (batch, dim) to the same, and the new state."""
        mixed, state = self.mixer.step(state, self._before(x))
        return self._after(x, mixed), state

    def _before(self, x: Tensor) -> Tensor:
        return self.mixer_norm(x) if self.norm_place == "pre" else x

    def _after(self, x: Tensor, mixed: Tensor) -> Tensor:
        if self.norm_place == "none":
            return mixed  # the bare mixer: GRU4Rec
        mixed = self.dropout(mixed)
        x = mixed + x if self.residual else mixed
        if self.norm_place == "pre":
            return x if self.feed_forward is None else x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.mixer_norm(x)
        return x if self.feed_forward is None else self.feed_forward_norm(self.dropout(self.feed_forward(x)) + x)


class SequenceModel(nn.Module):
    """Maps histories to vectors whose product with the item vectors scores the next item.

    Args:
        model: sizes.
        item_count: items are 1..item_count, 0 is padding.
        max_length: longest history; the size of the position table where there is one.

    Raises:
        UserError: when the sizes do not fit together.
    """

    def __init__(self, model: config.SequenceModel, item_count: int, max_length: int):
        super().__init__()
        if model.norm == "none" and (model.feed_forward != "none" or model.residual):
            raise UserError("model.norm none is the bare mixer: set model.feed_forward none and model.residual false, or another norm")
        self.config = model
        self.items = nn.Embedding(item_count + 1, model.dim, padding_idx=0)
        self.positions = nn.Embedding(max_length, model.dim) if model.positions else None
        self.item_bias = nn.Parameter(torch.zeros(item_count + 1)) if model.item_bias else None
        # Adam moves a parameter by the learning rate a step at most, which is slow for a number that belongs near -10
        self.tenth_of_repeat_bias = nn.Parameter(torch.zeros(())) if model.repeat_bias else None
        for table in (self.items, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[0].zero_()
        self.dropout = Dropout(model.dropout)
        self.norm = build_norm(model)
        # HSTU and arXiv 2504.07398, which score by cosines, have no other norm at the end
        self.last_norm = build_norm(model) if model.norm == "pre" and model.temperature is None else nn.Identity()
        layers = nn.ModuleList(Layer(model, max_length, first=number == 0) for number in range(model.layers))
        self.layers: Iterable[Layer] = layers  # type: ignore[assignment]  # a ModuleList does not say of what

    @property
    def width(self) -> int:
        """Of the vectors: an item's bias is one more coordinate, which histories meet with a one."""
        return self.config.dim + (self.item_bias is not None)

    def forward(self, history: Tensor) -> Tensor:
        """(batch, length) items, padded with 0 on the right -> (batch, length, width)."""
        x, mask = self._embed(history), history > 0
        for layer in self.layers:
            x = layer(x, mask)
        return self._vectors(x)

    def item_vectors(self, ids: Tensor | None = None) -> Tensor:
        """What the vectors of `forward` are multiplied with: (..., width) of these items, or of all of them, padding first."""
        rows = self.items.weight if ids is None else self.items(ids)
        if self.config.temperature is not None:
            rows = F.normalize(rows, dim=-1)
        if self.item_bias is not None:
            bias = self.item_bias if ids is None else self.item_bias[ids]
            rows = torch.cat([rows, bias[..., None]], -1)
        return rows

    @property
    def repeat_bias(self) -> Tensor | None:
        """What is added to the scores of items that the history holds, a scalar (see `repeats`)."""
        return None if self.tenth_of_repeat_bias is None else 10 * self.tenth_of_repeat_bias

    def _embed(self, history: Tensor) -> Tensor:
        x = self.items(history)
        if self.config.scaled:
            x = x * self.config.dim**0.5
        if self.positions is not None:
            x = x + self.positions.weight[: history.shape[-1]]
        return self.norm(self.dropout(x))

    def _vectors(self, x: Tensor) -> Tensor:
        x = self.last_norm(x)
        if self.config.temperature is not None:
            x = F.normalize(x, dim=-1) / self.config.temperature
        return x if self.item_bias is None else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)

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
            (batch, length, width), and the states after each row's last real item.

        Raises:
            UserError: as `initial_states`.
        """
        if states is None:
            states = self.initial_states(len(history))
        check_steps(self.config)
        after = []
        x, mask = self._embed(history), history > 0
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.read(x, mask, state)
            after.append(state)
        return self._vectors(x), after

    def step(self, states: list[Any], items: Tensor) -> tuple[Tensor, list[Any]]:
        """One event more, at a cost that does not depend on the past. Call `eval` first: dropout is as in `forward`.

        Args:
            states: of `initial_states`, `read` or an earlier step.
            items: (batch,) from 1.

        Returns:
            The vector that scores the next item, (batch, width), and the new states.

        Raises:
            UserError: as `initial_states`.
        """
        check_steps(self.config)
        after = []
        x = self._embed(items)
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.step(state, x)
            after.append(state)
        return self._vectors(x), after

    def last(self, history: Tensor, lengths: Tensor) -> Tensor:
        """The vector at each history's last real position, (batch, width)."""
        return self(history)[torch.arange(len(history), device=history.device), lengths - 1]

    def parameter_counts(self) -> dict[str, int]:
        """`total`, and `non_embedding` without the tables of items, their biases and positions."""
        total = sum(p.numel() for p in self.parameters())
        tables = [self.items.weight, self.item_bias, None if self.positions is None else self.positions.weight]
        return {"total": total, "non_embedding": total - sum(table.numel() for table in tables if table is not None)}


def build_norm(model: config.SequenceModel) -> nn.Module:
    """The norm that the recipe names."""
    if model.norm == "none":
        return nn.Identity()
    return nn.LayerNorm(model.dim, eps=1e-12) if model.norm_kind == "layer" else nn.RMSNorm(model.dim, eps=1e-6)
