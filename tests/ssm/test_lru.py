import math

import pytest
import torch
from torch.testing import assert_close

from llmrec.ssm import LRU, LRUState
from llmrec.ssm.lru import _Recurrence
from tests.ssm.oracles import layer_results, random_input, source


def random_layer(d_model=6, d_hidden=5, seed=0):
    """In float64, with weights large enough to tell things apart."""
    torch.manual_seed(seed)
    layer, normal = LRU(d_model, d_hidden).double(), source(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "params_log":
                parameter.copy_(normal(*parameter.shape))
    return layer


def by_steps(layer, u, state=None):
    """The equations in complex numbers, one position after the other: the outputs, and h after each."""
    nu, theta, gamma = layer.params_log.exp()
    decay = torch.exp(torch.complex(-nu, theta))
    W_in, b_in, W_out, b_out = (torch.view_as_complex(t) for t in (layer.in_weight, layer.in_bias, layer.out_weight, layer.out_bias))
    h = torch.zeros(len(u), len(nu), dtype=torch.complex128) if state is None else torch.complex(*state)
    outputs, states = [], []
    for t in range(u.shape[1]):
        h = decay * h + gamma * (u[:, t].to(torch.complex128) @ W_in.T + b_in)
        outputs.append((h @ W_out.T + b_out).real)
        states.append(h)
    return torch.stack(outputs, 1), torch.stack(states, 1)


@pytest.mark.parametrize("length", [1, 2, 13, 64])
def test_outputs_and_gradients_are_those_of_the_equations(length):
    layer, u = random_layer(), random_input(3, length, 6)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, parameter in layer.named_parameters():
                self.register_parameter(name, parameter)

        def forward(self, u):
            return by_steps(self, u)[0]

    assert_close(layer_results(layer, u), layer_results(Plain(), u))


def test_gradient_of_the_recurrence():
    normal = source(3)
    x, decay, start = (torch.complex(normal(*shape), normal(*shape)) for shape in ((5, 2, 3), (3,), (2, 3)))
    assert torch.autograd.gradcheck(_Recurrence.apply, [t.requires_grad_() for t in (x, decay / 2, start)])


def test_gradients_of_the_state_and_through_it():
    layer, u, state = random_layer(), random_input(2, 4, 6), LRUState(random_input(2, 5, seed=2), random_input(2, 5, seed=3))

    def ends(u, real, imag):
        y, end = layer(u, state=LRUState(real, imag), return_state=True)
        return y, *end

    assert torch.autograd.gradcheck(ends, [t.requires_grad_() for t in (u, *state)])


def test_float32_is_as_near_as_it_can_be():
    layer, u = random_layer(16, 32), random_input(2, 200, 16)
    expected = layer(u)
    assert_close(layer.float()(u.float()).double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_half_precision_keeps_its_state_in_float32():
    layer, u = random_layer(16, 32).bfloat16(), random_input(2, 200, 16).bfloat16()
    half = layer(u, return_state=True)
    layer, u = layer.float(), u.float()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer(u, return_state=True)
    expected = layer(u)
    for y, state in (half, autocast):
        assert (y.dtype, state.real.dtype) == (torch.bfloat16, torch.float32)
        assert_close(y.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_state_carried_over_a_split_equals_one_pass(cut):
    layer, u = random_layer(), random_input(2, 11, 6)
    expected, states = by_steps(layer, u)
    first, state = layer(u[:, :cut], return_state=True)
    second, end = layer(u[:, cut:], state=state, return_state=True)
    assert_close(torch.complex(*state), states[:, cut - 1])
    assert_close(torch.complex(*end), states[:, -1])
    assert_close(torch.cat([first, second], 1), expected)


def test_steps_equal_one_pass():
    layer, u = random_layer(), random_input(2, 11, 6)
    expected, end = layer(u, return_state=True)
    state, outputs = layer.initial_state(2), []
    for t in range(11):
        y, state = layer.step(state, u[:, t])
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), expected)
    assert_close(state, end)


def test_no_positions_leave_the_state():
    layer, state = random_layer(), LRUState(random_input(2, 5, seed=2), random_input(2, 5, seed=3))
    y, end = layer(random_input(2, 0, 6), state=state, return_state=True)
    assert y.shape == (2, 0, 6)
    assert_close(end, state)


MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]
).bool()


