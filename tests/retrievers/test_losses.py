import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.retrievers import losses


def test_chunked_softmax_equals_cross_entropy_without_the_padding_column(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 36)  # several chunks, the last one short
    torch.manual_seed(0)
    vectors = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 9, (11,))
    ours = losses.full_softmax(vectors, table, targets) * 3
    expected = F.cross_entropy(vectors @ table[1:].T, targets - 1) * 3
    assert_close(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, (vectors, table)), torch.autograd.grad(expected, (vectors, table)), strict=True):
        assert_close(a, b)
