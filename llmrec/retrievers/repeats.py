"""Items that a history already holds: a learned bias in their scores.

People hardly rate a film twice but do play a song again, and a history of 200 items does not fit into a vector of 64
numbers: what the model has to learn item by item, one number says (after the repeat and explore modes of RepeatNet, arXiv
1812.02646). Where nobody repeats it becomes a mask over the window that the model sees, so that metrics with and without
the history masked come out alike; read both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What some positions of histories have behind them.

    Attributes:
        histories: items, 0 at padding, (rows, length) int64.
        first: where a row holds an item for the first time, (rows, length) bool.
        row: of each position, (positions,) int64.
        column: of each position, (positions,) int64; it and all columns before it have been seen.
    """

    histories: Tensor
    first: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def at(cls, histories: Tensor, row: Tensor, column: Tensor) -> Seen:
        """Find the repeats in the histories."""
        again = (histories[:, :, None] == histories[:, None, :]).tril(-1).any(2)
        return cls(histories, ~again & (histories > 0), row, column)

    def items(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The items seen by some positions.

        Returns:
            Columns of a table of scores without padding (item - 1), (positions, length) int64; and 1 where there is such an item,
            each once, else 0, (positions, length) float32.
        """
        rows = self.row[part]
        columns = torch.arange(self.histories.shape[1], device=rows.device)
        there = self.first[rows] & (columns <= self.column[part, None])
        return (self.histories[rows] - 1).clamp(min=0), there.float()
