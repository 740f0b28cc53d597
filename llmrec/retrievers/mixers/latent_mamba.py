"""Multi-head latent Mamba as a mixer (arXiv 2504.07398, section 4.2.1)."""

from __future__ import annotations

from llmrec.config import SequenceModel
from llmrec.ssm import LatentMamba

CAUSAL = True
STEPS = True


def build(model: SequenceModel, max_length: int) -> LatentMamba:
    """The layer with the recipe's sizes."""
    m = model.mixer
    return LatentMamba(model.dim, m.heads, m.d_latent, m.d_state, m.d_conv, m.expand, m.headdim, chunk_size=m.chunk, init=m.init)
