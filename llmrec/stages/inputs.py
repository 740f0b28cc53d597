"""What stages read from outside: the raw data set and the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec import assets
from llmrec.assets import Asset
from llmrec.config import Config
from llmrec.errors import UserError
from llmrec.stages import STAGES, dataset_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def dataset(config: Config) -> Asset:
    """The raw files, fetched if need be."""
    return assets.obtain_dataset(dataset_name(config), config.source)


def model(config: Config) -> Asset:
    """The base model's files, fetched if need be."""
    base = config.base
    return assets.obtain_model(base.id, base.revision, base.wheel, base.licence)


def fingerprints(stage: str, config: Config) -> dict[str, str]:
    """Fingerprints of what a stage reads from outside, by name."""
    if stage == "prepare":
        return dataset(config).files
    return model(config).files if STAGES[stage].uses_base else {}


def missing(stage: str, config: Config) -> str | None:
    """What a stage would have to fetch first, or None."""
    if stage == "prepare" and assets.find_dataset(dataset_name(config), config.source) is None:
        return f"data set {dataset_name(config)}"
    if STAGES[stage].uses_base and assets.find_model(config.base.id, config.base.revision) is None:
        return f"base model {config.base.id}"
    return None


def model_shape(config: Config) -> PreTrainedConfig | None:
    """The base model's configuration: its own where that is here, else what the recipe says, else the hub's; None where none is.

    Raises:
        UserError: base.shape is of no known family.
    """
    from transformers import AutoConfig

    base = config.base
    found = assets.find_model(base.id, base.revision)
    if found is not None:
        for folder in (found.folder, _dequantised(found.folder)):
            if (folder / "config.json").exists():
                return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if base.shape is not None:
        try:
            return AutoConfig.for_model(**base.shape)
        except (TypeError, ValueError) as error:
            raise UserError(f"base.shape: {error}; give what config.json has, model_type among it") from error
    if assets.hub_answers(base.id):
        try:
            return AutoConfig.from_pretrained(base.id, revision=base.revision, trust_remote_code=False)
        except OSError:  # a gated model, or none of that name: fetching it will say so
            return None
    return None


def base_folder(config: Config) -> Path:
    """A folder of the base model that transformers loads; GGUF weights are dequantised into the cache once."""
    asset = model(config)
    quantised = sorted(asset.folder.glob("*.gguf"))
    if not quantised:
        return asset.folder
    from llmrec.rankers.gguf import dequantise

    folder = _dequantised(asset.folder)
    if not folder.exists():
        dequantise(quantised[0], folder)
    return folder


def _dequantised(folder: Path) -> Path:
    """Where the GGUF weights of `folder` lie as an ordinary checkpoint."""
    return folder.with_name(folder.name + "-dequantised")


def weights_origin(config: Config) -> str:
    """Which weights these are, in one line for the cards: the publisher's, or a registry copy's."""
    asset = model(config)
    note = base_folder(config) / "weights.json"
    described = json.loads(note.read_text())["weights"] if note.exists() else config.base.revision or "as published"
    packed = ", in 4 bits (nf4)" if config.base.quantise == "nf4" else ""
    return f"{config.base.id}: {described} ({asset.origin}){packed}"
