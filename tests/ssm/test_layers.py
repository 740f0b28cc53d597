"""What Mamba and Mamba2 have in common: states, steps, padding, packing, causality, half precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmrec.ssm import Mamba, Mamba2
from tests.ssm.oracles import assert_near, layer_results, random_input

LAYERS = {
    "mamba": lambda: Mamba(12, d_state=5, dt_rank=2),
    "mamba2": lambda: Mamba2(12, d_state=5, headdim=6, chunk_size=4),
    "mamba2, 2 groups": lambda: Mamba2(12, d_state=5, headdim=6, ngroups=2, chunk_size=64),
}


def random_layer(kind):
    """A float64 layer none of whose parameters is at its start: equal entries would hide a mix-up."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.fixture(params=LAYERS)
def layer(request):
    return random_layer(request.param)


@torch.no_grad()
def test_steps_equal_one_pass(layer):
    u = random_input(2, 11, 12)
    expected, end = layer(u, return_state=True)
    state, outputs = layer.initial_state(2), []
    for t in range(11):
        out, state = layer.step(state, u[:, t])
        outputs.append(out)
    assert_close(torch.stack(outputs, 1), expected)
    assert_close(state, end)


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=15)
@given(length=st.integers(1, 14), cuts=st.lists(st.integers(0, 14), max_size=3))
@torch.no_grad()
def test_state_carried_over_splits_equals_one_pass(kind, length, cuts):
    """Also over parts shorter than the convolution, and empty ones."""
    layer, u = random_layer(kind), random_input(2, length, 12)
    expected, end = layer(u, return_state=True)
    state, parts = None, []
    for part in u.tensor_split(sorted(cuts), 1):
        out, state = layer(part, state=state, return_state=True)
        parts.append(out)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, end)


def test_gradients_pass_through_the_state(layer):
    u = random_input(2, 9, 12)
    whole = layer_results(layer, u)

    def in_two(u):
        first, state = layer(u[:, :4], return_state=True)
        return torch.cat([first, layer(u[:, 4:], state=state)], 1)

    in_two.named_parameters = layer.named_parameters
    for name, value in layer_results(in_two, u).items():
        assert_close(value, whole[name], msg=name)


@torch.no_grad()
def test_a_state_may_be_used_again(layer):
    _, state = layer(random_input(2, 5, 12), return_state=True)
    before = [t.clone() for t in state]
    for _ in range(2):
        layer(random_input(2, 5, 12), state=state, return_state=True)
        layer.step(state, random_input(2, 12))
    assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))


@torch.no_grad()
def test_right_padding_changes_neither_outputs_nor_states(layer):
    """Rows of several lengths, shorter than the convolution and empty, too; what follows goes on from the last real position."""
    u, more, lengths = random_input(5, 9, 12), random_input(5, 3, 12, seed=2), [9, 5, 2, 1, 0]
    out, state = layer(u, torch.arange(9) < torch.tensor(lengths)[:, None], return_state=True)
    continued = layer(more, state=state)
    for row, length in enumerate(lengths):
        alone, end = layer(u[row : row + 1, :length], return_state=True)
        assert_close(out[row : row + 1, :length], alone, atol=1e-6, rtol=0)
        assert_close([t[row : row + 1] for t in state], list(end), atol=1e-6, rtol=0)
        assert_close(continued[row : row + 1], layer(more[row : row + 1], state=end), atol=1e-6, rtol=0)


@torch.no_grad()
def test_left_padding_changes_neither_outputs_nor_states(layer):
    u, lengths = random_input(4, 9, 12), [9, 5, 2, 1]
    out, state = layer(u, torch.arange(9) >= 9 - torch.tensor(lengths)[:, None], return_state=True)
    for row, length in enumerate(lengths):
        alone, end = layer(u[row : row + 1, 9 - length :], return_state=True)
        assert_close(out[row : row + 1, 9 - length :], alone, atol=1e-6, rtol=0)
        assert_close([t[row : row + 1] for t in state], list(end), atol=1e-6, rtol=0)


@torch.no_grad()
def test_without_the_mask_padding_in_front_would_be_seen(layer):
    """The convolution's bias makes values of zeros, and they enter the state."""
    u = random_input(1, 6, 12)
    padded = torch.cat([torch.zeros(1, 4, 12, dtype=torch.float64), u], 1)
    assert (layer(padded)[:, 4:] - layer(u)).abs().max() > 1e-3


def test_masked_positions_are_not_seen_wherever_they_stand(layer):
    u, other = random_input(1, 9, 12), random_input(1, 9, 12)
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, 4:6] = 0
    other[:, 4:6] += 10
    u.requires_grad_()
    out = layer(u, mask)[mask.bool()]
    assert_close(out, layer(other, mask.bool())[mask.bool()])
    out.square().sum().backward()
    assert u.grad[0, 4:6].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2, 2 groups"])
