"""Weights that FSDP or ZeRO has split over the processes, put together on rank 0, which saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

from llmrec import distributed
from llmrec.rankers.backbone import TunedModel


def trained_weights(trainer: Trainer) -> dict[str, Any]:
    """The weights that are trained, whole, by name, on rank 0; elsewhere there may be none. All processes call it together.

    Under ZeRO-3 the frozen base comes with them and needs room in rank 0's memory.
    """
    if trainer.accelerator.is_fsdp2:
        only_trained = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(trainer.model_wrapped, options=only_trained)
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def unshard(trainer: Trainer) -> None:
    """Give rank 0's model the whole weights after a training; the others keep their parts."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    whole = trained_weights(trainer)
    if distributed.is_main():
        put_together(trainer.accelerator.unwrap_model(trainer.model), whole)


def put_together(model: TunedModel, whole: Mapping[str, Tensor]) -> None:
    """Give `model` these weights for those that are trained; a head that is the embedding stays the embedding.

    Args:
        model: with an adapter, or tuned whole; in place.
        whole: weights by name.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, nn.Parameter(whole[name]))
    if not isinstance(model, PeftModel):
        model.tie_weights()  # tied weights have one name, so the other one still held the old tensor
