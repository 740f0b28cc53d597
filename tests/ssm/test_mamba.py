"""The Mamba-1 layer against transformers', its published size, names and start."""

import pytest
import torch
import torch.nn.functional as F

from llmrec.ssm import Mamba
from tests.ssm.oracles import assert_near, layer_results


@pytest.mark.parametrize(("d_state", "conv_kernel", "length"), [(16, 4, 13), (16, 4, 1), (5, 4, 70), (32, 2, 3)])
@pytest.mark.usefixtures("code")
def test_outputs_and_gradients_are_those_of_transformers(d_state, conv_kernel, length):
    from transformers import MambaConfig, MambaModel

    sizes = {"hidden_size": 32, "state_size": d_state, "conv_kernel": conv_kernel, "time_step_rank": 3}
    torch.manual_seed(0)
    theirs = MambaModel(MambaConfig(**sizes, num_hidden_layers=1, vocab_size=7)).layers[0].mixer
    ours = Mamba(32, d_state, conv_kernel, dt_rank=3)
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    u = torch.randn(2, length, 32)
    expected = layer_results(theirs, u)
    for name, value in layer_results(ours, u).items():
        assert_near(value, expected[name], to=1e-5, zero=1e-7)


def test_published_parameter_count():
    layer = Mamba(64, d_state=32, d_conv=4, expand=2)
    assert sum(p.numel() for p in layer.parameters()) == 38_784


def test_weights_have_the_names_and_shapes_of_mamba_ssm():
    shapes = {name: tuple(tensor.shape) for name, tensor in Mamba(24, d_state=8, d_conv=3).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (96, 24),
        "conv1d.weight": (48, 1, 3),
        "conv1d.bias": (48,),
        "x_proj.weight": (2 + 2 * 8, 48),  # the rank is 24 / 16, rounded up
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "A_log": (48, 8),
        "D": (48,),
        "out_proj.weight": (24, 48),
    }


def test_start_is_the_published_one():
    torch.manual_seed(0)
    layer = Mamba(64, d_state=5)
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.99e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.101
    assert abs(steps.log10().mean() + 2) < 0.2  # uniform in the logarithm
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 6.0).expand(128, -1))
    assert (layer.D == 1).all()
    assert 0.45 < layer.dt_proj.weight.abs().max() <= 0.5  # rank 4


def test_start_of_mamba4rec_wipes_out_the_steps():
    torch.manual_seed(0)
    layer = Mamba(64, init="mamba4rec")
    assert (layer.dt_proj.bias == 0).all()
    for linear in (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj):
        assert abs(linear.weight.std() - 0.02) < 0.002
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, -1))


def test_another_start_is_refused():
    with pytest.raises(ValueError, match="init is 'mamba' or 'mamba4rec', not 'zeros'"):
        Mamba(16, init="zeros")
