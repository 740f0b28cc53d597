"""How sure is a mean over users, and how sure is the difference between two systems on the same users: bootstrap, permutation, seeds.

A resample draws n of the n users with replacement and takes their mean (Efron & Tibshirani 1993, chapter 13). The
mean depends on the draw only through how often each distinct value came up, and those counts are multinomial with
the values' shares as probabilities. Drawing the counts is therefore the same bootstrap, exactly, and costs resamples
x distinct values instead of resamples x users: a metric at cut-off k has at most k + 1 values, a difference of two
at most (k + 1)^2. Values that hardly repeat, such as seconds, are drawn one by one.

Intervals are percentile intervals. With a few dozen users they come out somewhat too narrow.

The permutation test asks how often a difference as large comes about when each user's two values are exchanged by a coin (Fisher 1935,
section 21; for rankings Smucker, Allan & Carterette 2007). Every test among several finds its chance differences: `holm` corrects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CELLS = 4_000_000  # counts drawn at a time: 32 MB
FEW = 1000
"""Distinct values up to which counts are drawn whatever the number of users: any metric at a cut-off up to 30 has fewer."""
COUNT_COST = 12
"""To draw a value's count takes as long as to draw so many users."""
SIGNS = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
"""The signs that the bits of a byte stand for, (256, 8)."""
SIGNIFICANT = 0.05
"""A difference whose p-value, corrected by `holm`, lies below is shown; verdicts and marks go by this alone."""


@dataclass(frozen=True)
class Interval:
    """A mean over users and its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b over the same users, its confidence interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def interval(a: np.ndarray, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Confidence interval of the mean of `a`.

    Args:
        a: one value per user, (users,).
        resamples: bootstrap resamples.
        seed: seed of the resamples.
        level: coverage of the interval.

    Raises:
        ValueError: when there are no users or a value is not finite.
    """
    means = _resampled_means(a, resamples, seed)
    return Interval(float(np.mean(a)), *_percentiles(means, level))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Difference:
    """Does system a differ from system b? Both are resampled by the same users, so what users share cancels out.

    p is twice the smaller share of resampled differences at or beyond zero, at most 1: the level at which the
    percentile interval begins to touch zero. One is added to both counts of the share, so that p is never 0 and
    cannot promise more than the number of resamples.

    Args:
        a: a metric of system a, (users,).
        b: the same metric of system b for the same users in the same order, (users,).
        resamples: bootstrap resamples.
        seed: seed of the resamples.
        level: coverage of the interval.

    Raises:
        ValueError: when the shapes differ, there are no users or a value is not finite.
    """
    difference = _differences(a, b)
    means = _resampled_means(difference, resamples, seed)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + resamples))
    return Difference(float(difference.mean()), *_percentiles(means, level), p)


def paired_permutation(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip test: are a and b exchangeable, user by user?

    The share of random exchanges whose mean difference is at least as far from zero as the one seen, which counts as one of them: p is
    never 0 and cannot promise more than the number of resamples. 10,000 resamples of 100,000 users take about a second.

    Args:
        a: a metric of system a, (users,).
        b: the same metric of system b for the same users in the same order, (users,).
        resamples: random exchanges.
        seed: their seed.

    Raises:
        ValueError: when the shapes differ, there are no users or a value is not finite.
    """
    difference = _differences(a, b)
    random, n = np.random.default_rng(seed), len(difference)
    moving = difference[difference != 0]
    sums = np.zeros(resamples)
    for start in range(0, len(moving), 8):
        eight = moving[start : start + 8]  # a random byte flips them all: a look into a table of 256 sums instead of 8 additions
        sums += (SIGNS[:, : len(eight)] @ eight)[np.frombuffer(random.bytes(resamples), np.uint8)]
    as_far = np.abs(sums / n) >= abs(difference.mean()) - 1e-12  # sums of the same numbers in another order differ by rounding
    return (1 + int(as_far.sum())) / (1 + resamples)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that at most 5 % of such families have any false alarm at 0.05 (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1 and so on; none may come out below one before it, or above 1.

    Args:
        p: p-values, in any order.

    Returns:
        The corrected ones, in the same order.

    Raises:
        ValueError: when one is not between 0 and 1.
    """
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, got {list(p)}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted.tolist()


@dataclass(frozen=True)
class OverSeeds:
    """A number that several runs found which differ by their seed alone."""

    mean: float
    deviation: float | None
    """Standard deviation of single runs, with n - 1; None of one run."""
    runs: int


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and spread over runs that differ by their seed alone.

    Raises:
        ValueError: when there are no runs or a value is not finite.
    """
    found = np.asarray(values, np.float64)
    if len(found) == 0 or not np.isfinite(found).all():
        raise ValueError(f"need a finite value of each run, got {list(values)}")
    return OverSeeds(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None, len(found))


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the systems were measured on different users: {a.shape} and {b.shape}")
    return _checked(a - b)


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"need one finite value per user and at least one user, got shape {values.shape}")
    return values


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` bootstrap samples of `values`, (resamples,)."""
    values = _checked(values)
    distinct, counts = np.unique(values, return_counts=True)
    random, n = np.random.default_rng(seed), len(values)
    if len(distinct) > max(FEW, n // COUNT_COST):
        return np.array([values[random.integers(0, n, n, dtype=np.uint32)].mean() for _ in range(resamples)]).round(12)
    rows = max(1, CELLS // len(distinct))
    means = [random.multinomial(n, counts / n, size=min(rows, resamples - start)) @ distinct / n for start in range(0, resamples, rows)]
    return np.concatenate(means).round(12)  # gains and losses that cancel must give 0, not 1e-18


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
