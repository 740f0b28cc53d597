"""What mixes the positions of a history: one file per mixer, one line here.

A mixer maps (batch, length, dim) to the same; `CAUSAL` says whether position t sees only positions up to t.
"""

from __future__ import annotations

from torch import nn

from llmrec.config import Mixer, SequenceModel
from llmrec.retrievers.mixers import attention, mamba2

MIXERS = {"attention": attention, "mamba2": mamba2}


def build_mixer(model: SequenceModel) -> nn.Module:
    """The mixer of one layer."""
    return MIXERS[model.mixer.name].build(model)


def is_causal(mixer: Mixer) -> bool:
    """Whether the mixer may be trained on all positions at once."""
    return MIXERS[mixer.name].CAUSAL