@pytest.mark.usefixtures("code")
def test_the_future_is_not_seen(kind, dtype):
    """No output depends on a later input, to the last bit, and all depend on all earlier ones."""
    torch.manual_seed(0)
    layer = {
        "mamba": lambda: Mamba(12, d_state=16),
        "mamba2": lambda: Mamba2(12, d_state=16, headdim=6),
        "mamba2, 2 groups": lambda: Mamba2(12, d_state=16, headdim=6, ngroups=2, chunk_size=4),
    }[kind]().to(dtype)
    u = random_input(1, 40, 12).to(dtype)
    for position in (0, 3, 17, 38):
        seen = u.clone().requires_grad_()
        layer(seen)[0, position].sum().backward()
        assert seen.grad[0, position + 1 :].abs().max() == 0
        assert (seen.grad[0, : position + 1].abs().amax(-1) > 0).all()
        changed = u.clone()
        changed[:, position + 1 :] += 5
        with torch.no_grad():
            assert_near(layer(changed)[:, : position + 1], layer(u)[:, : position + 1], to=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [[3, 1, 7, 2, 5], [6, 5, 1], [1, 2, 9]])
@torch.no_grad()
def test_packed_sequences_equal_separate_ones(layer, lengths):
    """And the state is the last one's, were it shorter than the convolution."""
    pieces = [random_input(2, length, 12, seed=length) for length in lengths]
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    together, state = layer(torch.cat(pieces, 1), seq_idx=seq_idx, return_state=True)
    separate = [layer(piece, return_state=True) for piece in pieces]
    assert_close(together, torch.cat([out for out, _ in separate], 1))
    assert_close(state, separate[-1][1])


def test_gradients_of_packed_sequences_stay_within_them(layer):
    packed, seq_idx = random_input(1, 12, 12).requires_grad_(), torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
    layer(packed, seq_idx=seq_idx)[seq_idx == 1].square().sum().backward()
    assert packed.grad[seq_idx != 1].abs().max() < 1e-14
    assert packed.grad[seq_idx == 1].abs().min() > 1e-8


@torch.no_grad()
def test_packing_continues_the_first_sequence_and_padding_ends_the_last(layer):
    start, rest, second, padding = (random_input(1, length, 12, seed=length) for length in (5, 4, 2, 3))
    seq_idx = torch.tensor([[7] * 4 + [8] * 5])
    _, state = layer(start, return_state=True)
    out, end = layer(torch.cat([rest, second, padding], 1), torch.arange(9)[None] < 6, seq_idx, state, return_state=True)
    assert_close(out[:, :4], layer(torch.cat([start, rest], 1))[:, 5:])
    alone, last = layer(second, return_state=True)
    assert_close(out[:, 4:6], alone)
    assert_close(end, last)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("options", [(), ("mask",), ("seq_idx",), ("mask", "seq_idx")])
@pytest.mark.parametrize("given_state", [False, True])
def test_nothing_in_gives_nothing_out(layer, batch, length, options, given_state):
    settings = {option: torch.ones(batch, length, dtype=torch.long) for option in options}
    start = layer(random_input(batch, 5, 12), return_state=True)[1] if given_state else None
    u = random_input(batch, length, 12).requires_grad_()
    out = layer(u, state=start, **settings)
    assert out.shape == (batch, length, 12)
    out.sum().backward()
    assert u.grad.shape == u.shape
    _, state = layer(u, state=start, return_state=True, **settings)
    assert_close(state, start if given_state else layer.initial_state(batch))


SINGLE = {
    "mamba": lambda: Mamba(32, d_state=16),
    "mamba2": lambda: Mamba2(32, d_state=16, headdim=8),
    "mamba2, 2 groups": lambda: Mamba2(32, d_state=16, headdim=8, ngroups=2),
}


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.usefixtures("code")
def test_half_precision_is_near(kind):
    torch.manual_seed(0)
    layer, u = SINGLE[kind](), torch.randn(2, 70, 32)
    expected = layer_results(layer, u)
    with torch.autocast("cpu", torch.bfloat16):  # backward, too
        found = layer_results(layer, u)
    halves = layer_results(layer.bfloat16(), u.bfloat16())
    for name, value in expected.items():
        assert found[name].isfinite().all()
        assert_near(found[name], value, to=0.1)
        assert_near(halves[name].float(), value, to=0.1)
        assert (found[name].float() - value).abs().max() > 0  # autocast was on


@pytest.mark.parametrize("kind", SINGLE)
@torch.no_grad()
def test_steps_in_half_precision_are_near(kind):
    torch.manual_seed(0)
    layer, u = SINGLE[kind](), torch.randn(2, 20, 32)
    expected = layer(u)
    layer, state = layer.bfloat16(), layer.initial_state(2)
    for t in range(20):
        out, state = layer.step(state, u[:, t].bfloat16())
        assert_near(out.float(), expected[:, t], to=0.1)
