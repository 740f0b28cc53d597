"""How the benchmarks measure: interleaved medians, peak memory in a process of its own, JSON on standard output."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llmrec.process import SETTINGS


def same_settings() -> None:
    """Restart under the allocator and thread settings of the `llmrec` command, so that every side has them."""
    if sys.platform == "linux" and not SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})


def medians(functions: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each, after one run to warm up; one of each in turn, so that all see the same machine."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}


def peak_megabytes(build: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """What two runs of build(*arguments)() add at most to the memory of a fresh process that has built it, in MB (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (build, arguments, torch.get_num_threads()))


def _growth(build: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], threads: int) -> float:
    torch.set_num_threads(threads)
    function = build(*arguments)
    before = memory("VmRSS")
    function()
    function()
    return round(memory("VmHWM") - before, 1)


def elsewhere(steps: Callable[..., Iterator[Any]], *arguments: Any) -> Generator[Any]:
    """The values of steps(*arguments), made in a fresh process, which rests between two values and ends with this generator."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), steps, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            ours.send("next")
            yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection, threads: int, steps: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    pipe.recv()
    for value in steps(*arguments):
        pipe.send(value)
        pipe.recv()


def in_turn(runs: Mapping[str, Generator[Any]], rounds: int) -> dict[str, list[Any]]:
    """So many values of each, one of each in turn, so that all see the same machine; then all are closed."""
    values: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            values[name].append(next(run))
            print(f"{name}: {values[name][-1]}", file=sys.stderr, flush=True)
    for run in runs.values():
        run.close()
    return values


def memory(field: str) -> float:
    """A line of the kernel's account of this process, in MB: VmRSS is what it holds now, VmHWM the most it ever held (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def report(results: dict[str, Any]) -> None:
    """Prints the results with the machine they come from."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit, "date": str(date.today())}
    print(json.dumps({"machine": machine, **results}, indent=2))
