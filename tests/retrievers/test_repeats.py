"""The learned bias of items that the history holds: in the loss, in the scores, and what it learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec import config
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.retrievers import losses, online, training
from llmrec.retrievers.repeats import Seen
from llmrec.retrievers.sequence_model import SequenceModel

HISTORIES = torch.tensor([[3, 5, 3, 2, 0], [1, 1, 4, 0, 0]])
ROW, COLUMN = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 2, 3, 1, 2])


def held(items: int) -> torch.Tensor:
    """1 where a position's history holds the item, (positions, items)."""
    table = torch.zeros(len(ROW), items, dtype=torch.float64)
    for at, (row, column) in enumerate(zip(ROW, COLUMN, strict=True)):
        for item in HISTORIES[row, : column + 1]:
            table[at, item - 1] = 1
    return table


def model_of(**settings):
    torch.manual_seed(0)
    sizes = config.SequenceModel(mixer=config.Mixer(d_state=8, headdim=8), dim=16, inner=32, repeat_bias=True, **settings)
    return SequenceModel(sizes, 30, 10)


@pytest.mark.parametrize("logits", [1 << 20, 16])
def test_the_loss_is_cross_entropy_of_scores_with_the_bias(monkeypatch, logits):
    monkeypatch.setattr(losses, "LOGITS", logits)
    monkeypatch.setattr(losses, "FEWEST", 2)  # the small one: several chunks
    torch.manual_seed(0)
    vectors = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 5, 8, 1, 2])
    ours = losses.full_softmax(vectors, table, targets, (Seen.at(HISTORIES, ROW, COLUMN), bias)) * 3
    expected = F.cross_entropy(vectors @ table[1:].T + bias * held(8), targets - 1) * 3
    assert_close(ours, expected)
    leaves = (vectors, table, bias)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_close(a, b)


def test_scores_have_it_once_for_every_item_of_the_window():
    model = model_of()
    history = np.array([30, *range(1, 9), 4, 4], dtype=np.int32)  # 11 events, of which the model sees 10
    scorer = training.SequenceScorer(model, 10)
    plain = scorer.scores(np.array([0]), [history])
    with torch.no_grad():
        model.tenth_of_repeat_bias.fill_(-0.3)
    change = scorer.scores(np.array([0]), [history]) - plain
    expected = torch.zeros(1, 30)
    expected[0, :8] = -3
    assert_close(change, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.1, "item_bias": True}], ids=["products", "cosines"])
def test_scores_in_float64_are_products_and_the_bias_of_what_is_held(settings):
    model = model_of(**settings).double()
    with torch.no_grad():
        model.tenth_of_repeat_bias.fill_(0.25)
    histories = [np.array([7, 2, 7], dtype=np.int32), np.array([1, 30, 5, 5, 9], dtype=np.int32)]
    scores = training.SequenceScorer(model, 10).scores(np.array([0, 1]), histories)
    assert scores.dtype == torch.float64
    for row, history in zip(scores, histories, strict=True):
        vector = model(torch.from_numpy(history[None].astype(np.int64)))[0, -1]
        holds = torch.tensor([item in history for item in range(1, 31)])
        assert_close(row, (model.item_vectors()[1:] @ vector + 2.5 * holds).detach())


def repeating(again: bool) -> Sequences:
    """40 users who meet 12 of 30 items, each once or, `again`, over and over."""
    random = np.random.default_rng(0)
    rows = [np.tile(random.permutation(30)[:3], 4) if again else random.permutation(30)[:12] for _ in range(40)]
    split = np.tile(np.array([TRAIN] * 10 + [VALID, TEST], dtype=np.int8), 40)
    return Sequences(np.arange(41) * 12, np.concatenate(rows).astype(np.int32) + 1, np.ones(480, dtype=np.float32), split, 30)


@pytest.mark.parametrize(("again", "sign"), [(False, -1), (True, 1)])
def test_it_learns_whether_people_come_back(again, sign, tmp_path):
    model = model_of()
    how = config.Training(max_length=10, batch=8, epochs=30, patience=30, learning_rate=0.02, warmup=0)
    sequences = repeating(again)
    training.train(model, sequences, how, sequences.cases("valid"), tmp_path, seed=0)
    assert model.repeat_bias * sign > 1


def test_what_cannot_have_it_says_so(tmp_path):
    sequences = repeating(False)
    how = config.Training(max_length=10, loss="sampled_softmax")
    with pytest.raises(UserError, match="full_softmax"):
        training.train(model_of(), sequences, how, sequences.cases("valid"), tmp_path, seed=0)
    with pytest.raises(UserError, match="repeat_bias"):
        online.read(model_of(), [[1, 2]])
