"""The bidirectional mixer against its quasiseparable matrix, and what padding and packing may not do to it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.ssm import Hydra
from tests.ssm.oracles import random_input

INNER, GROUP_STATE = 24, 5  # of the layers below: expand 2, d_model 12


def random_layer(seed=0, d_conv=7, ngroups=1, chunk_size=4):
    """A float64 layer none of whose parameters is at its start: equal entries would hide a mix-up."""
    torch.manual_seed(seed)
    layer = Hydra(12, d_state=GROUP_STATE, d_conv=d_conv, headdim=6, ngroups=ngroups, chunk_size=chunk_size).double()
    with torch.no_grad():
        for parameter in (layer.A_log, layer.D, layer.norm.weight, layer.dt_bias):
            parameter.copy_(torch.randn_like(parameter))
    return layer


def projected(layer, u):
    """z, x per head, the diagonal and each direction's dt, B and C per head, all in their order in time."""
    heads, state = layer.heads, layer.ngroups * GROUP_STATE
    z, xBC, dt = (u @ layer.in_proj.weight.T).split([INNER, INNER + 4 * state, 2 * heads], -1)
    width = layer.conv1d.kernel_size[0]
    left = (width - 1) // 2
    padded = F.pad(xBC.mT, (left, width - 1 - left))
    xBC = F.silu(F.conv1d(padded, layer.conv1d.weight, layer.conv1d.bias, groups=xBC.shape[-1])).mT
    x, BC_forward, BC_backward = xBC.split([INNER, 2 * state, 2 * state], -1)
    diagonal = x @ layer.fc_D.weight.T + layer.D
    directions = []
    for steps, BC in zip(dt.split(heads, -1), (BC_forward, BC_backward), strict=True):
        B, C = (t.unflatten(-1, (layer.ngroups, -1)).repeat_interleave(heads // layer.ngroups, -2) for t in BC.split(state, -1))
        directions.append((F.softplus(steps + layer.dt_bias), B, C))
    return z, x.unflatten(-1, (heads, -1)), diagonal, *directions


def finish(layer, y, z):
    """Each group of heads divided by its root mean square, then the gate, then the projection."""
    grouped = y.unflatten(-1, (layer.ngroups, -1))
    normed = (grouped / (grouped.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()).flatten(-2)
    return (normed * layer.norm.weight * F.silu(z)) @ layer.out_proj.weight.T


def semiseparable(dt, A, B, C):
    """The matrix of one scan, entry by entry: S[i, j] = C_i B_j dt_j exp(A (dt_{j+1} + ... + dt_i)) for j <= i."""
    length = len(dt)
    S = torch.zeros(length, length, dtype=dt.dtype)
    for i in range(length):
        for j in range(i + 1):
            S[i, j] = C[i].dot(B[j]) * dt[j] * torch.exp(A * dt[j + 1 : i + 1].sum())
    return S


def shift(S):
    return torch.cat([torch.zeros_like(S[:1]), S[:-1]])


def by_matrix(layer, u):
    """M x with M = shift(S) + flip(shift(S')) + diag, where S' is the scan over the reversed history."""
    z, x, diagonal, forward, backward = projected(layer, u)
    y = torch.empty_like(x)
    for row in range(len(x)):
        for head in range(layer.heads):
            A = -layer.A_log[head].exp()
            past = shift(semiseparable(forward[0][row, :, head], A, *(t[row, :, head] for t in forward[1:])))
            future = shift(semiseparable(backward[0][row, :, head].flip(0), A, *(t[row, :, head].flip(0) for t in backward[1:])))
            M = past + future.flip(0, 1) + torch.diag(diagonal[row, :, head])
            y[row, :, head] = M @ x[row, :, head]
    return finish(layer, y.flatten(2), z)


def by_recurrence(layer, u):
    """The same in plain differentiable operations: each position reads the state before its own value enters."""
    z, x, diagonal, forward, backward = projected(layer, u)
    A, length = -layer.A_log.exp(), u.shape[1]
    parts = [x * diagonal[..., None]]
    for (dt, B, C), order in ((forward, range(length)), (backward, range(length)[::-1])):
        state, outputs = x.new_zeros(len(x), *x.shape[2:], GROUP_STATE), {order[0]: torch.zeros_like(x[:, 0])}
        for now, following in pairwise(order):
            decay = (dt[:, now] * A).exp()[..., None, None]
            state = decay * state + dt[:, now, :, None, None] * x[:, now, :, :, None] * B[:, now, :, None, :]
            outputs[following] = (state * C[:, now, :, None, :]).sum(-1)
        parts.append(torch.stack([outputs[t] for t in range(length)], 1))
    return finish(layer, sum(parts).flatten(2), z)


@pytest.mark.parametrize(("d_conv", "count"), [(4, 34_694), (7, 35_462)])
def test_published_parameter_count(d_conv, count):
    layer = Hydra(64, d_state=32, d_conv=d_conv, headdim=64)
    assert sum(p.numel() for p in layer.parameters()) == count


def test_weights_have_the_published_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in Hydra(16, d_state=8, headdim=4, ngroups=2).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (32 + (32 + 4 * 2 * 8) + 2 * 8, 16),
        "conv1d.weight": (32 + 4 * 2 * 8, 1, 7),
        "conv1d.bias": (32 + 4 * 2 * 8,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "fc_D.weight": (8, 32),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
    }


def test_start_is_the_published_one():
    torch.manual_seed(0)
    layer = Hydra(64, headdim=8)
    steps = F.softplus(layer.dt_bias)
    assert layer.A_log.abs().max() == 0
    assert (layer.D == 1).all()
    assert (steps >= 0.99e-3).all()
    assert (steps <= 0.101).all()


@pytest.mark.parametrize(("length", "d_conv", "ngroups"), [(1, 7, 1), (2, 7, 1), (9, 7, 1), (9, 3, 2), (9, 4, 1), (8, 4, 4)])
def test_output_is_the_quasiseparable_matrix_product(length, d_conv, ngroups):
    layer, u = random_layer(d_conv=d_conv, ngroups=ngroups), random_input(2, length, 12)
    with torch.no_grad():
        assert_close(layer(u), by_matrix(layer, u))


@pytest.mark.parametrize(("d_conv", "ngroups"), [(7, 1), (4, 2)])
def test_gradients_are_those_of_the_formula(d_conv, ngroups):
    layer, weights = random_layer(d_conv=d_conv, ngroups=ngroups), random_input(2, 9, 12, seed=2)

    def outputs_and_gradients(function):
        u = random_input(2, 9, 12).requires_grad_()
        y = function(u)
        return y, *torch.autograd.grad((y * weights).sum(), [u, *layer.parameters()])

    ours, expected = outputs_and_gradients(layer), outputs_and_gradients(lambda u: by_recurrence(layer, u))
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)
        assert one.abs().max() > 0


def test_block_size_changes_nothing():
    u = random_input(2, 23, 12)
    with torch.no_grad():
        assert_close(random_layer(chunk_size=3)(u), random_layer(chunk_size=64)(u))


def test_a_reversed_history_with_the_directions_exchanged_gives_the_reversed_output():
    layer, exchanged, u = random_layer(ngroups=2), random_layer(ngroups=2), random_input(2, 10, 12)
    state, heads = 2 * GROUP_STATE, layer.heads
    z, x, forward, backward, dt, dt_back = torch.arange(len(layer.in_proj.weight)).split([INNER, INNER, 2 * state, 2 * state, heads, heads])
    mixed = torch.cat([x, backward, forward])
    with torch.no_grad():
        exchanged.in_proj.weight.copy_(layer.in_proj.weight[torch.cat([z, mixed, dt_back, dt])])
        exchanged.conv1d.weight.copy_(layer.conv1d.weight[mixed - INNER].flip(-1))
        exchanged.conv1d.bias.copy_(layer.conv1d.bias[mixed - INNER])
        assert_close(exchanged(u.flip(1)), layer(u).flip(1))
        assert (layer(u.flip(1)) - layer(u).flip(1)).abs().max() > 1e-3  # not without the exchange


@pytest.mark.parametrize("d_conv", [4, 7])
@pytest.mark.parametrize(("left", "right"), [(0, 5), (5, 0), (3, 4)])
def test_masked_padding_changes_nothing(d_conv, left, right):
    layer, u = random_layer(d_conv=d_conv), random_input(2, 6, 12)
    padded = torch.cat([random_input(2, left, 12, seed=3), u, random_input(2, right, 12, seed=4)], 1)
    mask = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    mask[:, left : left + 6] = True
    with torch.no_grad():
        alone = layer(u)
        assert_close(layer(padded, mask)[:, left : left + 6], alone, atol=1e-6, rtol=0)
        unmasked = layer(padded)[:, left : left + 6]
    assert (unmasked - alone).abs().max() > 1e-3


def test_zeros_for_padding_do_not_replace_the_mask():
    """The convolution's bias makes values of zeros, and they enter the backward scan."""
    layer, u = random_layer(), random_input(1, 6, 12)
    with torch.no_grad():
        assert (layer(F.pad(u, (0, 0, 0, 4)))[:, :6] - layer(u)).abs().max() > 1e-3


def test_rows_of_different_lengths_share_a_batch():
    layer, u = random_layer(), random_input(4, 9, 12)
    lengths = [9, 1, 5, 0]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        together = layer(u, mask)
        assert torch.isfinite(together).all()
        for row, length in enumerate(lengths[:3]):
            assert_close(together[row, :length], layer(u[row : row + 1, :length])[0], atol=1e-6, rtol=0)


def test_what_stands_at_padding_in_the_middle_is_not_seen():
    layer, u, other = random_layer(), random_input(1, 9, 12), random_input(1, 9, 12)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 4:6] = False
    other[:, 4:6] += 10
    u.requires_grad_()
    out = layer(u, mask)[mask]
    assert_close(out, layer(other, mask)[mask])
    out.square().sum().backward()
    assert u.grad[~mask].abs().max() == 0


@pytest.mark.parametrize("d_conv", [4, 7])
def test_packed_sequences_do_not_see_each_other(d_conv):
    layer, lengths = random_layer(d_conv=d_conv, chunk_size=4), [3, 1, 7, 2, 5]
    pieces = [random_input(1, length, 12, seed=length) for length in lengths]
    seq_idx = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None]
    with torch.no_grad():
        separate = [layer(piece) for piece in pieces]
        assert_close(layer(torch.cat(pieces, 1), seq_idx=seq_idx), torch.cat(separate, 1))

    packed = torch.cat(pieces, 1).requires_grad_()
    layer(packed, seq_idx=seq_idx)[seq_idx == 2].square().sum().backward()
    assert packed.grad[seq_idx != 2].abs().max() < 1e-15  # rounding of the step sizes' running sums
    assert packed.grad[seq_idx == 2].abs().min() > 1e-6


