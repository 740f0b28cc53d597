"""The Mamba-2 layer against transformers', its published size, names and start."""

import pytest
import torch
import torch.nn.functional as F

from llmrec.ssm import Mamba2
from tests.ssm.oracles import assert_near, layer_results


@pytest.mark.parametrize(
    ("d_state", "headdim", "groups", "conv_kernel", "length"),
    [(16, 8, 1, 4, 13), (16, 8, 2, 4, 13), (16, 8, 4, 4, 1), (5, 4, 2, 4, 70), (32, 16, 1, 2, 3)],
)
@pytest.mark.usefixtures("code")
def test_outputs_and_gradients_are_those_of_transformers(d_state, headdim, groups, conv_kernel, length):
    from transformers import Mamba2Config, Mamba2Model

    sizes = {"hidden_size": 32, "state_size": d_state, "head_dim": headdim, "num_heads": 64 // headdim, "n_groups": groups}
    config = Mamba2Config(**sizes, conv_kernel=conv_kernel, chunk_size=8, num_hidden_layers=1, vocab_size=7)
    torch.manual_seed(0)
    theirs = Mamba2Model(config).layers[0].mixer
    ours = Mamba2(32, d_state, conv_kernel, headdim=headdim, ngroups=groups, chunk_size=8)
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    u = torch.randn(2, length, 32)
    expected = layer_results(theirs, u)
    for name, value in layer_results(ours, u).items():
        assert_near(value, expected[name], to=1e-5, zero=1e-7)


@torch.no_grad()
def test_block_size_changes_nothing():
    u, outputs = torch.randn(2, 23, 16, dtype=torch.float64), []
    for chunk_size in (1, 5, 64):
        torch.manual_seed(0)
        outputs.append(Mamba2(16, d_state=8, headdim=4, chunk_size=chunk_size).double()(u))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_published_parameter_count():
    layer = Mamba2(64, d_state=128, d_conv=4, expand=2, headdim=4)
    assert sum(p.numel() for p in layer.parameters()) == 45_152


def test_weights_have_the_names_and_shapes_of_mamba_ssm():
    layer = Mamba2(24, d_state=8, d_conv=3, headdim=12, ngroups=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (48 + (48 + 2 * 2 * 8) + 4, 24),
        "conv1d.weight": (48 + 2 * 2 * 8, 1, 3),
        "conv1d.bias": (48 + 2 * 2 * 8,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }


@pytest.mark.parametrize("init", ["mamba", "mamba4rec"])
def test_start_is_the_published_one(init):
    """Mamba4Rec's leaves the steps alone: their bias is not a linear layer's."""
    torch.manual_seed(0)
    layer = Mamba2(256, headdim=4, init=init)
    steps = F.softplus(layer.dt_bias)
    assert 0.99e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.101
    assert abs(steps.log10().mean() + 2) < 0.2  # uniform in the logarithm
    decays = layer.A_log.exp()
    assert 1 <= decays.min() < 2
    assert 15 < decays.max() <= 16
    assert abs(decays.mean() - 8.5) < 1
    assert (layer.D == 1).all()
    for linear in (layer.in_proj, layer.out_proj):
        assert (abs(linear.weight.std() - 0.02) < 0.001) == (init == "mamba4rec")


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"headdim": 5}, r"headdim 5 does not divide the inner width 32 \(expand 2 x d_model 16\)"),
        ({"headdim": 8, "ngroups": 3}, "4 heads cannot share 3 groups"),
        ({"headdim": 8, "init": "zeros"}, "init is 'mamba' or 'mamba4rec', not 'zeros'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Mamba2(16, **sizes)