@pytest.mark.parametrize("started", [False, True])
def test_masked_positions_are_as_if_deleted(started):
    layer, normal = random_layer(), source(4)
    u, state = normal(5, 7, 6).requires_grad_(), LRUState(normal(5, 5), normal(5, 5)) if started else layer.initial_state(5)
    y, end = layer(u, MASK, state, return_state=True)
    weights = normal(5, 7, 6)
    (gradient,) = torch.autograd.grad((y * weights)[MASK].sum(), u)
    assert (gradient[~MASK] == 0).all()
    for row, real in enumerate(MASK):
        kept, before = u.detach()[row : row + 1, real].requires_grad_(), LRUState(*(part[row : row + 1] for part in state))
        if not real.any():
            assert_close([part[row] for part in end], [part[0] for part in before])
            continue
        expected, states = by_steps(layer, kept, before)
        assert_close(y[row, real], expected[0])
        assert_close(torch.complex(*end)[row], states[0, -1])
        assert_close(gradient[row, real], torch.autograd.grad((expected[0] * weights[row, real]).sum(), kept)[0][0])


def test_what_stands_at_padding_does_not_matter():
    layer, u = random_layer(), random_input(5, 7, 6)
    spoilt = u.masked_fill(~MASK[..., None], math.nan)
    (y, end), (expected, expected_end) = layer(u, MASK, return_state=True), layer(spoilt, MASK, return_state=True)
    assert_close(y, expected)
    assert_close(end, expected_end)


def test_the_future_is_not_seen():
    layer, u = random_layer(), random_input(1, 9, 6)
    before = layer(u)
    for position in range(9):
        changed = u.clone()
        changed[0, position] += 1
        difference = (layer(changed) - before).abs().amax(-1)[0]
        assert (difference[:position] == 0).all()
        assert (difference[position:] > 1e-6).all()


def test_lambda_starts_uniform_in_the_ring_and_gamma_keeps_the_size():
    torch.manual_seed(0)
    nu, theta, gamma = LRU(8, 4000).params_log.detach().double().exp()
    modulus = torch.exp(-nu)
    assert modulus.min() >= 0.8 - 1e-6
    assert modulus.max() <= 0.99 + 1e-6
    for uniform in ((modulus**2 - 0.8**2) / (0.99**2 - 0.8**2), theta / (2 * math.pi)):
        expected = (torch.arange(4000) + 0.5) / 4000
        assert (uniform.sort().values - expected).abs().max() < 0.03  # Kolmogorov-Smirnov: 0.026 at a level of 1 %
    assert_close(gamma**2 + modulus**2, torch.ones_like(gamma), atol=1e-5, rtol=0)


def test_weights_start_as_published():
    """Normal with std .02, cut at two of them, which leaves a std of .0176."""
    torch.manual_seed(0)
    for weight in (layer := LRU(64)).in_weight, layer.out_weight:
        for part in weight.detach().unbind(-1):
            assert part.abs().max() <= 0.04
            assert part.std().item() == pytest.approx(0.0176, rel=0.03)
            assert abs(part.mean().item()) < 1e-3
    assert 0 < layer.in_bias.abs().max() <= 0.04
    assert 0 < layer.out_bias.abs().max() <= 0.04


def test_parameter_count_is_the_published():
    """16,960 with a complex weight counted once, as LRURec's code counts; params_log is real there, too."""
    sizes = {name: parameter.numel() for name, parameter in LRU(64).named_parameters()}
    real = sizes.pop("params_log")
    assert real == 384
    assert sum(sizes.values()) + real == 33_536
    assert sum(sizes.values()) // 2 + real == 16_960


def test_every_parameter_is_real_and_has_a_gradient():
    layer = LRU(6)
    layer(torch.randn(2, 5, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert not parameter.is_complex()
        assert parameter.grad.abs().max() > 0, name
    assert (layer.out_bias.grad[:, 1] == 0).all()


def test_a_state_can_be_saved(tmp_path):
    """Its tensors are contiguous, and none is part of another's or of all positions' memory."""
    from safetensors.torch import load_file, save_file

    layer, u = random_layer(), random_input(2, 11, 6)
    _, end = layer(u, return_state=True)
    _, after = layer.step(end, u[:, 0])
    for state in (layer.initial_state(2), end, after):
        save_file(state._asdict(), tmp_path / "state.safetensors")
        assert_close(load_file(tmp_path / "state.safetensors"), state._asdict())
