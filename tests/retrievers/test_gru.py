import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrec.retrievers.mixers.gru import GRU


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return GRU(6, 5).double()


def random_input(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_steps(layer, u, h):
    """The gates as Cho et al. write them, one position after the other: the outputs, and h after each."""
    W, U = layer.gru.weight_ih_l0, layer.gru.weight_hh_l0
    outputs, states = [], []
    for t in range(u.shape[1]):
        (r, z, n), (hr, hz, hn) = (u[:, t] @ W.T).chunk(3, -1), (h @ U.T).chunk(3, -1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + r * hn) + z * h
        outputs.append(h @ layer.dense.weight.T + layer.dense.bias)
        states.append(h)
    return torch.stack(outputs, 1), torch.stack(states, 1)


@pytest.mark.parametrize("length", [1, 12])
def test_equals_the_gates_written_out(layer, length):
    u, h = random_input(3, length, 6), random_input(3, 5, seed=2)
    y, (end,) = layer(u, state=(h,), return_state=True)
    expected, states = by_steps(layer, u, h)
    assert_close(y, expected)
    assert_close(end, states[:, -1])
    assert_close(layer(u), by_steps(layer, u, torch.zeros(3, 5, dtype=torch.float64))[0])


def test_equals_torchs_modules(layer):
    gru, dense = nn.GRU(6, 5, bias=False).double(), nn.Linear(5, 6).double()
    gru.load_state_dict(layer.gru.state_dict())
    dense.load_state_dict(layer.dense.state_dict())
    u = random_input(3, 12, 6)
    assert_close(layer(u), dense(gru(u.transpose(0, 1))[0]).transpose(0, 1))


def test_the_future_is_not_seen(layer):
    u = random_input(1, 9, 6)
    before = layer(u)
    for position in range(9):
        changed = u.clone()
        changed[0, position] += 1
        difference = (layer(changed) - before).abs().amax(-1)[0]
        assert (difference[:position] == 0).all()
        assert (difference[position:] > 1e-9).all()


def test_steps_equal_one_pass(layer):
    u = random_input(2, 11, 6)
    expected, end = layer(u, return_state=True)
    state, outputs = layer.initial_state(2), []
    for t in range(11):
        y, state = layer.step(state, u[:, t])
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), expected)
    assert_close(state, end)


@pytest.mark.parametrize("started", [False, True])
def test_right_padding_changes_neither_output_nor_state(layer, started):
    u, more, lengths = random_input(4, 9, 6), random_input(4, 3, 6, seed=2), [9, 1, 5, 0]
    before = (random_input(4, 5, seed=3),) if started else layer.initial_state(4)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    y, state = layer(u, mask, before, return_state=True)
    continued = layer(more, state=state)
    for row, length in enumerate(lengths):
        whole, _ = by_steps(layer, torch.cat([u[row : row + 1, :length], more[row : row + 1]], 1), before[0][row : row + 1])
        assert_close(y[row, :length], whole[0, :length])
        assert_close(continued[row], whole[0, length:])
    assert_close(state[0][3], before[0][3])


def test_parameter_count_is_recboles():
    layer = GRU(64, 128)
    assert sum(p.numel() for p in layer.gru.parameters()) == 73_728
    assert sum(p.numel() for p in layer.parameters()) == 81_984


def test_weights_start_as_recboles():
    """Xavier's uniform range for matrices of 3 * 128 rows, not torch's 1 / sqrt(128)."""
    torch.manual_seed(0)
    layer = GRU(64, 128)
    for weight, columns in ((layer.gru.weight_ih_l0, 64), (layer.gru.weight_hh_l0, 128)):
        bound = (6 / (3 * 128 + columns)) ** 0.5
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
