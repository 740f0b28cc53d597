"""Mamba-1 as the mixer of Mamba4Rec (arXiv 2403.03900), RecMamba (arXiv 2403.16371) and MambaRec."""

from __future__ import annotations

from llmrec.config import SequenceModel
from llmrec.ssm import Mamba

CAUSAL = True
STEPS = True


def build(model: SequenceModel, max_length: int) -> Mamba:
    """The layer with the recipe's sizes."""
    mixer = model.mixer
    return Mamba(model.dim, mixer.d_state, mixer.d_conv, mixer.expand, init=mixer.init)
