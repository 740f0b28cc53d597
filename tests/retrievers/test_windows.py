import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.sequences import TEST, VALID, Sequences
from llmrec.retrievers import windows


def sequences_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.concatenate([np.arange(1, n + 1) for n in lengths]).astype(np.int32)
    split = np.zeros(len(items), dtype=np.int8)
    split[offsets[1:] - 1], split[offsets[1:] - 2] = TEST, VALID
    return Sequences(offsets, items, np.ones(len(items), dtype=np.float32), split, max(lengths))


@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=8), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_training_transition_is_a_target_once_and_nothing_held_out_is(lengths, length, seed):
    pieces = windows.cut(sequences_of(lengths), length, latest_only=False, shift=np.random.default_rng(seed))
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)
    targets = sorted(int(item) for piece in pieces for item in piece[1:])
    assert targets == sorted(item for n in lengths for item in range(2, n - 1))


def test_latest_only_takes_the_end_of_the_training_part():
    (piece,) = windows.cut(sequences_of([20]), 4, latest_only=True)
    assert piece.tolist() == [14, 15, 16, 17, 18]


def test_batches_hold_every_piece_once_and_depend_on_the_seed_alone():
    pieces = windows.cut(sequences_of([9, 30, 14, 22]), 5, latest_only=False)

    def order(seed):
        return [(a.tolist(), b.tolist()) for a, b in windows.batches(pieces, 3, np.random.default_rng(seed))]

    assert order(1) == order(1) != order(2)
    seen = [[i for i in row if i] for _, targets in order(1) for row in targets]
    assert sorted(seen) == sorted(piece[1:].tolist() for piece in pieces)
