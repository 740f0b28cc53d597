"""Unpack archives of strangers: everything is checked before the first byte is written.

A member may not be a link or a device, nor lie outside the target folder, and all together may not exceed a size. Reading
a member to its end verifies its checksum, so a truncated or damaged archive is an error, not half a data set.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from llmrec.errors import UserError

SUFFIXES = (".zip", ".whl", ".tar.gz", ".tgz")
LIMIT = 64 << 30  # bytes unpacked; no data set of the recipes comes near
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, its size unpacked in bytes, and how to read it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, target: Path, inside: str = "", limit: int = LIMIT) -> None:
    """Unpack a zip, wheel or tar.gz into a folder.

    A single folder at the top of the archive is left out of the names.

    Args:
        archive: the file; its suffix says what it is.
        target: folder to write into, an empty one: what is in the way is overwritten.
        inside: only this file, or the files of this folder, without the folder's name.
        limit: refuse more than this many bytes unpacked.

    Raises:
        UserError: damaged archive, unsafe member, too large, or nothing at `inside`.
    """
    with _readable(archive), _open(archive) as members:
        names = _safe_names(archive, members, inside)
        total = sum(member.size for member in members)
        if total > limit:
            raise UserError(f"{archive} unpacks to {total:,} bytes, more than {limit:,}: it is not what it should be, delete it")
        for member in members:
            if member.name in names:
                path = target / names[member.name]
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as packed, open(path, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)


def check_gzip(path: Path) -> None:
    """Read a `.gz` file to its end.

    Raises:
        UserError: when it is truncated or damaged.
    """
    with _readable(path), gzip.open(path) as file:
        while file.read(1 << 20):
            pass


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): delete it and fetch it again") from error


@contextmanager
def _open(archive: Path) -> Iterator[list[Member]]:
    """The files of an archive; links and devices are refused here, where the formats differ."""
    if archive.name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(archive) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            special = [i.filename for i in infos if stat.S_IFMT(i.external_attr >> 16) not in (0, stat.S_IFREG)]
            _refuse(archive, special, "is no plain file")
            yield [Member(info.filename, info.file_size, lambda info=info: zipped.open(info)) for info in infos]  # type: ignore[misc]
    else:
        check_gzip(archive)  # tarfile does not look at what follows its last member
        with tarfile.open(archive, "r:gz") as tarred:
            entries = [entry for entry in tarred if not entry.isdir()]
            _refuse(archive, [entry.name for entry in entries if not entry.isfile()], "is no plain file")
            yield [Member(e.name, e.size, lambda e=e: cast(IO[bytes], tarred.extractfile(e))) for e in entries]  # type: ignore[misc]


def _refuse(archive: Path, names: list[str], reason: str) -> None:
    if names:
        raise UserError(f"{archive}: member {names[0]!r} {reason}; the archive is not safe to unpack, delete it")


def _safe_names(archive: Path, members: list[Member], inside: str) -> dict[str, PurePosixPath]:
    """Name in the archive -> path below the target, for the members that are wanted."""
    paths = {member.name: PurePosixPath(member.name) for member in members}
    outside = [name for name, path in paths.items() if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name]
    _refuse(archive, outside, "lies outside the archive")
    if inside:
        wanted = PurePosixPath(inside)
        base = wanted.parent if wanted in paths.values() else wanted
        names = {name: path.relative_to(base) for name, path in paths.items() if path.is_relative_to(wanted)}
    else:
        tops = {path.parts[0] for path in paths.values()}
        single = len(tops) == 1 and all(len(path.parts) > 1 for path in paths.values())
        names = {name: PurePosixPath(*path.parts[1:]) if single else path for name, path in paths.items()}
    if not names:
        raise UserError(f"{archive} holds no {inside or 'files'}: it is not what it should be, delete it")
    return names
