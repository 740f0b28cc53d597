"""The multi-head latent Mamba against its paper's equations, and its state, padding and packing."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.ssm import LatentMamba
from llmrec.ssm.latent import rope
from tests.ssm.oracles import random_input

SIZES = {"d_model": 12, "n_heads": 3, "d_latent": 6, "d_state": 5, "headdim": 4, "chunk_size": 4}


def random_layer(**sizes):
    """A float64 layer none of whose parameters is at its start: equal entries would hide a mix-up."""
    torch.manual_seed(0)
    layer = LatentMamba(**{**SIZES, **sizes}).double()
    with torch.no_grad():
        for head in layer.heads:
            for parameter in (head.D, head.norm.weight, head.dt_bias):
                parameter.copy_(torch.randn_like(parameter))
    return layer


def turned(z, position, base):
    """RoPE with complex numbers: channel j is the real and j + d/2 the imaginary part of a number that turns."""
    half = z.shape[-1] // 2
    speed = torch.tensor([base ** (-2 * j / z.shape[-1]) for j in range(half)], dtype=torch.float64)
    numbers = torch.complex(z[..., :half], z[..., half:]) * torch.exp(1j * position[..., None] * speed)
    return torch.cat([numbers.real, numbers.imag], -1)


def mamba2(layer, u):
    """A Mamba-2 layer with one group as its paper has it: one position after the other."""
    inner, state, heads = len(layer.norm.weight), layer.sizes[1], layer.heads
    z, xBC, dt = (u @ layer.in_proj.weight.T).split([inner, inner + 2 * state, heads], -1)
    width = layer.conv1d.kernel_size[0]
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, (width - 1, 0)), layer.conv1d.weight, layer.conv1d.bias, groups=xBC.shape[-1])).mT
    x, B, C = xBC.split([inner, state, state], -1)
    x, dt, h, outputs = x.unflatten(-1, (heads, -1)), F.softplus(dt + layer.dt_bias), 0, []
    for t in range(u.shape[1]):
        decay = (dt[:, t] * -layer.A_log.exp()).exp()[..., None, None]
        h = decay * h + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, None, None, :]
        outputs.append((h * C[:, t, None, None, :]).sum(-1) + layer.D[:, None] * x[:, t])
    y = torch.stack(outputs, 1).flatten(2) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight
    return y @ layer.out_proj.weight.T


def by_the_paper(layer, H, base=10000.0):
    """Equations 5 to 9 without the residual."""
    v = len(layer.heads)
    W_X, W_Z = layer.in_proj.weight.chunk(2)
    X = F.silu(H @ W_X.T).chunk(v, -1)  # (5)
    Z = F.silu(H @ W_Z.T).chunk(v, -1)
    position = torch.arange(H.shape[1])
    Z = torch.cat([turned(piece, position, base) for piece in Z], -1)  # (6), head by head
    Y = torch.cat([mamba2(head, piece) for head, piece in zip(layer.heads, X, strict=True)], -1)  # (7), (8)
    return (Y * Z / v**0.5) @ layer.out_proj.weight.T  # (9)


@pytest.mark.parametrize(
    ("length", "sizes"), [(1, {}), (11, {}), (11, {"n_heads": 1, "rope_base": 50.0}), (6, {"headdim": None, "expand": 1})]
)
def test_output_and_gradients_are_those_of_the_equations(length, sizes):
    layer, weights = random_layer(**sizes), random_input(2, length, 12, seed=2)

    def outputs_and_gradients(function):
        u = random_input(2, length, 12).requires_grad_()
        y = function(u)
        return y, *torch.autograd.grad((y * weights).sum(), [u, *layer.parameters()])

    ours = outputs_and_gradients(layer)
    expected = outputs_and_gradients(lambda u: by_the_paper(layer, u, sizes.get("rope_base", 10000.0)))
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


def test_rope_is_llamas():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    z, position = torch.randn(2, 40, 3, 16), torch.arange(40).expand(2, -1)
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    cos, sin = LlamaRotaryEmbedding(config)(z, position)
    theirs, _ = apply_rotary_pos_emb(z, z, cos, sin, unsqueeze_dim=2)
    assert_close(rope(z, position, 500.0), theirs)


def test_rope_turns_pairs_and_keeps_their_length():
    """The same item everywhere: its pairs keep their length and turn by the same angle from position to position."""
    z = random_input(1, 1, 2, 6).expand(1, 30, 2, 6)
    out = rope(z, torch.arange(30)[None], 10000.0)
    pairs = torch.complex(out[..., :3], out[..., 3:])
    assert_close(pairs.abs(), pairs.abs()[:, :1].expand_as(pairs))
    assert_close(out[:, 0], z[:, 0])
    turn = pairs[:, 1:] / pairs[:, :-1]
    speeds = torch.tensor([10000.0 ** -(j / 3) for j in range(3)], dtype=torch.float64)
    assert_close(turn, torch.exp(1j * speeds).expand_as(turn))


def test_parameter_count():
    """Two maps in and one out, and per head: projections, convolution with bias, norm; A, D and the step's bias."""
    D, v, c, N, K, P = 64, 8, 16, 128, 4, 32
    inner, heads = 2 * c, 2 * c // P
    head = c * (2 * inner + 2 * N + heads) + (K + 1) * (inner + 2 * N) + 3 * heads + inner + inner * c
    layer = LatentMamba(D)
    assert {module.headdim for module in layer.heads} == {P}
    assert sum(p.numel() for p in layer.parameters()) == 3 * D * v * c + v * head
    assert not [name for name, _ in layer.named_parameters() if name.endswith("proj.bias")]


