"""The linear recurrent unit as the mixer of LRURec (arXiv 2310.02367)."""

from __future__ import annotations

from llmrec.config import SequenceModel
from llmrec.ssm import LRU

CAUSAL = True
STEPS = True


def build(model: SequenceModel, max_length: int) -> LRU:
    """The layer with the recipe's sizes."""
    return LRU(model.dim, model.mixer.hidden)