def test_packed_and_padded():
    layer, first, second = random_layer(), random_input(1, 4, 12), random_input(1, 3, 12, seed=5)
    packed = torch.cat([first, second, random_input(1, 5, 12, seed=6)], 1)
    seq_idx = torch.tensor([[0] * 4 + [1] * 8])
    mask = torch.arange(12)[None] < 7
    with torch.no_grad():
        assert_close(layer(packed, mask, seq_idx)[:, :7], torch.cat([layer(first), layer(second)], 1))


def test_every_output_depends_on_every_input():
    layer, u = random_layer(d_conv=3), random_input(1, 8, 12)
    with torch.no_grad():
        before = layer(u)
        for position in range(8):
            changed = u.clone()
            changed[0, position] += 1
            assert ((layer(changed) - before).abs().amax(-1) > 1e-8).all()


def test_half_precision_is_close():
    torch.manual_seed(0)
    layer, u = Hydra(32, d_state=8, headdim=16), torch.randn(2, 20, 32)
    with torch.no_grad():
        expected = layer(u)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(layer(u).float(), expected, atol=0.02, rtol=0.05)
        assert_close(layer.bfloat16()(u.bfloat16()).float(), expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"headdim": 5}, "headdim 5 does not divide"),
        ({"headdim": 8, "ngroups": 3}, "cannot share 3 groups"),
        ({"init": "zeros"}, "init is"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Hydra(16, **{"headdim": 8, **sizes})
