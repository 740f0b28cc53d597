"""The cache: finished folders with an `asset.json` that says where they came from, and the checksums of files.

`$LLMREC_HOME` (default ~/.cache/llmrec) has `datasets/<name>`, `models/<name>` and checksums.json. What is fetched lands in
a temporary folder that is renamed when it is complete, so a folder of the cache is whole or not there.
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
from pathlib import Path
from typing import Any, Literal

from llmrec.errors import UserError

RECORD = "asset.json"
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


def cache_folder() -> Path:
    """`$LLMREC_HOME`, or ~/.cache/llmrec."""
    return Path(os.environ.get("LLMREC_HOME") or "~/.cache/llmrec").expanduser()


def file_sha256(path: Path) -> str:
    """Checksum of a file, remembered by path, size and modification time: large files are read once."""
    known_path = cache_folder() / "checksums.json"
    stat = path.stat()
    key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    known = read_json(known_path)
    if known.get(key, [None])[:2] == state:
        return known[key][2]
    digest = _sha256(path)
    try:
        known_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known_path, known | {key: [*state, digest]})
    except OSError:
        pass  # a cache that cannot be written only costs time
    return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_data_folder(name: str, complete: Complete, licence: str | None) -> Asset | None:
    """What a user has put into `$LLMREC_DATA/<name>`, or None when there is no such folder.

    Raises:
        UserError: when a file is missing in it.
    """
    data = os.environ.get("LLMREC_DATA")
    if not data or not (Path(data) / name).is_dir():
        return None
    folder = Path(data) / name
    return make_asset(folder, "local", complete(folder), licence)


def in_cache(kind: str, name: str, complete: Complete, licence: str | None) -> Asset | None:
    """What was fetched before, or None.

    Raises:
        UserError: when a file is missing or no longer has the size it was fetched with.
    """
    folder = cache_folder() / kind / name
    if not folder.is_dir():
        return None
    record = read_json(folder / RECORD)  # none when somebody put the files there by hand
    for file, facts in record.get("files", {}).items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != facts["bytes"]:
            raise UserError(
                f"{folder / file} is not the file of {facts['bytes']:,} bytes that was fetched: delete {folder} and run the command again"
            )
    return make_asset(folder, record.get("origin", "local"), complete(folder), record.get("licence", licence))


def fetch_into_cache(kind: str, name: str, deliveries: list[Delivery], complete: Complete, licence: str | None, remedy: str) -> Asset:
    """Take the first delivery that works into the cache: whole, or not at all.

    Args:
        kind: "datasets" or "models".
        name: of the folder.
        deliveries: what to try, in this order.
        complete: finds the files that count.
        licence: one line, printed.
        remedy: what the user can do when nothing works.

    Raises:
        UserError: when nothing works; it carries every reason and the remedy.
    """
    folder = cache_folder() / kind / name
    reasons = []
    for origin, address, fetch in deliveries:
        say(f"fetching {name} from {address}")
        try:
            with _landing(folder) as temporary:
                fetch(temporary)
                _record(temporary, complete(temporary), origin, address, licence)
        except UserError as error:
            reasons.append(str(error))
            say(f"{name}: {error}")
        else:
            say(f"{name} is in {folder}. Licence: {licence or 'unknown'}")
            return make_asset(folder, origin, complete(folder), licence)
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


def make_asset(folder: Path, origin: Origin, files: list[Path], licence: str | None) -> Asset:
    """An asset with the checksums of its files."""
    return Asset(folder, origin, {os.path.relpath(file, folder): file_sha256(file) for file in files}, licence)


def _record(folder: Path, files: list[Path], origin: Origin, address: str, licence: str | None) -> None:
    facts = {os.path.relpath(file, folder): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(folder / RECORD, {"origin": origin, "address": address, "licence": licence, "date": date, "files": facts})


def suggested_folder(kind: str, name: str) -> Path:
    """Where a user should put files by hand."""
    data = os.environ.get("LLMREC_DATA")
    return Path(data) / name if data else cache_folder() / kind / name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def say(message: str) -> None:
    """Tell the person at the terminal; stdout is for results."""
    print(f"llmrec: {message}", file=sys.stderr, flush=True)
