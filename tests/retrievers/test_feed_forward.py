"""The feed-forward layers against their formulas."""

import math

import pytest
import torch
from torch.testing import assert_close

from llmrec.config import SequenceModel
from llmrec.retrievers import feed_forward


def random_layer(kind):
    torch.manual_seed(0)
    layer = feed_forward.build(SequenceModel(dim=5, inner=7, feed_forward=kind)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(2, 3, 5, dtype=torch.float64)


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize(
    ("kind", "activation"),
    [("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2), ("relu", lambda x: x * (x > 0))],
)
def test_two_linear_layers(kind, activation):
    layer, x = random_layer(kind)
    w1, b1, w2, b2 = layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias
    assert (w1.shape, w2.shape) == ((7, 5), (5, 7))
    assert_close(layer(x), activation(x @ w1.T + b1) @ w2.T + b2)


def test_swiglu():
    layer, x = random_layer("swiglu")
    assert [tuple(p.shape) for p in layer.parameters()] == [(7, 5), (7, 5), (5, 7)]  # no biases
    assert_close(layer(x), (silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T)) @ layer.down.weight.T)


def test_gated_is_the_equation_read_literally():
    layer, x = random_layer("gated")
    assert [tuple(p.shape) for p in layer.parameters()] == [(5, 5)] * 3  # `inner` has no say
    assert_close(layer(x), (silu(x @ layer.gate.weight.T) * x) @ layer.up.weight.T @ layer.down.weight.T)


def test_none_is_no_layer():
    assert feed_forward.build(SequenceModel(feed_forward="none")) is None


@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu", "gated"])
def test_weights_start_small_and_biases_at_zero(kind):
    torch.manual_seed(0)
    for parameter in feed_forward.build(SequenceModel(feed_forward=kind)).parameters():
        if parameter.dim() == 1:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
