import numpy as np
import pytest

from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences


@pytest.fixture
def counting() -> Sequences:
    """60 users who count upwards through 30 items from a place of their own: the next item follows from the last."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 25, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.concatenate([(random.integers(30) + np.arange(n)) % 30 + 1 for n in lengths]).astype(np.int32)
    split = np.full(len(items), TRAIN, dtype=np.int8)
    split[offsets[1:] - 1], split[offsets[1:] - 2] = TEST, VALID
    return Sequences(offsets, items, np.full(len(items), 3, dtype=np.float32), split, 30)
