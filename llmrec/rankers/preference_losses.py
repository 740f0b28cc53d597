"""Losses of preference pairs as functions of the completions' log-probabilities.

    orpo     -beta log sigmoid(log odds(w) - log odds(l)),  odds = p / (1 - p)    Hong et al. 2024 (arXiv 2403.07691), equations 4-7
    simpo    -log sigmoid(beta (log p(w) - log p(l)) - gamma)                     Meng et al. 2024 (arXiv 2405.14734), equation 6
    softmax  -log (p(w) / (p(w) + sum of p(l)))                                   LlamaRec's verbalizer (arXiv 2311.02089) as a loss

p is the geometric mean over a completion's tokens: its logarithm is the mean log-probability per token. A winner w has one loser
l or several, in a row of a matrix that is padded on the right. `orpo` and `simpo` are made for every pair and averaged over the
losers of a winner; whoever calls averages over winners. So a winner counts once, however many losers it has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.errors import UserError


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Mächler 2012, equation 7)."""
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The odds-ratio term of each pair, to be added to the winner's NLL.

    Args:
        chosen: mean log-probability per token of the winners, at most 0; any shape that broadcasts to the losers'.
        rejected: of the losers.
        beta: weight of the term; lambda in the paper.

    Returns:
        -beta * log sigmoid(log odds ratio); log sigmoid(log odds ratio); the log odds ratio. All float32 in the broadcast shape,
        one value per pair, averaged over nothing. Where a probability rounds to 1 its odds are taken at the float32 next to it,
        so that nothing is infinite.
    """
    # At p = 1 TRL's odds are infinite and their gradient NaN. A float32 softmax has no value between this and 0.
    top = -torch.finfo(torch.float32).eps / 2
    chosen, rejected = chosen.float().clamp(max=top), rejected.float().clamp(max=top)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    log_sigmoid = F.logsigmoid(log_odds_ratio)
    return -beta * log_sigmoid, log_sigmoid, log_odds_ratio


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO's loss of each pair. No reference model and no NLL: this is the whole loss.

    Args:
        chosen: mean log-probability per token of the winners; any shape that broadcasts to the losers'.
        rejected: of the losers.
        beta: scale of the rewards; the paper takes 2 to 2.5.
        gamma: by how much the winner's reward shall exceed the loser's; the paper takes 0.3 to 1.6.

    Returns:
        One value per pair in the broadcast shape, float32, averaged over nothing.
    """
    return -F.logsigmoid(beta * (chosen.float() - rejected.float()) - gamma)


def softmax(chosen: Tensor, rejected: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of each winner among itself and its losers, as if no other completion existed. This is the whole loss.

    Args:
        chosen: log-probabilities of the winners, (winners,). Logits do as well: what is common to a row cancels.
        rejected: of the losers, (winners, losers).
        real: which losers are there and no padding, (winners, losers) bool.

    Returns:
        One value per winner, (winners,) float32: the sum over its losers is inside the logarithm, nothing is averaged.
    """
    scores = torch.cat([chosen[:, None], rejected.masked_fill(~real, -torch.inf)], dim=1).float()
    return scores.logsumexp(1) - scores[:, 0]


def mean_over_losers(values: Tensor, real: Tensor) -> Tensor:
    """Mean of each winner's pairs, (winners,).

    Args:
        values: one per pair, (winners, losers), finite in the padding, too.
        real: which losers are there, (winners, losers) bool; at least one in each row.
    """
    return (values * real).sum(1) / real.sum(1)


def check_settings(loss: str, nll_on: str, negatives: int | str, beta: float, gamma: float) -> None:
    """Refuse settings that do not go together.

    Raises:
        UserError: what is wrong, and what to choose.
    """
    if negatives != "all" and (not isinstance(negatives, int) or negatives < 1):
        raise UserError(f"orpo.negatives is {negatives}: choose 1 (the pair's own loser), more, or all")
    if beta < 0 or (loss == "simpo" and beta == 0):
        raise UserError(f"orpo.beta is {beta:g}: choose a positive weight" + ("; SimPO's authors take 2" if loss == "simpo" else " or 0"))
    if loss == "simpo" and gamma < 0:
        raise UserError(f"orpo.gamma is {gamma:g}: choose 0 or more")
    if loss == "softmax" and negatives != "all":
        raise UserError(f"orpo.negatives is {negatives}, but orpo.loss softmax is over the whole pool: choose all")
    if loss != "orpo" and nll_on != "completion":
        raise UserError(f"orpo.nll_on is {nll_on}, but orpo.loss {loss} has no NLL: choose completion")
