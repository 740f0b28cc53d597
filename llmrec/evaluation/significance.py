"""Bootstrap over users: how sure is a mean, and how sure is the difference between two systems on the same users.

A resample draws n of the n users with replacement and takes their mean (Efron & Tibshirani 1993, chapter 13). The
mean depends on the draw only through how often each distinct value came up, and those counts are multinomial with
the values' shares as probabilities. Drawing the counts is therefore the same bootstrap, exactly, and costs resamples
x distinct values instead of resamples x users: a metric at cut-off k has at most k + 1 values, a difference of two
at most (k + 1)^2.

Intervals are percentile intervals. With a few dozen users they come out somewhat too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELLS = 4_000_000  # counts drawn at a time: 32 MB


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
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the systems were measured on different users: {a.shape} and {b.shape}")
    means = _resampled_means(a - b, resamples, seed)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + resamples))
    return Difference(float(np.mean(a - b)), *_percentiles(means, level), p)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` bootstrap samples of `values`, (resamples,)."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"need one finite value per user and at least one user, got shape {values.shape}")
    distinct, counts = np.unique(values, return_counts=True)
    random, n = np.random.default_rng(seed), len(values)
    rows = max(1, CELLS // len(distinct))
    means = [random.multinomial(n, counts / n, size=min(rows, resamples - start)) @ distinct / n for start in range(0, resamples, rows)]
    return np.concatenate(means).round(12)  # gains and losses that cancel must give 0, not 1e-18


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
