"""Hydra as the mixer of Hydra4Rec (arXiv 2408.05606, section 3.3): every position sees the past and the future."""

from __future__ import annotations

from llmrec.config import SequenceModel
from llmrec.ssm import Hydra

CAUSAL = False
STEPS = False


def build(model: SequenceModel, max_length: int) -> Hydra:
    """The layer with the recipe's sizes."""
    mixer = model.mixer
    return Hydra(model.dim, mixer.d_state, mixer.d_conv, mixer.expand, mixer.headdim, chunk_size=mixer.chunk, init=mixer.init)
