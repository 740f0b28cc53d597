import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.retrievers import losses


def drawn(positions, items, dim=6, scale=1.0, dtype=torch.float64):
    """Vectors, a table whose row 0 is padding, and targets."""
    generator = torch.Generator().manual_seed(0)
    vectors = scale * torch.randn(positions, dim, dtype=dtype, generator=generator)
    table = torch.randn(items + 1, dim, dtype=dtype, generator=generator)
    targets = torch.randint(1, items + 1, (positions,), generator=generator)
    return vectors.requires_grad_(), table.requires_grad_(), targets


def assert_same(ours, expected, inputs, **tolerance):
    """Loss and gradients."""
    assert_close(ours, expected, **tolerance)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert_close(a, b, **tolerance)


def all_others(vectors, table, targets, loss):
    """The mean of `loss` taken position by position, each with all other items as its negatives."""
    found = []
    for vector, target in zip(vectors, targets, strict=True):
        others = torch.tensor([item for item in range(1, len(table)) if item != target])
        found.append(loss(vector[None], table[target][None], table[others], target[None], others))
    return torch.stack(found).mean()


# ------------------------------------------------------------------ full softmax


@pytest.mark.parametrize(("logits", "fewest"), [(36, 1), (36, 5), (1 << 19, 32)], ids=["by-logits", "by-positions", "at-once"])
def test_full_softmax_equals_cross_entropy_without_the_padding_column(monkeypatch, logits, fewest):
    monkeypatch.setattr(losses, "LOGITS", logits)  # 36 makes chunks of 4 positions, 5 where there are at least 5
    monkeypatch.setattr(losses, "FEWEST", fewest)
    vectors, table, targets = drawn(11, 9)
    ours = losses.full_softmax(vectors, table, targets) * 3
    expected = F.cross_entropy(vectors @ table[1:].T, targets - 1) * 3
    assert_same(ours, expected, (vectors, table))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_full_softmax_in_float32_equals_float64(scale):
    vectors, table, targets = drawn(500, 3000, scale=scale, dtype=torch.float32)
    ours = losses.full_softmax(vectors, table, targets)
    gradients = torch.autograd.grad(ours, (vectors, table))
    vectors, table = (t.detach().double().requires_grad_() for t in (vectors, table))
    expected = F.cross_entropy(vectors @ table[1:].T, targets - 1)
    assert expected > scale
    assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    tolerance = 1e-5 if scale == 1 else 1e-2  # of the largest; logits of 1e4 are themselves only known to 1e-3
    for a, b in zip(gradients, torch.autograd.grad(expected, (vectors, table)), strict=True):
        assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())


