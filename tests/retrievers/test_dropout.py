"""What is dropped, how often, and by what the rest is scaled."""

import pytest
import torch
from torch.testing import assert_close

from llmrec.retrievers.dropout import Dropout

COUNT = 1 << 20
RATES = pytest.mark.parametrize(("p", "dropped"), [(0.001, 1), (0.2, 51), (0.5, 128), (0.9, 230), (0.9999, 255)])  # of 256


def dropped_ones(p, shape=(COUNT,), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(shape, dtype=dtype))


@RATES
def test_share_kept_and_mean_are_those_of_the_rounded_probability(p, dropped):
    y, kept = dropped_ones(p), 1 - dropped / 256
    error = (kept * (1 - kept) / COUNT) ** 0.5
    assert abs((y > 0).double().mean() - kept) < 5 * error
    assert abs(y.double().mean() - 1) < 5 * error / kept


@RATES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_are_zero_or_scaled_exactly(p, dropped, dtype):
    y = dropped_ones(p, (3000,), dtype=dtype)
    assert y.dtype == dtype
    assert_close(y[y != 0].unique(), torch.tensor([256 / (256 - dropped)], dtype=dtype), atol=0, rtol=0)


def test_every_byte_of_a_draw_decides_for_itself():
    kept = (dropped_ones(0.25) > 0).double().view(-1, 8)
    error = (0.25 * 0.75 / len(kept)) ** 0.5
    assert ((kept.mean(0) - 0.75).abs() < 5 * error).all()
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 5 / len(kept) ** 0.5
    assert torch.corrcoef(torch.stack([kept[:-1, 7], kept[1:, 0]]))[0, 1].abs() < 5 / len(kept) ** 0.5


def test_nothing_happens_in_evaluation_and_at_zero():
    x = torch.randn(5, 7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_the_gradient_goes_through_the_same_mask():
    x = torch.randn(9, 11, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(9, 11, dtype=torch.float64)
    y = Dropout(0.4)(x)
    (gradient,) = torch.autograd.grad(y, x, seen)
    assert 0 < (y == 0).sum() < y.numel()
    assert_close(gradient, seen * (y / x).detach())


def test_the_seed_decides_and_two_calls_differ():
    assert torch.equal(dropped_ones(0.3, (999,)), dropped_ones(0.3, (999,)))
    assert not torch.equal(dropped_ones(0.3, (999,)), dropped_ones(0.3, (999,), seed=1))
    layer, x = Dropout(0.3), torch.ones(999)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("p", [1, 1.5, 3, -0.1, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"dropout is {p}"):
        Dropout(p)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 5, 17), (0, 4)])
def test_any_number_of_numbers(shape):
    assert dropped_ones(0.3, shape).shape == shape


def test_numbers_that_do_not_lie_in_a_row():
    x = torch.arange(1.0, 101.0).view(10, 10)
    torch.manual_seed(3)
    y = Dropout(0.5)(x.T)
    assert_close(y[y != 0], 2 * x.T[y != 0])
