"""Which rows an optimiser step has, and how they are cut into forward passes and dealt to the processes.

Which rows make a step depends on lengths, seed and epoch alone: not on how much memory there is, nor on how many processes
share the work. How a step is cut changes its numbers by rounding only, because the loss is a mean over the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 16  # steps whose rows are sorted together: little padding, and still a random choice


class Steps(Sampler[list[int]]):
    """Rows of similar length in one optimiser step, steps in random order.

    Args:
        lengths: tokens of each row.
        size: rows of a step; the last step of an epoch has what is left.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) // self.size * self.size
        steps = []
        for start in range(0, whole, self.size * POOL):
            pool = sorted(order[start : min(start + self.size * POOL, whole)], key=lambda row: self.lengths[row])
            steps += [pool[at : at + self.size] for at in range(0, len(pool), self.size)]
        for at in torch.randperm(len(steps), generator=generator).tolist():
            yield steps[at]
        if whole < len(order):
            yield order[whole:]


def deal(lengths: Sequence[int], copies: Sequence[int], rows: int | None, tokens: int | None, processes: int) -> list[list[list[int]]]:
    """Cut a step into forward passes and deal them out, the same number of passes to every process.

    The number of passes is the least that the limits allow; among as many the largest pass is as small as can be, so that
    memory is used evenly and processes wait little for each other.

    Args:
        lengths: tokens of the step's rows.
        copies: as how many token rows of that length each goes through the model.
        rows: at most so many rows in a pass; None is no limit.
        tokens: at most so many padded tokens in a pass; a longer row has a pass of its own. None is no limit.
        processes: that share the step.

    Returns:
        For each process its passes, each a list of places in `lengths`; a pass with nothing in it is there for the count.
        The n-th passes of all processes are of similar size.
    """
    rows = len(lengths) if rows is None else rows
    most = max(lengths) * sum(copies) if tokens is None else tokens
    passes = -(-len(_cut(lengths, copies, rows, most)) // processes)  # of each process
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if len(_cut(lengths, copies, rows, middle)) <= passes * processes:
            high = middle
        else:
            low = middle + 1
    pieces = _cut(lengths, copies, rows, high)
    pieces.sort(key=lambda piece: -sum(copies[at] for at in piece) * lengths[piece[0]])
    pieces += [[] for _ in range(passes * processes - len(pieces))]
    return [pieces[process::processes] for process in range(processes)]


def _cut(lengths: Sequence[int], copies: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """The fewest pieces within the limits: from the longest row down, each piece as large as it may be."""
    pieces: list[list[int]] = []
    wide = 0  # token rows of the last piece
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if pieces and len(pieces[-1]) < rows and (wide + copies[at]) * lengths[pieces[-1][0]] <= tokens:
            pieces[-1].append(at)
            wide += copies[at]
        else:
            pieces.append([at])
            wide = copies[at]
    return pieces
