"""A small evaluation, made up: 300 users, 20 candidates, a ranker that helps a little."""

import numpy as np
import pytest

from llmrec.evaluation import compare


@pytest.fixture(scope="session")
def ranks():
    """Ranks of four systems; 0 where the target was not retrieved, the same users for all."""
    random = np.random.default_rng(0)
    users, candidates = 300, 20
    hit = random.random(users) < 0.4
    retriever = random.integers(1, candidates + 1, users)
    better = np.maximum(1, retriever - random.integers(0, 4, users))
    systems = {"retriever": retriever, "sft": random.integers(1, candidates + 1, users), "orpo": better, "fused": better}
    return {name: np.where(hit, rank, 0) for name, rank in systems.items()}


@pytest.fixture(scope="session")
def table(ranks):
    return compare.table(ranks, candidates=20, resamples=500)
