"""The order of rows, and how a step is cut into forward passes and dealt to processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmrec.rankers.steps import Steps, deal


def flat(steps):
    return [row for step in steps for row in step]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 200, 203])
def test_an_epoch_has_every_row_once(count):
    steps = Steps([1 + at * 7 % 50 for at in range(count)], size=8, seed=0)
    assert sorted(flat(steps)) == list(range(count))
    assert [len(step) for step in steps] == [8] * (count // 8) + [count % 8] * bool(count % 8)
    assert len(steps) == len(list(steps))


def test_order_depends_on_seed_and_epoch_alone():
    lengths = [1 + at * 7 % 50 for at in range(100)]
    steps = Steps(lengths, size=8, seed=3)
    first = list(steps)
    assert list(steps) == first
    steps.set_epoch(1)
    assert list(steps) != first
    assert list(Steps(lengths, size=8, seed=4)) != first
    steps.set_epoch(0)
    torch.rand(3)
    assert list(steps) == first


def test_steps_pad_little():
    lengths = torch.randint(100, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(steps):
        return sum(max(lengths[row] for row in step) * len(step) for step in steps)

    assert padded(Steps(lengths, size=8, seed=0)) < 1.1 * sum(lengths)
    assert padded([range(at, at + 8) for at in range(0, 400, 8)]) > 1.4 * sum(lengths)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=14)
LIMITS = {"rows": st.none() | st.integers(1, 5), "tokens": st.none() | st.integers(1, 150), "processes": st.integers(1, 5)}


def padded(piece, lengths, copies=None):
    return sum(copies[at] if copies else 1 for at in piece) * max((lengths[at] for at in piece), default=0)


@given(data=st.data(), lengths=LENGTHS, **LIMITS)
def test_every_row_is_dealt_once_within_the_limits(data, lengths, rows, tokens, processes):
    copies = data.draw(st.lists(st.integers(1, 4), min_size=len(lengths), max_size=len(lengths)))
    dealt = deal(lengths, copies, rows, tokens, processes)
    assert len(dealt) == processes
    assert len({len(passes) for passes in dealt}) == 1
    pieces = [piece for passes in dealt for piece in passes]
    assert sorted(flat(pieces)) == list(range(len(lengths)))
    for piece in pieces:
        assert rows is None or len(piece) <= rows
        assert tokens is None or len(piece) == 1 or padded(piece, lengths, copies) <= tokens


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), **LIMITS)
def test_no_fewer_passes_would_do(lengths, rows, tokens, processes):
    """Against all ways to cut the sorted rows into consecutive pieces."""
    ordered = sorted(lengths, reverse=True)

    def allowed(piece):
        return (rows is None or len(piece) <= rows) and (tokens is None or len(piece) == 1 or len(piece) * piece[0] <= tokens)

    fewest, smallest = len(ordered), {}
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        borders = [0, *(at + 1 for at, cut in enumerate(cuts) if cut), len(ordered)]
        pieces = [ordered[start:stop] for start, stop in itertools.pairwise(borders)]
        if all(map(allowed, pieces)):
            fewest = min(fewest, len(pieces))
            largest = max(len(piece) * piece[0] for piece in pieces)
            smallest[len(pieces)] = min(largest, smallest.get(len(pieces), largest))
    passes = -(-fewest // processes)
    dealt = deal(lengths, [1] * len(lengths), rows, tokens, processes)
    assert len(dealt[0]) == passes
    best = min(largest for count, largest in smallest.items() if count <= passes * processes)
    assert max(padded(piece, lengths) for one in dealt for piece in one) == best


def test_two_processes_get_passes_of_similar_size():
    first, second = deal([90, 80, 40, 40, 20, 20, 10, 10], [1] * 8, rows=None, tokens=100, processes=2)
    assert [[len(piece) for piece in passes] for passes in (first, second)] == [[1, 2], [1, 4]]


def test_a_batch_is_spread_over_the_processes():
    assert [[len(piece) for piece in passes] for passes in deal([5] * 8, [1] * 8, rows=4, tokens=None, processes=4)] == [[2]] * 4
    assert [[len(piece) for piece in passes] for passes in deal([5] * 8, [1] * 8, rows=4, tokens=None, processes=1)] == [[4, 4]]
    assert [[len(piece) for piece in passes] for passes in deal([5], [1], rows=4, tokens=None, processes=3)] == [[1], [0], [0]]
