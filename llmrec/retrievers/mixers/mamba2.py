"""Mamba-2 as the mixer of 2Mamba4Rec (arXiv 2408.05606, section 3.1)."""

from __future__ import annotations

from llmrec.config import SequenceModel
from llmrec.ssm import Mamba2

CAUSAL = True
STEPS = True


def build(model: SequenceModel, max_length: int) -> Mamba2:
    """The layer with the recipe's sizes."""
    mixer = model.mixer
    return Mamba2(model.dim, mixer.d_state, mixer.d_conv, mixer.expand, mixer.headdim, chunk_size=mixer.chunk, init=mixer.init)
