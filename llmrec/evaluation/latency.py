"""How long one user takes, with an interval, and how much memory that needs (arXiv 2408.05606, section 3.4.1).

Every user is timed a few times, once in each pass over all users, so that a moment in which the machine was busy with something else
meets many users once rather than one user always. What such moments leave are outliers, told by how much slower than usual the same
user was: a long history is slow, but it is slow every time. Intervals come from resampling the users.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

IQRS = 3.0
RULE = f"a measurement is left out when its ratio to the median of its user's repeats is above Q3 + {IQRS:g} IQR of all such ratios"

Case = TypeVar("Case")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Latency:
    """Seconds of one user, outliers left out.

    Attributes:
        mean: over users, each with the mean of his repeats.
        ci95: of that mean; None for a single user, who says nothing of others.
        median: over users.
        p95: the time that 95 % of users do not exceed.
        timed: users (or batches of users) that were timed.
        repeats: times that each was.
        outliers: measurements left out.
    """

    mean: float
    ci95: tuple[float, float] | None
    median: float
    p95: float
    timed: int
    repeats: int
    outliers: int


def timed(
    function: Callable[[Case], Answer], inputs: Sequence[Case], repeats: int, synchronize: Callable[[], object] = lambda: None
) -> tuple[np.ndarray, list[Answer]]:
    """Time a function on every input, pass by pass. Warm it up first, e.g. under `peak_growth_mb`.

    Args:
        function: what is timed.
        inputs: one by one.
        repeats: passes over all of them.
        synchronize: waits until the device has nothing left to do (`device_barrier`); called before both readings of the clock.

    Returns:
        Seconds, (inputs, repeats), and the answers of the last pass.

    Raises:
        ValueError: there is no input, or no repeat.
    """
    if not len(inputs) or repeats < 1:
        raise ValueError(f"nothing to time: {len(inputs)} inputs, {repeats} repeats")
    seconds = np.empty((len(inputs), repeats))
    answers: list[Answer] = []
    for repeat in range(repeats):
        answers = []
        for at, case in enumerate(inputs):
            synchronize()
            begun = time.perf_counter()
            answers.append(function(case))
            synchronize()
            seconds[at, repeat] = time.perf_counter() - begun
    return seconds, answers


def outliers(seconds: np.ndarray) -> np.ndarray:
    """Which measurements were disturbed, by `RULE`; at least one of each user's stays.

    Args:
        seconds: (users, repeats), positive.

    Returns:
        (users, repeats) bool.
    """
    ratios = seconds / np.median(seconds, axis=1, keepdims=True)
    first, third = np.quantile(ratios, [0.25, 0.75])
    # rounding may set equal times apart, and no user's own median is an outlier
    return ratios > max(1.0, third + IQRS * (third - first)) * (1 + 1e-9)


def resampled(seconds: np.ndarray, samples: int = 30, seed: int = 0) -> Latency:
    """Mean time of a user and its interval, from bootstrap samples of the users, each as large as the number that was timed.

    The means of the samples scatter around the mean of the users as that does around the truth, only less by the root of (n - 1) / n, as
    n users scatter less around their own mean. The interval is the mean and Student's t with n - 1 degrees of freedom, as n users know
    their own spread so far, times that standard deviation to both sides (Efron & Tibshirani 1993, sections 5.3 and 12.3).

    Args:
        seconds: (users, repeats), positive.
        samples: bootstrap samples, at least 2.
        seed: of the draws.

    Raises:
        ValueError: a time is not positive, or there are fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"{samples} samples have no spread: take at least 2")
    if not (seconds > 0).all():
        raise ValueError(f"{(~(seconds > 0)).sum()} of {seconds.size} times are not positive")
    left_out = outliers(seconds)
    users = np.nanmean(np.where(left_out, np.nan, seconds), axis=1)
    mean, count = float(users.mean()), len(users)
    return Latency(
        mean=mean,
        ci95=_interval(users, samples, seed) if count > 1 else None,
        median=float(np.median(users)),
        p95=float(np.quantile(users, 0.95)),
        timed=count,
        repeats=seconds.shape[1],
        outliers=int(left_out.sum()),
    )


def _interval(users: np.ndarray, samples: int, seed: int) -> tuple[float, float]:
    count = len(users)
    draws = np.random.default_rng(seed).integers(count, size=(samples, count))
    scatter = users[draws].mean(axis=1).std(ddof=1) * np.sqrt(count / (count - 1))
    half = stdtrit(count - 1, 0.975) * scatter
    return float(users.mean() - half), float(users.mean() + half)


def device_barrier() -> Callable[[], object]:
    """What waits for the GPU where there is one: work is only queued there when a call returns."""
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def peak_growth_mb(work: Callable[[], object]) -> float | None:
    """The most memory that some work takes on top of what is held before it, in MB.

    Of the GPU where there is one. Of the process otherwise (Linux with glibc): freed memory goes back to the system first, and the
    kernel's high-water mark starts again. None where neither can be asked; the work is done all the same.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        work()
        return None
    before = _status_mb("VmRSS")
    work()
    return max(0.0, _status_mb("VmHWM") - before)


def _status_mb(field: str) -> float:
    """A line of the kernel's account of this process: VmRSS is what it holds, VmHWM the most since the mark was set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
