"""The convolution against its sum and torch's, with later positions, earlier inputs and several sequences in a row."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmrec.ssm import conv
from llmrec.ssm.conv import conv_silu, conv_step, last_inputs
from tests.ssm.oracles import assert_near, conv_by_steps, conv_inputs, random_input, results

CASES = [{}, {"bias": False}, {"before": True}, {"packed": True}, {"before": True, "packed": True}]


@pytest.fixture(params=[1, 30, 1 << 20])
def slab(request, monkeypatch):
    """Elements worked on at a time: less than a position's, some positions' or, of few positions, some rows'; everything."""
    monkeypatch.setattr(conv, "SLAB", request.param)


def assert_same_results(inputs, sizes, ahead):
    ours = results(conv_silu, inputs, torch.float64, sizes=sizes, ahead=ahead)
    expected = results(conv_by_steps, inputs, torch.float64, sizes=sizes, ahead=ahead)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("length", [2, 17])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("slab")
def test_results_and_gradients_are_those_of_the_sum(length, ahead, case):
    assert_same_results(conv_inputs(length, **case), [3, 1, 2], ahead)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 14),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    width=st.integers(1, 7),
    ahead=st.integers(0, 6),
    slab=st.integers(1, 200),
    before=st.booleans(),
)
def test_sizes_of_all_kinds(batch, length, sizes, width, ahead, slab, before):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "SLAB", slab)
        assert_same_results(conv_inputs(length, batch, sum(sizes), width, before=before), sizes, min(ahead, width - 1))


@pytest.mark.parametrize(("width", "ahead"), [(4, 0), (7, 3), (2, 1)])
def test_outputs_are_those_of_torchs_convolution(width, ahead):
    inputs = conv_inputs(19, width=width)
    padded = F.pad(inputs["x"].mT, (width - 1 - ahead, ahead))
    expected = F.silu(F.conv1d(padded, inputs["weight"], inputs["bias"], groups=6)).mT
    (y,) = conv_silu(**inputs, sizes=[6], ahead=ahead)
    assert_close(y, expected)


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "packed"), [(False, False), (True, True)])
def test_gradients_are_those_of_finite_differences(ahead, before, packed, monkeypatch):
    monkeypatch.setattr(conv, "SLAB", 15)
    inputs = conv_inputs(7, channels=3, before=before, packed=packed)
    names = [name for name in ("x", "weight", "bias", "before") if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*tensors):
        return conv_silu(**inputs | dict(zip(names, tensors, strict=True)), sizes=[2, 1], ahead=ahead)

    assert torch.autograd.gradcheck(function, leaves)


def test_a_piece_may_go_without_a_gradient():
    ours, expected = (
        results(lambda **inputs: function(**inputs, sizes=[3, 1, 2])[1:2], conv_inputs(9), torch.float64)  # noqa: B023
        for function in (conv_silu, conv_by_steps)
    )
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


def test_pieces_are_of_their_own_memory():
    """A scan of one of them need not copy, and writing into one leaves the others alone."""
    pieces = conv_silu(**conv_inputs(9), sizes=[3, 1, 2])
    assert all(piece.is_contiguous() for piece in pieces)
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 3


def test_packed_sequences_equal_separate_ones():
    x, (weight, bias), lengths = random_input(2, 18, 6), (random_input(6, 1, 4), random_input(6)), [3, 1, 7, 2, 5]
    seq_idx = torch.arange(5).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    separate = [conv_silu(piece, weight, bias, [6], ahead=1)[0] for piece in x.split(lengths, 1)]
    assert_close(conv_silu(x, weight, bias, [6], ahead=1, seq_idx=seq_idx)[0], torch.cat(separate, 1))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_after_the_other(width, bias):
    inputs = conv_inputs(6, width=width, before=True, bias=bias)
    (y,) = conv_silu(**inputs, sizes=[6])
    before = inputs["before"]
    for t in range(6):
        out, before = conv_step(inputs["x"][:, t], inputs["weight"], inputs["bias"], before)
        assert_close(out, y[:, t])
    assert torch.equal(before, last_inputs(inputs["x"], width, inputs["before"]))


