"""HSTU's layer against its formula, one position after the other; what it may see; its parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.config import Mixer, SequenceModel
from llmrec.errors import UserError
from llmrec.retrievers.mixers.hstu import HSTU, build


def random_layer(dim=12, heads=3, max_length=9):
    """A float64 layer whose position bias is large enough to be seen."""
    torch.manual_seed(0)
    layer = HSTU(dim, heads, max_length).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def inputs(length, batch=2, dim=12):
    return torch.randn(batch, length, dim, dtype=torch.float64)


def one_by_one(layer, x):
    """The formula for one sequence (length, dim), with a loop over queries, heads and keys."""
    dim = x.shape[1]
    size = dim // layer.heads
    u, v, q, k = F.silu(x @ layer.uvqk.weight.T).split(dim, -1)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            total = torch.zeros(size, dtype=x.dtype)
            for j in range(i + 1):
                score = q[i, part] @ k[j, part] + layer.rel_pos[i - j]
                total = total + score * torch.sigmoid(score) / layer.max_length * v[j, part]
            heads.append(total)
        mixed = torch.cat(heads)
        normed = (mixed - mixed.mean()) / torch.sqrt(mixed.var(unbiased=False) + 1e-6)
        rows.append(layer.out.weight @ (normed * u[i]) + layer.out.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 6, 9])
def test_equals_the_formula_position_by_position(length):
    layer, x = random_layer(), inputs(length)
    assert_close(layer(x), torch.stack([one_by_one(layer, row) for row in x]))


def test_gradients_equal_those_of_the_formula():
    layer, x, seen = random_layer(), inputs(7).requires_grad_(), inputs(7)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * seen).sum(), leaves)
    expected = torch.autograd.grad((torch.stack([one_by_one(layer, row) for row in x]) * seen).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def test_every_parameter_has_a_gradient_at_the_start():
    torch.manual_seed(0)
    layer = build(SequenceModel(dim=12, mixer=Mixer(name="hstu", heads=3)), max_length=9)
    layer(torch.randn(2, 9, 12)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad != 0).all(), name


def test_future_positions_change_nothing():
    layer, x = random_layer(), inputs(9)
    changed = torch.cat([x[:, :5], inputs(4)], 1)
    assert_close(layer(x)[:, :5], layer(changed)[:, :5], atol=1e-12, rtol=0)
    assert (layer(x)[:, 5] - layer(changed)[:, 5]).abs().max() > 0.1


def test_padding_on_the_right_changes_nothing():
    layer, x = random_layer(), inputs(6)
    assert_close(layer(torch.cat([x, inputs(3)], 1))[:, :6], layer(x), atol=1e-12, rtol=0)


def test_the_scores_are_divided_by_max_length_and_not_by_the_length():
    short, long = random_layer(max_length=9), random_layer(max_length=900)
    long.load_state_dict({**short.state_dict(), "rel_pos": F.pad(short.rel_pos.detach(), (0, 891))})
    x = inputs(6)
    assert_close(long(x), torch.stack([one_by_one(long, row) for row in x]))
    assert (short(x) - long(x)).abs().max() > 1e-3  # only the norm's epsilon sees the scale


def test_parameters_are_counted_by_hand():
    layer = build(SequenceModel(dim=64, mixer=Mixer(name="hstu", heads=2)), max_length=50)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"uvqk.weight": (256, 64), "rel_pos": (50,), "out.weight": (64, 64), "out.bias": (64,)}
    assert sum(parameter.numel() for parameter in layer.parameters()) == 64 * 256 + 50 + 64 * 64 + 64


def test_starts_as_the_public_code():
    torch.manual_seed(0)
    layer = HSTU(64, 2, 2000)
    assert layer.uvqk.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.rel_pos.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.out.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01)  # xavier uniform


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"model.dim 10 is not a multiple of model.mixer.heads 3"):
        HSTU(10, 3, 9)
    with pytest.raises(ValueError, match=r"10 positions is longer than max_length 9"):
        random_layer()(inputs(10))
