"""The losses of preference pairs against TRL's, the papers' formulas and gradients, and loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from trl.experimental.orpo import ORPOTrainer

from llmrec.errors import UserError
from llmrec.rankers.preference_losses import check_settings, mean_over_losers, orpo, simpo, softmax


class BetaAndDevice:
    """What TRL's method reads from its trainer."""

    beta = 0.7
    accelerator = type("", (), {"device": "cpu"})()


@pytest.mark.parametrize("low", [-2.0, -30.0, -1e3])
def test_orpo_equals_trls(low):
    chosen = torch.linspace(low, -1e-7, 101)
    rejected = chosen.flip(0) * 0.9
    expected, *_ = ORPOTrainer.odds_ratio_loss(BetaAndDevice(), chosen, rejected)
    losses, log_sigmoid, log_odds = orpo(chosen, rejected, beta=0.7)
    assert_close(losses, -expected)
    assert_close(log_sigmoid, expected / 0.7)
    assert torch.isfinite(log_odds).all()


@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e4, -3e38])
def test_orpo_and_its_gradient_are_finite_everywhere(logp):
    for chosen, rejected in [(logp, -1.0), (-1.0, logp), (logp, logp)]:
        inputs = torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True)
        losses, _, _ = orpo(*inputs, beta=1.0)
        gradients = torch.autograd.grad(losses.sum(), inputs)
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_equal_probabilities_give_log_two():
    logps = torch.tensor([-0.1, -1.0, -20.0])
    assert_close(orpo(logps, logps, beta=1.0)[0], torch.full((3,), math.log(2)))
    assert_close(simpo(logps, logps, beta=2.0, gamma=0.0), torch.full((3,), math.log(2)))


def test_gradient_of_orpo_is_the_papers():
    """Equations 6-8 of the paper: -delta h, with delta the odds' share and h the gradients over 1 - p."""
    chosen = torch.tensor([-0.3, -2.0, -0.01, -9.0], requires_grad=True)
    rejected = torch.tensor([-1.0, -0.2, -5.0, -8.0], requires_grad=True)
    losses, _, _ = orpo(chosen, rejected, beta=1.0)
    found = torch.autograd.grad(losses.sum(), (chosen, rejected))
    p, q = chosen.detach().double().exp(), rejected.detach().double().exp()
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert_close(found[0].double(), -delta / (1 - p), rtol=1e-4, atol=1e-6)
    assert_close(found[1].double(), delta / (1 - q), rtol=1e-4, atol=1e-6)


def test_simpo_is_the_papers_formula_for_every_pair():
    chosen, rejected = torch.tensor([[-0.5], [-3.0]]), torch.tensor([[-1.0, -0.1], [-2.0, -7.0]])
    found = simpo(chosen, rejected, beta=2.5, gamma=1.4)
    for winner in range(2):
        for loser in range(2):
            margin = 2.5 * (chosen[winner, 0] - rejected[winner, loser]).item() - 1.4
            assert found[winner, loser].item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), rel=1e-5)


def test_softmax_is_the_cross_entropy_of_the_logits_among_the_pool():
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    pools = [[4, 9, 30, 31], [7, 8], [40, 1, 2]]  # the first of each wins
    logps = logits.log_softmax(-1)
    rejected, real = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool)
    for row, pool in enumerate(pools):
        rejected[row, : len(pool) - 1], real[row, : len(pool) - 1] = logps[row, pool[1:]], True
    found = softmax(torch.stack([logps[row, pool[0]] for row, pool in enumerate(pools)]), rejected, real)
    expected = [F.cross_entropy(logits[row, pool][None], torch.tensor([0])) for row, pool in enumerate(pools)]
    assert_close(found, torch.stack(expected))


def test_padding_of_losers_has_no_part_in_their_mean_or_gradient():
    values = torch.tensor([[1.0, 5.0, 9.0], [2.0, 7.0, 7.0]], requires_grad=True)
    real = torch.tensor([[True, True, True], [True, False, False]])
    means = mean_over_losers(values, real)
    assert means.tolist() == [5.0, 2.0]
    (gradient,) = torch.autograd.grad(means.sum(), values)
    assert_close(gradient, torch.tensor([[1 / 3] * 3, [1.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"negatives": 0}, "orpo.negatives is 0: choose 1"),
        ({"negatives": "some"}, "orpo.negatives is some: choose 1"),
        ({"beta": -0.1}, "orpo.beta is -0.1: choose"),
        ({"loss": "simpo", "beta": 0.0}, "orpo.beta is 0: choose a positive weight; SimPO's authors take 2"),
        ({"loss": "simpo", "gamma": -1.0}, "orpo.gamma is -1: choose"),
        ({"loss": "softmax", "negatives": 3}, "orpo.negatives is 3, .* choose all"),
        ({"loss": "simpo", "nll_on": "sequence"}, "orpo.nll_on is sequence, .* choose completion"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed, message):
    good = {"loss": "orpo", "nll_on": "completion", "negatives": 1, "beta": 0.1, "gamma": 0.5}
    check_settings(**good)
    with pytest.raises(UserError, match=message):
        check_settings(**good | changed)
