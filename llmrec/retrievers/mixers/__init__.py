"""What mixes the positions of a history: one file per mixer, one line here.

A mixer maps (batch, length, dim) to the same. `CAUSAL` says whether position t sees only positions up to t; a mixer that is
not causal also takes `mask`, (batch, length), false at padding. `STEPS` says whether the past fits into a state of constant
size: then it has `initial_state`, `step` and `forward(..., state, return_state)` as the layers of llmrec/ssm do.
"""

from __future__ import annotations

from torch import nn

from llmrec.config import Mixer, SequenceModel
from llmrec.errors import UserError
from llmrec.retrievers.mixers import attention, gated_mamba_attention, gru, hstu, hydra, latent_mamba, lru, mamba, mamba2

MIXERS = {
    "attention": attention,
    "gru": gru,
    "lru": lru,
    "mamba": mamba,
    "mamba2": mamba2,
    "hydra": hydra,
    "latent_mamba": latent_mamba,
    "gated_mamba_attention": gated_mamba_attention,
    "hstu": hstu,
}


def build_mixer(model: SequenceModel, max_length: int) -> nn.Module:
    """The mixer of one layer.

    Raises:
        UserError: when the recipe's sizes do not fit together.
    """
    if model.mixer.legacy_leak and model.mixer.name != "gated_mamba_attention":
        raise UserError(f"model.mixer.legacy_leak belongs to gated_mamba_attention: leave it false for {model.mixer.name}")
    try:
        return MIXERS[model.mixer.name].build(model, max_length)
    except ValueError as error:
        raise UserError(f"model.mixer {model.mixer.name}: {error}") from error


def is_causal(mixer: Mixer) -> bool:
    """Whether the mixer may be trained on all positions at once."""
    return MIXERS[mixer.name].CAUSAL and not mixer.legacy_leak


def check_steps(model: SequenceModel) -> None:
    """Make sure that a model of these sizes can go on from a state, one event at a time.

    Raises:
        UserError: when it cannot; it names the mixers that can.
    """
    if not MIXERS[model.mixer.name].STEPS:
        problem = f"mixer {model.mixer.name} reads all earlier events again at every step"
    elif model.positions:
        problem = "with model.positions every new event moves all others to another position"
    elif model.repeat_bias:
        problem = "with model.repeat_bias scores depend on every item of the history"
    else:
        return
    able = ", ".join(name for name, mixer in MIXERS.items() if mixer.STEPS)
    raise UserError(
        f"{problem}, so there is no state to keep: take a mixer that has one ({able}), model.positions and model.repeat_bias false"
    )