@settings(max_examples=30)
@given(length=st.integers(1, 12), cut=st.integers(0, 12), width=st.integers(1, 5))
def test_last_inputs_continue(length, cut, width):
    inputs, cut = conv_inputs(length, width=width, before=True), min(cut, length)
    x, before = inputs["x"], inputs["before"]
    (whole,) = conv_silu(**inputs, sizes=[6])
    (first,) = conv_silu(**inputs | {"x": x[:, :cut]}, sizes=[6])
    (second,) = conv_silu(**inputs | {"x": x[:, cut:], "before": last_inputs(x[:, :cut], width, before)}, sizes=[6])
    assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("given_before", [False, True])
def test_last_inputs_of_rows_that_end_early(given_before):
    x, before = random_input(4, 6, 3), random_input(4, 3, 3) if given_before else None
    ends = torch.tensor([6, 4, 1, 0])
    found = last_inputs(x, 4, before, ends)
    for row, end in enumerate(ends.tolist()):
        earlier = None if before is None else before[row : row + 1]
        assert torch.equal(found[row : row + 1], last_inputs(x[row : row + 1, :end], 4, earlier))


def test_last_inputs_of_a_short_sequence_after_another_one():
    x, before = random_input(2, 6, 3), random_input(2, 3, 3)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1], [7, 8, 8, 8, 8, 8]])
    found = last_inputs(x, 4, before, seq_idx=seq_idx)
    assert torch.equal(found, torch.stack([F.pad(x[0, 4:], (0, 0, 1, 0)), x[1, 3:]]))
    assert torch.equal(last_inputs(x[:, :2], 4, before, seq_idx=seq_idx[:, :2])[0], torch.cat([before[0, -1:], x[0, :2]]))
    assert torch.equal(last_inputs(x[:, :2], 4, before, seq_idx=seq_idx[:, :2])[1], F.pad(x[1, 1:2], (0, 0, 2, 0)))
    early = last_inputs(x, 4, before, ends=torch.tensor([5, 1]), seq_idx=seq_idx)
    assert torch.equal(early[0], F.pad(x[0, 4:5], (0, 0, 2, 0)))
    assert torch.equal(early[1], torch.cat([before[1, -2:], x[1, :1]]))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_extreme_numbers(code, scale):
    inputs = {name: t if t is None else t.float() for name, t in (conv_inputs(20, channels=20) | {"before": None}).items()}
    inputs["x"] *= scale
    ours = results(conv_silu, inputs, torch.float32, sizes=[20])
    for one, other in zip(ours, results(conv_by_steps, inputs, torch.float64, sizes=[20]), strict=True):
        assert_near(one, other, to=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    inputs = {name: t if t is None else t.to(dtype) for name, t in conv_inputs(40, before=True).items()}
    ours, expected = results(conv_silu, inputs, dtype, sizes=[4, 2]), results(conv_by_steps, inputs, torch.float64, sizes=[4, 2])
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, to=4 * torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_convolution(code):
    inputs = conv_inputs(40, before=True)
    plain = results(conv_silu, inputs, torch.float32, sizes=[4, 2])
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(results(conv_silu, inputs, torch.float32, sizes=[4, 2]), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_in_gives_nothing_out(batch, length, before):
    pieces = conv_silu(**conv_inputs(length, batch, before=before), sizes=[4, 2])
    assert [piece.shape for piece in pieces] == [(batch, length, 4), (batch, length, 2)]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("weight", torch.ones(5, 1, 4)),
        ("bias", torch.ones(5)),
        ("before", torch.ones(2, 4, 6)),
        ("before", torch.ones(1, 3, 6)),
        ("seq_idx", torch.ones(2, 8)),
        ("seq_idx", torch.ones(1, 9)),
        ("sizes", [3, 2]),
    ],
)
@pytest.mark.usefixtures("code")
def test_other_sizes_are_refused(name, wrong):
    inputs = {**conv_inputs(9, before=True, packed=True), "sizes": [3, 3]}
    with pytest.raises(ValueError, match=name):
        conv_silu(**inputs | {name: wrong})