def test_full_softmax_refuses_second_derivatives():
    vectors, table, targets = drawn(3, 4)
    squared = losses.full_softmax(vectors, table, targets).square()
    (gradient,) = torch.autograd.grad(squared, vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ------------------------------------------------------------------ sampled softmax


def test_sampled_softmax_against_all_other_items_is_full_cross_entropy():
    vectors, table, targets = drawn(11, 9)
    ours = all_others(vectors, table, targets, losses.sampled_softmax)
    assert_same(ours, F.cross_entropy(vectors @ table[1:].T, targets - 1), (vectors, table))


def test_accidental_hits_do_not_count_in_sampled_softmax():
    vectors, table, targets = drawn(11, 9)
    items = torch.arange(1, 10)  # holds every target
    ours = losses.sampled_softmax(vectors, table[targets], table[items], targets, items)
    assert_same(ours, F.cross_entropy(vectors @ table[1:].T, targets - 1), (vectors, table))


def test_sampled_softmax_of_unit_vectors_is_info_nce():
    vectors, table, targets = drawn(5, 30)
    ids, temperature = torch.tensor([3, 8, 8, 21]), 0.05
    targets[2] = 21  # a hit
    unit = table / table.norm(dim=1, keepdim=True)
    scaled = vectors / vectors.norm(dim=1, keepdim=True) / temperature
    ours = losses.sampled_softmax(scaled, unit[targets], unit[ids], targets, ids)
    terms = []
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        near = [torch.cosine_similarity(vector, table[item], dim=0) / temperature for item in [target, 3, 8, 8, 21]]
        weights = [near[0].exp(), *(score.exp() for score, item in zip(near[1:], [3, 8, 8, 21], strict=True) if item != target)]
        terms.append(-(weights[0] / sum(weights)).log())
    assert_same(ours, torch.stack(terms).mean(), (vectors, table))


def test_position_whose_only_negative_is_its_target_costs_nothing():
    vectors, table, _ = drawn(2, 5)
    targets, ids = torch.tensor([4, 2]), torch.tensor([4])
    ours = losses.sampled_softmax(vectors, table[targets], table[ids], targets, ids)
    expected = F.softplus(vectors[1] @ (table[4] - table[2])) / 2
    assert_same(ours, expected, (vectors, table))


# ------------------------------------------------------------------ binary cross-entropies


def test_gbce_without_calibration_is_plain_binary_cross_entropy():
    vectors, table, targets = drawn(7, 40)
    ids = torch.tensor([i for i in range(1, 41) if i not in targets.tolist()][:12])
    ours = losses.gbce(vectors, table[targets], table[ids], targets, ids, items=40, calibration=0.0)
    scores = torch.cat([(vectors * table[targets]).sum(1, keepdim=True), vectors @ table[ids].T], 1)
    expected = F.binary_cross_entropy_with_logits(scores, torch.eye(13, dtype=torch.float64)[:1].expand(7, -1))
    assert_same(ours, expected, (vectors, table))


@pytest.mark.parametrize(("calibration", "beta"), [(0.0, 1.0), (0.75, 0.4), (1.0, 0.2)])
def test_gbce_by_hand(calibration, beta):
    # 2 of 10 possible negatives, alpha 0.2; sigmoids 3/4 for the target, 1/4 and 1/2 for the negatives
    vector, target = torch.tensor([[1.0]]), torch.tensor([[math.log(3)]])
    negatives = torch.tensor([[-math.log(3)], [0.0]])
    ours = losses.gbce(vector, target, negatives, torch.tensor([5]), torch.tensor([6, 7]), items=11, calibration=calibration)
    expected = -(math.log((3 / 4) ** beta) + math.log(3 / 4) + math.log(1 / 2)) / 3
    assert ours.item() == pytest.approx(expected, rel=1e-6)


def test_fully_calibrated_gbce_is_lowest_at_the_true_probability():
    # The target is drawn with probability p; k of the n - 1 other items are its negatives. With beta = alpha the best score has
    # sigmoid(score) = p (the theorem of arXiv 2308.07192), for plain binary cross-entropy it is p / (p + alpha - p alpha).
    p, k, items = 0.3, 2, 11
    alpha = k / (items - 1)
    score = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    far = torch.full((k,), -1e3, dtype=torch.float64)
    one, ids, target = torch.ones(1, 1, dtype=torch.float64), torch.arange(6, 6 + k), torch.tensor([5])

    def slope(calibration):
        as_target = losses.gbce(one, score.view(1, 1), far[:, None], target, ids, items, calibration)
        as_negative = losses.gbce(one, one * 1e3, torch.stack([score, *far[1:]])[:, None], target, ids, items, calibration)
        return torch.autograd.grad(p * as_target + (1 - p) * alpha * as_negative, score)[0]

    assert slope(1.0).abs() < 1e-12
    assert slope(0.0) < -0.01  # wants a higher score: overconfident


def test_accidental_hits_add_nothing_to_gbce():
    vectors, table, targets = drawn(4, 20)
    targets[:] = torch.tensor([3, 9, 9, 14])
    clean, hit = torch.tensor([1, 2]), torch.tensor([1, 2, 9])
    found = [
        losses.gbce(vectors[1:3], table[targets[1:3]], table[ids], targets[1:3], ids, 20, 0.0) * (len(ids) + 1) for ids in (clean, hit)
    ]
    assert_same(found[1], found[0], (vectors, table))


def test_more_negatives_than_items_are_a_full_sample():
    vectors, table, targets = drawn(4, 5)
    ids = torch.randint(1, 6, (30,), generator=torch.Generator().manual_seed(1))
    calibrated, plain = (losses.gbce(vectors, table[targets], table[ids], targets, ids, 5, t) for t in (1.0, 0.0))
    assert_close(calibrated, plain)


def test_bce_is_binary_cross_entropy_of_target_and_negative():
    vectors, table, targets = drawn(7, 40)
    negatives = torch.randint(1, 41, (7,), generator=torch.Generator().manual_seed(1))
    ours = losses.bce(vectors, table[targets], table[negatives])
    scores = torch.stack([(vectors * table[targets]).sum(1), (vectors * table[negatives]).sum(1)])
    expected = 2 * F.binary_cross_entropy_with_logits(scores, torch.tensor([[1.0], [0.0]]).double().expand(-1, 7))
    assert_same(ours, expected, (vectors, table))


# ------------------------------------------------------------------ huge scores


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["full_softmax", "sampled_softmax", "gbce", "bce"])
def test_scores_of_ten_thousand_keep_loss_and_gradients_finite(name, sign):
    vectors = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    table = torch.tensor([[0.0], [sign], [-sign], [1.0], [-1.0]], requires_grad=True)
    targets, ids = torch.tensor([1, 1]), torch.tensor([1, 2, 3, 4])
    sampled = (vectors, table[targets], table[ids], targets, ids)
    loss = {
        "full_softmax": lambda: losses.full_softmax(vectors, table, targets),
        "sampled_softmax": lambda: losses.sampled_softmax(*sampled),
        "gbce": lambda: losses.gbce(*sampled, items=10, calibration=0.75),
        "bce": lambda: losses.bce(vectors, table[targets], table[[2, 2]]),
    }[name]()
    gradients = torch.autograd.grad(loss, (vectors, table))
    assert loss > 1e3  # one of the two positions is as wrong as can be
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)