@pytest.mark.parametrize(("d_latent", "expand", "headdim"), [(128, 2, 64), (16, 2, 32), (24, 2, 16), (6, 2, 4), (6, 1, 2), (10, 3, 2)])
def test_default_headdim_divides(d_latent, expand, headdim):
    assert LatentMamba(16, n_heads=1, d_latent=d_latent, expand=expand, d_state=4).heads[0].headdim == headdim


def test_heads_have_weights_of_their_own():
    layer = LatentMamba(**SIZES)
    assert not torch.equal(layer.heads[0].in_proj.weight, layer.heads[1].in_proj.weight)


def test_the_future_is_not_seen():
    layer, u = random_layer(), random_input(1, 11, 12)
    with torch.no_grad():
        before = layer(u)
        for position in range(11):
            changed = u.clone()
            changed[0, position] += 1
            difference = (layer(changed) - before).abs().amax(-1)[0]
            assert (difference[:position] < 1e-12).all()
            assert (difference[position:] > 1e-9).all()


def test_steps_equal_one_pass():
    layer, u = random_layer(), random_input(2, 11, 12)
    with torch.no_grad():
        expected, end = layer(u, return_state=True)
        state, outputs = layer.initial_state(2), []
        for t in range(11):
            out, state = layer.step(state, u[:, t])
            outputs.append(out)
    assert_close(torch.stack(outputs, 1), expected)
    assert_close(state, end)
    assert state.position.tolist() == [11, 11]


@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_state_carried_over_a_split_equals_one_pass(cut):
    layer, u = random_layer(), random_input(2, 11, 12)
    with torch.no_grad():
        expected, end = layer(u, return_state=True)
        first, state = layer(u[:, :cut], return_state=True)
        second, final = layer(u[:, cut:], state=state, return_state=True)
    assert_close(torch.cat([first, second], 1), expected)
    assert_close(final, end)


def test_right_padding_changes_neither_output_nor_state():
    layer, u, more = random_layer(), random_input(4, 9, 12), random_input(4, 3, 12, seed=2)
    lengths = torch.tensor([9, 1, 5, 0])
    with torch.no_grad():
        out, state = layer(u, torch.arange(9) < lengths[:, None], return_state=True)
        assert state.position.tolist() == lengths.tolist()
        continued = layer(more, state=state)
        for row, length in enumerate(lengths.tolist()):
            whole = layer(torch.cat([u[row : row + 1, :length], more[row : row + 1]], 1))[0]
            assert_close(out[row, :length], whole[:length], atol=1e-6, rtol=0)
            assert_close(continued[row], whole[length:], atol=1e-6, rtol=0)


def test_padding_in_front_counts_as_positions_and_nothing_else():
    layer, u = random_layer(), random_input(2, 6, 12)
    padded = torch.cat([random_input(2, 4, 12, seed=2), u], 1)
    mask = torch.arange(10).expand(2, -1) >= 4
    with torch.no_grad():
        later = layer.initial_state(2)._replace(position=torch.tensor([4, 4]))
        assert_close(layer(padded, mask)[:, 4:], layer(u, state=later), atol=1e-6, rtol=0)
        assert (layer(padded, mask)[:, 4:] - layer(u)).abs().max() > 1e-3


def test_packed_sequences_do_not_see_each_other():
    layer, lengths = random_layer(), [3, 1, 7, 2, 5]
    pieces = [random_input(1, length, 12, seed=length) for length in lengths]
    seq_idx = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None]
    with torch.no_grad():
        together, state = layer(torch.cat(pieces, 1), seq_idx=seq_idx, return_state=True)
        separate = [layer(piece, return_state=True) for piece in pieces]
    assert_close(together, torch.cat([out for out, _ in separate], 1))
    assert_close(state, separate[-1][1])


def test_packing_continues_the_first_sequence_and_padding_ends_the_last():
    layer = random_layer()
    start, rest, second, padding = (random_input(1, length, 12, seed=length) for length in (5, 4, 3, 2))
    seq_idx = torch.tensor([[7] * 4 + [8] * 5])
    mask = torch.arange(9)[None] < 7
    with torch.no_grad():
        _, state = layer(start, return_state=True)
        out, end = layer(torch.cat([rest, second, padding], 1), mask, seq_idx, state, return_state=True)
        assert_close(out[:, :4], layer(torch.cat([start, rest], 1))[:, 5:])
        assert_close(out[:, 4:7], layer(second))
    assert end.position.tolist() == [3]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"d_latent": 5}, "even and positive, not 5"),
        ({"d_latent": 0}, "even and positive, not 0"),
        ({"d_latent": None, "d_model": 20, "headdim": None}, "even and positive, not 5"),
        ({"headdim": 5}, "headdim 5 does not divide"),
        ({"n_heads": 0}, "n_heads must be 1 or more"),
        ({"init": "zeros"}, "init is"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        LatentMamba(**{**SIZES, **sizes})
