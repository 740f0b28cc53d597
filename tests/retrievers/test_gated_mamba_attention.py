"""The gated blend of Mamba and attention against its formula; what its positions may see, and what padding changes."""

import pytest
import torch
from torch.testing import assert_close

from llmrec.config import Mixer, SequenceModel
from llmrec.errors import UserError
from llmrec.retrievers.mixers import is_causal
from llmrec.retrievers.mixers.gated_mamba_attention import build

LEAK = pytest.mark.parametrize("leak", [False, True], ids=["causal", "leak"])


def random_layer(leak, **mixer):
    """A float64 layer whose gate is far from one half and whose branches are of the size of the input."""
    torch.manual_seed(0)
    config = Mixer(name="gated_mamba_attention", heads=3, d_state=5, init="mamba", legacy_leak=leak, **mixer)
    layer = build(SequenceModel(dim=12, mixer=config), max_length=50).double().eval()
    with torch.no_grad():
        for parameter in [*layer.attention.parameters(), *layer.gate.parameters()]:
            parameter.normal_(std=0.7)
    return layer


def inputs(length, batch=2):
    return torch.randn(batch, length, 12, dtype=torch.float64)


def attention_by_hand(layer, x, i, seen):
    """What query i of one sequence (length, dim) gets from the first `seen` positions."""
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(12, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = torch.softmax(k[:seen, part] @ q[i, part] / 4**0.5, 0)
        heads.append(weights @ v[:seen, part])
    return layer.out.weight @ torch.cat(heads) + layer.out.bias


def by_hand(layer, x, leak):
    """The formula for one sequence (length, dim) without padding."""
    mamba = layer.mamba(x[None])[0]
    rows = []
    for i in range(len(x)):
        seen = len(x) if leak else i + 1
        g = torch.sigmoid(layer.gate.weight[0] @ x[:seen].mean(0) + layer.gate.bias[0])
        rows.append(g * mamba[i] + (1 - g) * attention_by_hand(layer.attention, x, i, seen))
    return torch.stack(rows)


@LEAK
@pytest.mark.parametrize("length", [1, 2, 7])
def test_equals_the_formula_position_by_position(leak, length):
    layer, x = random_layer(leak), inputs(length)
    assert_close(layer(x), torch.stack([by_hand(layer, row, leak) for row in x]))


@LEAK
def test_every_parameter_has_a_gradient_as_the_formula_says(leak):
    layer, x, seen = random_layer(leak), inputs(6).requires_grad_(), inputs(6)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * seen).sum(), leaves)
    expected = torch.autograd.grad((torch.stack([by_hand(layer, row, leak) for row in x]) * seen).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert a.abs().max() > 0
        assert_close(a, b)


def test_the_future_is_seen_with_legacy_leak_only():
    causal, leak, x = random_layer(leak=False), random_layer(leak=True), inputs(9)
    changed = torch.cat([x[:, :5], inputs(4)], 1)
    assert_close(causal(x)[:, :5], causal(changed)[:, :5], atol=1e-6, rtol=0)
    assert ((leak(x) - leak(changed))[:, :5].abs().amax(-1) > 1e-3).all()
    assert is_causal(Mixer(name="gated_mamba_attention"))
    assert not is_causal(Mixer(name="gated_mamba_attention", legacy_leak=True))


@LEAK
def test_padding_on_the_right_changes_nothing(leak):
    layer, x, lengths = random_layer(leak), inputs(8, batch=3), [8, 5, 1]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    padded = layer(x, mask=mask)
    for row, length in enumerate(lengths):
        assert_close(padded[row, :length], layer(x[row : row + 1, :length])[0], atol=1e-6, rtol=0)


def test_with_legacy_leak_the_mask_keeps_padding_out_of_gate_and_attention():
    layer, x = random_layer(leak=True), inputs(8)
    mask = torch.arange(8) < 5
    assert ((layer(x) - layer(x, mask=mask.expand(2, 8)))[:, :5].abs().amax(-1) > 1e-3).all()


def test_the_last_position_is_the_same_with_and_without_the_leak():
    causal, leak = random_layer(leak=False), random_layer(leak=True)
    leak.load_state_dict(causal.state_dict())
    x = inputs(7)
    assert_close(causal(x)[:, -1], leak(x)[:, -1])
    assert (causal(x) - leak(x))[:, 0].abs().max() > 1e-2


def test_a_row_of_padding_alone_leaves_numbers_and_gradients_finite():
    layer, x = random_layer(leak=True), inputs(4).requires_grad_()
    y = layer(x, mask=torch.tensor([[True] * 4, [False] * 4]))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *layer.parameters()))


@LEAK
def test_dropout_is_on_the_attention_weights_in_training_only(leak):
    layer, x = random_layer(leak, dropout=0.5), inputs(6)
    assert_close(layer(x), layer(x), atol=0, rtol=0)
    layer.train()
    assert (layer(x) - layer(x)).abs().max() > 1e-3


def test_parameters_are_counted_by_hand():
    layer = build(SequenceModel(dim=64, mixer=Mixer(name="gated_mamba_attention", d_state=32)), max_length=50)
    inner, rank, state = 128, 4, 32
    mamba = 64 * 2 * inner + inner * 4 + inner + inner * (rank + 2 * state) + rank * inner + inner + inner * state + inner + inner * 64
    attention = 64 * 192 + 192 + 64 * 64 + 64
    assert sum(parameter.numel() for parameter in layer.parameters()) == mamba + attention + 64 + 1


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"model.dim 10 is not a multiple of model.mixer.heads 3"):
        build(SequenceModel(dim=10, mixer=Mixer(name="gated_mamba_attention", heads=3)), max_length=50)
