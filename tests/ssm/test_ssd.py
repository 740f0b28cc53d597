"""The chunked scan against the recurrence it computes and its matrix, where numbers are extreme, and in half precision."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmrec.ssm import ssd
from llmrec.ssm.ssd import _chunk_that_fits, ssd_step
from tests.ssm.oracles import assert_near, assert_right_in_float32, log_uniform, positions, results, source, ssd_by_steps, ssd_inputs

CASES = [
    {},
    {"D": False, "state": False},
    {"groups": 1},
    {"groups": 4, "headdim": 1},
    {"packed": True},
    {"packed": True, "groups": 1, "state": False},
]


def assert_same_results(inputs, **settings):
    ours, expected = results(ssd, inputs, torch.float64, **settings), results(ssd_by_steps, inputs, torch.float64)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_recurrence(length, chunk, case):
    assert_same_results(ssd_inputs(length, **case), chunk=chunk)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    headdim=st.integers(1, 4),
    d_state=st.integers(1, 5),
    chunk=st.integers(1, 24),
)
def test_sizes_of_all_kinds(batch, length, groups, heads_per_group, headdim, d_state, chunk):
    assert_same_results(ssd_inputs(length, batch, groups * heads_per_group, headdim, groups, d_state), chunk=chunk)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [4, 64])
def test_output_is_the_semiseparable_matrix_product(chunk, groups):
    """M[i, j] = C_i B_j dt_j exp(A (dt_{j+1} + ... + dt_i)) for j <= i, and D on the diagonal (arXiv 2405.21060, section 3.2)."""
    inputs = ssd_inputs(11, groups=groups, state=False)
    y, _ = ssd(**inputs, chunk=chunk)
    for row in range(2):
        for head in range(4):
            dt, A = inputs["dt"][row, :, head], inputs["A"][head]
            B, C = (inputs[name][row, :, head // (4 // groups)] for name in ("B", "C"))
            M = torch.diag(inputs["D"][head].repeat(11))
            for i in range(11):
                for j in range(i + 1):
                    M[i, j] += C[i].dot(B[j]) * dt[j] * torch.exp(A * dt[j + 1 : i + 1].sum())
            assert_close(y[row, :, head], M @ inputs["x"][row, :, head])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed):
    inputs = ssd_inputs(7, heads=2, headdim=2, groups=1, d_state=2, packed=packed)
    seq_idx = inputs.pop("seq_idx")
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: ssd(*args[:-1], state=args[-1], seq_idx=seq_idx, chunk=3), leaves)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_results_may_go_without_a_gradient(which):
    ours, expected = (
        results(lambda **inputs: function(**inputs)[which : which + 1], ssd_inputs(9), torch.float64)  # noqa: B023
        for function in (ssd, ssd_by_steps)
    )
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("state", [True, False])
def test_the_last_state_need_not_be_asked_for(length, state):
    inputs = ssd_inputs(length, state=state)
    (y, *gradients), (expected, *others) = (
        results(lambda **inputs: ssd(**inputs, chunk=4, return_state=asked)[:1], inputs, torch.float64)  # noqa: B023
        for asked in (False, True)
    )
    assert ssd(**inputs, return_state=False)[1] is None
    assert_close(y, expected)
    for one, other in zip(gradients, others, strict=True):
        assert_close(one, other)


@settings(max_examples=30)
@given(length=st.integers(2, 30), cut=st.integers(1, 29), chunk=st.integers(1, 9), second=st.integers(1, 40))
def test_state_carried_over_a_split_equals_one_pass(length, cut, chunk, second):
    """Also where the row holds two sequences, the second from position `second` on: the state goes on with the one that is cut."""
    cut = min(cut, length - 1)
    assume(cut != second)
    inputs = ssd_inputs(length) | {"seq_idx": (torch.arange(length) >= second).long().expand(2, -1)}
    y, end = ssd(**inputs, chunk=chunk)
    first, state = ssd(**positions(inputs, slice(cut)), chunk=chunk)
    rest, final = ssd(**positions(inputs, slice(cut, None), state=state), chunk=chunk)
    assert_close(torch.cat([first, rest], 1), y)
    assert_close(final, end)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("lengths", [[3, 1, 7, 2, 5], [1, 1, 1], [12, 4, 1]])
def test_packed_sequences_equal_separate_ones(lengths, chunk):
    inputs = ssd_inputs(sum(lengths), state=False)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    y, end = ssd(**inputs | {"seq_idx": seq_idx}, chunk=chunk)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    separate = [ssd(**positions(inputs, slice(*bound)), chunk=chunk) for bound in pairwise(bounds)]
    assert_close(y, torch.cat([piece for piece, _ in separate], 1))
    assert_close(end, separate[-1][1])


def test_a_step_of_zero_changes_nothing():
    inputs = ssd_inputs(12, D=False)
    y, end = ssd(**positions(inputs, slice(7)), chunk=4)
    inputs["dt"][:, 7:] = 0
    inputs["C"][:, 7:] = inputs["C"][:, 6:7]
    longer, same = ssd(**inputs, chunk=4)
    assert_close(longer[:, :7], y)
    assert_close(longer[:, 7:], y[:, -1:].expand(-1, 5, -1, -1))
    assert_close(same, end)


def test_one_step_after_the_other():
    inputs = ssd_inputs(6)
    y, end = ssd(**inputs)
    state = inputs["state"]
    for t in range(6):
        x, dt, B, C = (inputs[name][:, t] for name in ("x", "dt", "B", "C"))
        out, state = ssd_step(x, dt, inputs["A"], B, C, inputs["D"], state)
        assert_close(out, y[:, t])
    assert_close(state, end)


def extreme_inputs(steps, decay, scale, length=150):
    """Steps log-uniform between two; heads that forget at once and heads that never do."""
    inputs, normal = ssd_inputs(length, headdim=4, d_state=16), source(1)
    inputs["dt"] = log_uniform(normal(2, length, 4), *steps)
    inputs["A"] = -decay * torch.tensor([1.0, 0.3, 0.01, 1e-8], dtype=torch.float64)
    inputs["x"] *= scale
    inputs["state"] *= scale
    return inputs


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("decay", [1.0, 1e4])
@pytest.mark.parametrize("steps", [(1e-12, 1e6), (1e-12, 1e-12), (1e6, 1e6)])
@pytest.mark.usefixtures("code")
def test_extreme_numbers(steps, decay, scale):
    assert_right_in_float32(ssd, ssd_by_steps, extreme_inputs(steps, decay, scale))


@pytest.mark.usefixtures("code")
def test_float32_is_right_where_layers_start():
    """Steps from 1e-3 to 0.1 and decays up to 16: the gradients of dt and A without any allowance."""
    inputs = {name: t if t is None else t.float() for name, t in extreme_inputs((1e-3, 0.1), 16.0, 1.0, length=300).items()}
    ours, expected = results(ssd, inputs, torch.float32), results(ssd_by_steps, inputs, torch.float64)
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, to=5e-6)


@pytest.mark.usefixtures("code")
def test_a_single_step_that_forgets_everything():
    inputs = extreme_inputs((1e-3, 0.1), 1.0, 1.0)
    inputs["dt"][:, 70] = 1e5
    assert_right_in_float32(ssd, ssd_by_steps, inputs)
    (y, _), (expected, _) = (function(**inputs) for function in (ssd, ssd_by_steps))
    assert_near(y[:, 71:], expected[:, 71:], to=2e-6)  # what comes after is much smaller


@pytest.mark.parametrize(
    ("decay", "length", "chunk", "expected"),
    [
        (0.0, 192, 64, 64),
        (0.0, 100, 64, 50),  # a divisor, where one is not much smaller: nothing to pad
        (0.0, 97, 64, 64),
        (0.0, 10, 64, 10),
        (1.0, 640, 64, 64),  # float32 has room for exp of 1.1 * 88.7 = 97.6 over a block
        (2.0, 640, 64, 32),
        (20.0, 640, 64, 4),
        (40.0, 640, 64, 2),
        (1e9, 640, 64, 1),
    ],
)
def test_a_block_is_no_longer_than_the_range_allows(decay, length, chunk, expected):
    assert _chunk_that_fits(torch.full((2, length, 3), -decay), chunk) == expected


@settings(max_examples=50)
@given(length=st.integers(1, 200), chunk=st.integers(1, 70), scale=st.floats(-3, 4), where=st.integers(0, 199))
def test_no_block_leaves_the_range(length, chunk, scale, where):
    decay = -source(length)(2, length, 3).abs() * 10**scale
    decay[1, min(where, length - 1), 2] = -1e6
    size = _chunk_that_fits(decay, chunk)
    assert 1 <= size <= chunk
    for block in decay.split(size, 1):
        assert block[:, 1:].sum(1).min() >= -1.1 * math.log(torch.finfo(torch.float64).max)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(code, dtype):
    inputs = {name: t if t is None else t.to(dtype) for name, t in ssd_inputs(70, d_state=16).items()}
    ours, expected = results(ssd, inputs, dtype), results(ssd_by_steps, inputs, torch.float64)
    assert [t.dtype for t in ours] == [dtype, torch.float32, *[dtype] * 7]
    assert_near(ours[1], expected[1], to=1e-6)
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, to=torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_scan(code):
    inputs = ssd_inputs(70, d_state=16)
    plain = results(ssd, inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(results(ssd, inputs, torch.float32), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_in_gives_nothing_out(batch, length, packed):
    inputs = ssd_inputs(length, batch)
    if packed:
        inputs["seq_idx"] = torch.zeros(batch, length, dtype=torch.long)
    y, end = ssd(**inputs)
    assert y.shape == (batch, length, 4, 3)
    assert torch.equal(end, inputs["state"])
    y, end = ssd(**inputs | {"state": None})
    assert torch.equal(end, torch.zeros(batch, 4, 3, 5, dtype=torch.float64))
    assert ssd(**inputs, return_state=False)[1] is None


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        ssd(**ssd_inputs(5) | {"B": torch.ones(2, 5, 3, 5), "C": torch.ones(2, 5, 3, 5)})


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "state", "seq_idx"])
@pytest.mark.usefixtures("code")
def test_a_tensor_of_another_size_is_refused(name):
    inputs = ssd_inputs(9, d_state=16, packed=True)
    for dim in range(inputs[name].dim()):
        with pytest.raises(ValueError, match="B|C" if name in "BC" else name):
            ssd(**inputs | {name: inputs[name].narrow(dim, 0, 1)})
