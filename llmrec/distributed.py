"""Several processes that work as one: who is who, waiting for each other, putting rows and gradients together.

`accelerate launch` starts the same command once per device and numbers the processes in the environment. They compute
together; rank 0 alone writes and talks. Started in the ordinary way a process is alone, and all of this does nothing.
torch is imported where it is used, so that the command line stays quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

PATIENCE = timedelta(days=7)
"""Others may wait for hours while rank 0 fetches a model or writes a report. The launcher ends all when one fails."""


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process as one of several (or as the only one of its kind)."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def join() -> None:
    """Meet the other processes and take one's own device: before anything below, and before a model is loaded."""
    if launched():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Part from the others, at the end of a command that went well."""
    if launched():
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """The values of all processes by rank, on every process."""
    if world_size() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait, then they do: what it has fetched or made they find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def share(count: int) -> np.ndarray:
    """Numbers of the rows, out of `count`, that are this process's part; `gather_rows` puts the parts in order again."""
    import numpy as np

    return np.array_split(np.arange(count), world_size())[rank()]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes by rank, on every process; how many there are may differ."""
    import numpy as np

    return np.concatenate(gather(rows)) if world_size() > 1 else rows


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all processes up, in place; every process ends with the same numbers.

    Args:
        parameters: those with a gradient must be the same ones everywhere.
    """
    if world_size() == 1:
        return
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of many
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
