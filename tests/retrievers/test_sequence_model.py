"""Exact parameter counts of the published models, causality, padding."""

import pytest
import torch
from torch.testing import assert_close

from llmrec.cli import read_settings
from llmrec.config import SequenceModel as Sizes
from llmrec.retrievers.mixers import is_causal
from llmrec.retrievers.sequence_model import SequenceModel


def recipe(name):
    return read_settings("retrieve", ["--dataset", "ml-1m", "--retriever", name])[0]


@pytest.mark.parametrize(("name", "non_embedding", "total"), [("2mamba4rec", 78_624, 297_312), ("sasrec", 100_096, 321_984)])
def test_parameter_counts_are_the_published_ones(name, non_embedding, total):
    config = recipe(name)
    model = SequenceModel(config.model, item_count=3_416, max_length=50)
    assert model.parameter_counts() == {"total": total, "non_embedding": non_embedding}


@pytest.mark.parametrize("name", ["2mamba4rec", "sasrec"])
def test_future_items_change_nothing_and_padding_neither(name):
    torch.manual_seed(0)
    config = recipe(name)
    model = SequenceModel(config.model, 30, 50).eval()
    assert is_causal(config.model.mixer)
    history = torch.randint(1, 31, (2, 9))
    changed = torch.cat([history[:, :6], torch.randint(1, 31, (2, 3))], 1)
    assert_close(model(history)[:, :6], model(changed)[:, :6], atol=1e-6, rtol=1e-5)
    padded = torch.cat([history, torch.zeros(2, 4, dtype=torch.long)], 1)
    assert_close(model.last(padded, torch.tensor([9, 9])), model.last(history, torch.tensor([9, 9])), atol=1e-6, rtol=1e-5)


def test_past_items_do_matter():
    torch.manual_seed(0)
    model = SequenceModel(Sizes(), 30, 50).eval()
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[9, 2, 3]])
    assert (model(a)[:, -1] - model(b)[:, -1]).abs().max() > 1e-4
