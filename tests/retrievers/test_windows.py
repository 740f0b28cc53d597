import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmrec.config import Training
from llmrec.data.sequences import TEST, VALID, Sequences
from llmrec.retrievers import windows


def sequences_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.concatenate([np.arange(1, n + 1) for n in lengths]).astype(np.int32)
    split = np.zeros(len(items), dtype=np.int8)
    split[offsets[1:] - 1], split[offsets[1:] - 2] = TEST, VALID
    return Sequences(offsets, items, np.ones(len(items), dtype=np.float32), split, max(lengths))


def cut(lengths, length, seed=0, **settings):
    return windows.cut(sequences_of(lengths), Training(max_length=length, **settings), np.random.default_rng(seed))


some_lengths = st.lists(st.integers(3, 60), min_size=1, max_size=8)


@given(lengths=some_lengths, length=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_training_transition_is_a_target_once_and_nothing_held_out_is(lengths, length, seed):
    pieces = cut(lengths, length, seed)
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)
    targets = sorted(int(item) for piece in pieces for item in piece[1:])
    assert targets == sorted(item for n in lengths for item in range(2, n - 1))


def test_last_takes_the_end_of_the_training_part():
    (piece,) = cut([20], 4, windows="last")
    assert piece.tolist() == [14, 15, 16, 17, 18]


@given(lengths=some_lengths, length=st.integers(1, 12), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_prefixes_are_different_and_end_in_the_training_part(lengths, length, count, seed):
    pieces = cut(lengths, length, seed, windows="prefixes", prefixes_per_user=count)
    assert len(pieces) == sum(min(count, max(0, n - 3)) for n in lengths)
    assert len(cut([60], length, seed, windows="prefixes", prefixes_per_user=count)) == count
    assert len({int(piece[-1]) for piece in cut([60], length, seed, windows="prefixes", prefixes_per_user=count)}) == count
    for piece in pieces:
        assert 2 <= len(piece) <= length + 1
        assert len(piece) == min(piece[-1], length + 1)  # items count from 1, so the last one says how long the prefix is
        assert piece[-1] <= max(lengths) - 2


@given(lengths=some_lengths, size=st.integers(1, 4), last_only=st.booleans())
def test_no_row_of_inputs_holds_its_last_target(lengths, size, last_only):
    pieces = cut(lengths, 7, windows="prefixes")
    for inputs, targets in windows.batches(pieces, size, np.random.default_rng(0), last_only=last_only):
        for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            real = [item for item in row if item]
            expected = [item + 1 for item in real]  # everyone counts
            assert answers[: len(real)] == (expected if not last_only else [0] * (len(real) - 1) + expected[-1:])
            assert not any(answers[len(real) :])
            assert max(answers) not in row


def test_batches_hold_every_piece_once_and_depend_on_the_seed_alone():
    pieces = cut([9, 30, 14, 22], 5)

    def order(seed):
        return [(a.tolist(), b.tolist()) for a, b in windows.batches(pieces, 3, np.random.default_rng(seed))]

    assert order(1) == order(1) != order(2)
    seen = [[i for i in row if i] for _, targets in order(1) for row in targets]
    assert sorted(seen) == sorted(piece[1:].tolist() for piece in pieces)
