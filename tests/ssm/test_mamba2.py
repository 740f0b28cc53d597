"""The chunked scan against the recurrence it computes, and the layer's properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmrec.ssm import Mamba2, ssd


def random_inputs(length, heads=4, headdim=3, groups=2, d_state=5, batch=2):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt = normal(batch, length, heads, headdim), normal(batch, length, heads).exp()
    return x, dt, -normal(heads).exp(), normal(batch, length, groups, d_state), normal(batch, length, groups, d_state)


def step_by_step(x, dt, A, B, C, state=None):
    """The recurrence in the module's docstring, one position at a time."""
    batch, length, heads, headdim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, headdim, B.shape[-1]) if state is None else state
    outputs = []
    for t in range(length):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_chunked_scan_equals_the_recurrence(length, chunk):
    inputs = random_inputs(length)
    for ours, expected in zip(ssd(*inputs, chunk=chunk), step_by_step(*inputs), strict=True):
        assert_close(ours, expected)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 30), cut=st.integers(1, 29), chunk=st.integers(1, 9))
def test_state_carried_over_a_split_equals_one_pass(length, cut, chunk):
    cut = min(cut, length - 1)
    x, dt, A, B, C = random_inputs(length)
    y, final = ssd(x, dt, A, B, C, chunk=chunk)
    first, state = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], chunk=chunk)
    second, end = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], chunk=chunk, state=state)
    assert_close(torch.cat([first, second], 1), y)
    assert_close(end, final)


def test_gradients_are_those_of_the_formula():
    x, dt, A, B, C = random_inputs(5, heads=2, headdim=2, groups=1, d_state=2, batch=1)
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C)]
    assert torch.autograd.gradcheck(lambda *args: ssd(*args, chunk=2), inputs)


def test_extreme_steps_stay_finite():
    x, dt, A, B, C = random_inputs(20)
    for scale in (1e-12, 1e6):
        y, state = ssd(x, dt * scale, A * 1e3, B, C, chunk=8)
        assert torch.isfinite(y).all()
        assert torch.isfinite(state).all()


def test_layer_has_the_published_parameter_count():
    layer = Mamba2(64, d_state=128, d_conv=4, expand=2, headdim=4)
    assert sum(p.numel() for p in layer.parameters()) == 45_152


def test_layer_is_causal_and_right_padding_changes_nothing():
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=8, headdim=4, chunk_size=4).double()
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    longer = torch.cat([x, torch.randn(1, 3, 16, dtype=torch.float64)], 1)
    assert_close(layer(longer)[:, :11], layer(x))
    x.requires_grad_()
    layer(x)[0, 5].sum().backward()
    assert x.grad[0, 6:].abs().max() == 0
    assert x.grad[0, :6].abs().min() > 0


def test_layer_equals_transformers_mixer():
    """Same weights, same outputs and gradients as transformers' torch path."""
    from transformers import Mamba2Config, Mamba2Model

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=32,
        state_size=16,
        head_dim=8,
        num_heads=8,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=8,
        num_hidden_layers=1,
        vocab_size=7,
    )
    theirs = Mamba2Model(config).layers[0].mixer
    ours = Mamba2(32, d_state=16, headdim=8, chunk_size=8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 13, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_a, out_b = ours(a), theirs(b)
    out_b = out_b[0] if isinstance(out_b, tuple) else out_b
    assert_close(out_a, out_b, atol=1e-5, rtol=1e-5)
    out_a.square().sum().backward()
    out_b.square().sum().backward()
    assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sizes", "complaint"), [({"headdim": 5}, "headdim"), ({"headdim": 8, "ngroups": 3}, "groups")])
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Mamba2(16, **sizes)
