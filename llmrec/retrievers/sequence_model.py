"""The one skeleton of all sequence models: embedding -> layers of mixer and feed-forward -> tied softmax.

A named model is a recipe: SASRec is the attention mixer with positions and residuals, 2Mamba4Rec the Mamba-2 mixer
without. Post-norm throughout, as in RecBole's SASRec and in Mamba4Rec (arXiv 2403.03900).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec import config
from llmrec.retrievers.mixers import build_mixer


class Layer(nn.Module):
    """Mixer, then feed-forward `W2 gelu(W1 x + b1) + b2` with W1 (4D, D) and W2 (D, 4D) (arXiv 2408.05606, section 3.3)."""

    def __init__(self, model: config.SequenceModel):
        super().__init__()
        self.mixer = build_mixer(model)
        self.residual = model.residual
        self.dropout = nn.Dropout(model.dropout)
        self.mixer_norm = nn.LayerNorm(model.dim, eps=1e-12)
        self.up = nn.Linear(model.dim, model.inner)
        self.down = nn.Linear(model.inner, model.dim)
        self.norm = nn.LayerNorm(model.dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.dropout(self.mixer(x))
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
        self.items = nn.Embedding(item_count + 1, model.dim, padding_idx=0)
        self.positions = nn.Embedding(max_length, model.dim) if model.positions else None
        self.dropout = nn.Dropout(model.dropout)
        self.norm = nn.LayerNorm(model.dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.layers))
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
