"""Progress bars of long work, on stderr of rank 0, silent when that is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from llmrec import distributed

T = TypeVar("T")


def track(work: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield the elements of `work` and show how far it is and when it will be done; `done` of `total` were before."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and distributed.is_main())) as bar:
        yield from bar.track(work, description=description, total=total, completed=done)
