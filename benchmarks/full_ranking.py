"""Ranking a whole catalogue for many users: seconds and peak memory of what `retrieve` does after the training.

    python benchmarks/full_ranking.py                     # 100,000 users x 26,000 items, width 64
    python benchmarks/full_ranking.py --users 5000

The model is two random tables, so that the time is that of scores, ranks, candidate lists and metrics, not of a network's forward
pass. Histories have 50 events. The peak is of the whole process, Python, torch and the tables included.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from measure import memory, report, same_settings

from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.evaluation import metrics
from llmrec.retrievers.candidates import rank, rows_per_batch
from llmrec.retrievers.lightfm import LightFM


def histories(users: int, items: int, length: int) -> Sequences:
    """Users with `length` uniform training events each, a validation and a test event."""
    split = np.tile(np.array([TRAIN] * length + [VALID, TEST], dtype=np.int8), users)
    drawn = np.random.default_rng(0).integers(1, items + 1, len(split), dtype=np.int32)
    return Sequences(np.arange(users + 1, dtype=np.int64) * (length + 2), drawn, np.full(len(split), np.nan, np.float32), split, items)


def ranked(users: int, items: int, dim: int, candidates: int) -> dict[str, Any]:
    """Rank the catalogue for every user's test event."""
    torch.manual_seed(0)
    model = LightFM(torch.randn(users, dim), torch.randn(items, dim), torch.randn(items))
    sequences = histories(users, items, 50)
    before = memory("VmHWM")
    begun = time.perf_counter()
    cases = sequences.cases("test")
    found = rank(model, sequences, cases, candidates, repeats=False, batch=rows_per_batch(items))
    seconds = time.perf_counter() - begun
    measured = {name: round(value, 5) for name, value in metrics.summary(found.target_rank).items() if name.endswith("@10")}
    return {
        "seconds": round(seconds, 2),
        "users_per_s": round(users / seconds),
        "peak_mb": round(memory("VmHWM")),
        "peak_before_mb": round(before),
        "random_model": measured | {"expected_hr@10": round(10 / items, 5)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=26_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=100, help="items kept per user")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    same_settings()
    torch.set_num_threads(options.threads)
    sizes = {"users": options.users, "items": options.items, "dim": options.dim, "candidates": options.candidates}
    report(sizes | {"threads": options.threads} | ranked(options.users, options.items, options.dim, options.candidates))


if __name__ == "__main__":
    main()
