"""The scan of Mamba-1 against the recurrence it computes and its matrix, where numbers are extreme, and in half precision."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmrec.ssm import scan
from llmrec.ssm.scan import selective_scan, selective_scan_step
from tests.ssm.oracles import assert_near, assert_right_in_float32, log_uniform, positions, results, scan_by_steps, scan_inputs, source

CASES = [{}, {"D": False, "state": False}, {"packed": True}, {"packed": True, "state": False}]


@pytest.fixture(params=[1, 3, 1 << 19])
def segment(request, monkeypatch):
    """Positions walked at a time, of two rows with 6 channels and 5 states: the last is all of them."""
    monkeypatch.setattr(scan, "SEGMENT", request.param * 2 * 6 * 5)


def assert_same_results(inputs):
    ours, expected = results(selective_scan, inputs, torch.float64), results(scan_by_steps, inputs, torch.float64)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("segment")
def test_results_and_gradients_are_those_of_the_recurrence(length, case):
    assert_same_results(scan_inputs(length, **case))


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.integers(1, 6),
    d_state=st.integers(1, 5),
    entries=st.integers(1, 99),
)
def test_sizes_of_all_kinds(batch, length, channels, d_state, entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SEGMENT", entries)
        assert_same_results(scan_inputs(length, batch, channels, d_state))


@pytest.mark.usefixtures("segment")
def test_output_is_the_matrix_product():
    """M[i, j] = sum over the states n of C_i[n] exp(A[n] (dt_{j+1} + ... + dt_i)) B_j[n] dt_j for j <= i, and D on the diagonal."""
    inputs = scan_inputs(11, state=False)
    y, _ = selective_scan(**inputs)
    for row in range(2):
        B, C = inputs["B"][row], inputs["C"][row]
        for channel in range(6):
            dt, A = inputs["dt"][row, :, channel], inputs["A"][channel]
            M = torch.diag(inputs["D"][channel].repeat(11))
            for i in range(11):
                for j in range(i + 1):
                    M[i, j] += (C[i] * torch.exp(A * dt[j + 1 : i + 1].sum()) * B[j]).sum() * dt[j]
            assert_close(y[row, :, channel], M @ inputs["x"][row, :, channel])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed, monkeypatch):
    monkeypatch.setattr(scan, "SEGMENT", 3 * 2 * 2 * 3)
    inputs = scan_inputs(7, channels=2, d_state=3, packed=packed)
    seq_idx = inputs.pop("seq_idx")
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args[:-1], state=args[-1], seq_idx=seq_idx), leaves)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_results_may_go_without_a_gradient(which):
    ours, expected = (
        results(lambda **inputs: function(**inputs)[which : which + 1], scan_inputs(9), torch.float64)  # noqa: B023
        for function in (selective_scan, scan_by_steps)
    )
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@settings(max_examples=30)
@given(length=st.integers(2, 30), cut=st.integers(1, 29), second=st.integers(1, 40))
def test_state_carried_over_a_split_equals_one_pass(length, cut, second):
    """Also where the row holds two sequences, the second from position `second` on: the state goes on with the one that is cut."""
    cut = min(cut, length - 1)
    assume(cut != second)
    inputs = scan_inputs(length) | {"seq_idx": (torch.arange(length) >= second).long().expand(2, -1)}
    y, end = selective_scan(**inputs)
    first, state = selective_scan(**positions(inputs, slice(cut)))
    rest, final = selective_scan(**positions(inputs, slice(cut, None), state=state))
    assert_close(torch.cat([first, rest], 1), y)
    assert_close(final, end)


@pytest.mark.parametrize("lengths", [[3, 1, 7, 2, 5], [1, 1, 1]])
@pytest.mark.usefixtures("segment")
def test_packed_sequences_equal_separate_ones(lengths):
    inputs = scan_inputs(sum(lengths), state=False)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    y, end = selective_scan(**inputs | {"seq_idx": seq_idx})
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    separate = [selective_scan(**positions(inputs, slice(*bound))) for bound in pairwise(bounds)]
    assert_close(y, torch.cat([piece for piece, _ in separate], 1))
    assert_close(end, separate[-1][1])


def test_a_step_of_zero_changes_nothing():
    inputs = scan_inputs(12, D=False)
    y, end = selective_scan(**positions(inputs, slice(7)))
    inputs["dt"][:, 7:] = 0
    inputs["C"][:, 7:] = inputs["C"][:, 6:7]
    longer, same = selective_scan(**inputs)
    assert_close(longer[:, :7], y)
    assert_close(longer[:, 7:], y[:, -1:].expand(-1, 5, -1))
    assert_close(same, end)


def test_one_step_after_the_other():
    inputs = scan_inputs(6)
    y, end = selective_scan(**inputs)
    state = inputs["state"]
    for t in range(6):
        x, dt, B, C = (inputs[name][:, t] for name in ("x", "dt", "B", "C"))
        out, state = selective_scan_step(x, dt, inputs["A"], B, C, inputs["D"], state)
        assert_close(out, y[:, t])
    assert_close(state, end)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("decay", [1.0, 1e4])
@pytest.mark.parametrize("steps", [(1e-12, 1e6), (1e-12, 1e-12), (1e6, 1e6), (1e-3, 0.1)])
@pytest.mark.usefixtures("code")
def test_extreme_numbers(steps, decay, scale):
    """In every channel, states that forget at once and states that never do; all results and gradients are right."""
    inputs, normal = scan_inputs(150, d_state=16), source(1)
    inputs["dt"] = log_uniform(normal(2, 150, 6), *steps)
    inputs["A"] = -decay * 10 ** -torch.linspace(0, 8, 16, dtype=torch.float64).expand(6, -1)
    inputs["x"] *= scale
    inputs["state"] *= scale
    assert_right_in_float32(selective_scan, scan_by_steps, inputs, zero=1e-36 * max(1, scale) * max(1, steps[1]) ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(code, dtype):
    inputs = {name: t if t is None else t.to(dtype) for name, t in scan_inputs(70, d_state=16).items()}
    ours, expected = results(selective_scan, inputs, dtype), results(scan_by_steps, inputs, torch.float64)
    assert [t.dtype for t in ours] == [dtype, torch.float32, *[dtype] * 7]
    assert_near(ours[1], expected[1], to=1e-6)
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, to=torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_scan(code):
    inputs = scan_inputs(70, d_state=16)
    plain = results(selective_scan, inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(results(selective_scan, inputs, torch.float32), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_in_gives_nothing_out(batch, length, packed):
    inputs = scan_inputs(length, batch)
    if packed:
        inputs["seq_idx"] = torch.zeros(batch, length, dtype=torch.long)
    y, end = selective_scan(**inputs)
    assert y.shape == (batch, length, 6)
    assert torch.equal(end, inputs["state"])
    y, end = selective_scan(**inputs | {"state": None})
    assert torch.equal(end, torch.zeros(batch, 6, 5, dtype=torch.float64))
    assert selective_scan(**inputs, return_state=False)[1] is None


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "state", "seq_idx"])
@pytest.mark.usefixtures("code")
def test_a_tensor_of_another_size_is_refused(name):
    inputs = scan_inputs(9, d_state=16, packed=True)
    for dim in range(inputs[name].dim()):
        with pytest.raises(ValueError, match="A|B" if name == "A" else name):
            selective_scan(**inputs | {name: inputs[name].narrow(dim, 0, 1)})
