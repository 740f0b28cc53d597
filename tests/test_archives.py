"""Good archives unpack; dangerous and damaged ones leave nothing behind."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile

import pytest

from llmrec.archives import check_gzip, unpack
from llmrec.errors import UserError

FILES = {"ml-1m/ratings.dat": b"1::2::3::4\n" * 5000, "ml-1m/movies.dat": b"2::Two::Drama\n", "ml-1m/deep/README": b"read me"}


def make_archive(path, files: dict[str, bytes]):
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.fixture(params=["x.zip", "x.tar.gz"])
def archive(request, tmp_path):
    return tmp_path / request.param


def test_a_single_top_folder_is_left_out(archive, target):
    unpack(make_archive(archive, FILES), target)
    assert unpacked(target) == {name.removeprefix("ml-1m/"): content for name, content in FILES.items()}


def test_several_tops_stay(archive, target):
    files = FILES | {"other/file": b"x"}
    unpack(make_archive(archive, files), target)
    assert unpacked(target) == files


@pytest.mark.parametrize(("inside", "expected"), [("ml-1m/deep", {"README"}), ("ml-1m/movies.dat", {"movies.dat"})])
def test_only_what_is_inside(archive, target, inside, expected):
    unpack(make_archive(archive, FILES), target, inside=inside)
    assert unpacked(target).keys() == expected


def test_nothing_inside_is_an_error(archive, target):
    with pytest.raises(UserError, match="holds no ml-1m/dee"):
        unpack(make_archive(archive, FILES), target, inside="ml-1m/dee")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\..\\evil", "C:evil"])
def test_members_outside_are_refused(archive, target, name):
    with pytest.raises(UserError, match="lies outside"):
        unpack(make_archive(archive, FILES | {name: b"x"}), target)
    assert unpacked(target) == {}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_tar_are_refused(tmp_path, target, kind):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="no plain file"):
        unpack(path, target)


def test_links_in_zip_are_refused(tmp_path, target):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="no plain file"):
        unpack(path, target)


def test_a_bomb_is_refused_before_it_is_unpacked(archive, target):
    make_archive(archive, {"a/zeros": bytes(1 << 20), "a/more": bytes(1 << 20)})
    with pytest.raises(UserError, match="2,097,152 bytes, more than 2,000,000"):
        unpack(archive, target, limit=2_000_000)
    assert unpacked(target) == {}


def test_truncated_archives_are_damaged(archive, target):
    make_archive(archive, {"a": gzip.compress(bytes(range(256)) * 999)})
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"damaged or incomplete.*fetch it again"):
        unpack(archive, target)


def test_a_flipped_bit_is_noticed(tmp_path, target):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", b"ratings" * 100)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        unpack(path, target)


def test_a_page_instead_of_an_archive(archive, target):
    archive.write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="damaged"):
        unpack(archive, target)


def test_gzip_is_read_to_its_end(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"1,2\n" * 9999))
    check_gzip(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"x\.csv\.gz is damaged"):
        check_gzip(path)
