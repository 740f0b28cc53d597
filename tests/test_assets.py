"""Data sets and models come from where they should, whole, with the right message when they do not.

The publisher is a web server on the loopback, the package index a folder with a tiny wheel.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from llmrec import downloads
from llmrec.assets import file_sha256, is_mamba_checkpoint, obtain_dataset, obtain_model
from llmrec.config import Columns, Source, Wheel
from llmrec.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of our own, no data folder, and a probe that has not been made."""
    for name in ("LLMREC_DATA", "LLMREC_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    downloads._probe.cache_clear()
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path):
    """Serves a folder; `asked` lists the requests."""
    folder = tmp_path / "www"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(f"{self.command} {self.path}")

        def copyfile(self, source, output):
            if self.path.startswith("/broken"):  # promises a whole file and sends half
                output.write(source.read()[: folder.joinpath(self.path[1:]).stat().st_size // 2])
            else:
                super().copyfile(source, output)

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    web.folder, web.asked, web.url = folder, asked, f"http://127.0.0.1:{web.server_port}"
    yield web
    web.shutdown()
    web.server_close()


@pytest.fixture
def ml_1m_zip(server):
    path = server.folder / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (FIXTURES / "ml-1m").iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the RecBole files of ml-100k and a GGUF file, which pip finds without network."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tinydata-1.0-py3-none-any.whl"
    files = {f"tinydata/set/{file.name}": file.read_bytes() for file in (FIXTURES / "ml-100k-recbole").iterdir()}
    files |= {
        "tinydata/model.gguf": b"GGUF",
        "tinydata/__init__.py": b"raise SystemExit('installed')",
        "tinydata-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
        "tinydata-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | {"tinydata-1.0.dist-info/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return Wheel("tinydata==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "tinydata/set")


def ml_1m(server, **changes) -> Source:
    return Source(format="ml-1m", urls=[f"{server.url}/ml-1m.zip"], licence="research only", **changes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.glob("*/.*")]


class TestOrder:
    def test_own_folder_comes_first_and_nothing_is_asked(self, server, ml_1m_zip, tmp_path, monkeypatch):
        data = Path(shutil.copytree(FIXTURES / "ml-1m", tmp_path / "data" / "ml-1m"))
        monkeypatch.setenv("LLMREC_DATA", str(data.parent))
        asset = obtain_dataset("ml-1m", ml_1m(server))
        assert (asset.folder, asset.origin, server.asked) == (data, "local", [])
        assert asset.files == {name: sha256(data / name) for name in ("ratings.dat", "movies.dat")}

    def test_official_then_cache(self, server, ml_1m_zip, home, capsys):
        first = obtain_dataset("ml-1m", ml_1m(server))
        assert (first.origin, first.folder) == ("official", home / "datasets" / "ml-1m")
        assert "Licence: research only" in capsys.readouterr().err
        asked = len(server.asked)
        ml_1m_zip.unlink()
        assert obtain_dataset("ml-1m", ml_1m(server)) == first
        assert len(server.asked) == asked
        record = json.loads((first.folder / "asset.json").read_text())
        assert record["origin"] == "official"
        assert record["address"] == f"{server.url}/ml-1m.zip"
        assert record["files"]["movies.dat"] == {"bytes": (first.folder / "movies.dat").stat().st_size, "sha256": first.files["movies.dat"]}
        assert leftovers(home) == []

    def test_packed_files_of_several_addresses_stay_packed(self, server):
        for name in ("Video_Games.csv", "meta_Video_Games.jsonl"):
            (server.folder / f"{name}.gz").write_bytes(gzip.compress((FIXTURES / "amazon-2023" / name).read_bytes()))
        urls = [f"{server.url}/Video_Games.csv.gz", f"{server.url}/meta_Video_Games.jsonl.gz"]
        source = Source(format="amazon-2023", interactions="Video_Games.csv", items="meta_Video_Games.jsonl", urls=urls)
        assert obtain_dataset("videogames", source).files.keys() == {"Video_Games.csv.gz", "meta_Video_Games.jsonl.gz"}

    def test_wheel_when_the_address_fails(self, server, wheel, home):
        source = Source(format="ml-100k", urls=[f"{server.url}/nowhere.zip"], wheel=wheel)
        asset = obtain_dataset("ml-100k", source)
        assert asset.origin == "wheel"
        assert asset.files == {name: sha256(FIXTURES / "ml-100k-recbole" / name) for name in ("ml-100k.inter", "ml-100k.item")}
        assert obtain_dataset("ml-100k", source) == asset
        assert leftovers(home) == []

    def test_offline_skips_the_address(self, server, ml_1m_zip, wheel, monkeypatch):
        monkeypatch.setenv("LLMREC_OFFLINE", "1")
        assert obtain_dataset("ml-100k", Source(format="ml-100k", urls=[f"{server.url}/ml-1m.zip"], wheel=wheel)).origin == "wheel"
        assert server.asked == []
        assert os.environ["HF_HUB_OFFLINE"] == "1"


class TestTrouble:
    def test_nothing_answers(self, home, monkeypatch):
        monkeypatch.setenv("LLMREC_OFFLINE", "1")
        source = Source(format="ml-100k", urls=["https://publisher.example/ml-100k.zip"])
        with pytest.raises(UserError) as caught:
            obtain_dataset("ml-100k", source)
        message = str(caught.value)
        assert "put u.data and u.item or ml-100k.inter and ml-100k.item into " + str(home / "datasets" / "ml-100k") in message
        assert "\n" not in message
        shutil.copytree(FIXTURES / "ml-100k", home / "datasets" / "ml-100k")  # the user does it
        assert obtain_dataset("ml-100k", source).origin == "local"

    def test_a_broken_transfer_is_not_used(self, server, home):
        (server.folder / "broken.zip").write_bytes(bytes(100_000))
        source = Source(format="ml-1m", urls=[f"{server.url}/broken.zip"])
        with pytest.raises(UserError, match=r"broke off after 50,000 of 100,000 bytes|did not deliver"):
            obtain_dataset("ml-1m", source)
        assert not (home / "datasets" / "ml-1m").exists()
        assert leftovers(home) == []

    def test_another_checksum_is_not_used(self, server, ml_1m_zip, home):
        good = hashlib.md5(ml_1m_zip.read_bytes()).hexdigest()
        with pytest.raises(UserError, match=f"the recipe says md5:{'0' * 32}"):
            obtain_dataset("ml-1m", ml_1m(server, checksums=[f"md5:{'0' * 32}"]))
        assert not (home / "datasets" / "ml-1m").exists()
        assert obtain_dataset("ml-1m", ml_1m(server, checksums=[f"md5:{good}"])).origin == "official"

    def test_a_damaged_archive_is_not_used(self, server, ml_1m_zip):
        ml_1m_zip.write_bytes(ml_1m_zip.read_bytes()[:-30])
        with pytest.raises(UserError, match=r"ml-1m\.zip is damaged"):
            obtain_dataset("ml-1m", ml_1m(server))

    def test_an_archive_without_the_files_is_not_used(self, server, home):
        with zipfile.ZipFile(server.folder / "ml-1m.zip", "w") as archive:
            archive.writestr("ml-1m/ratings.dat", "1::2::3::4\n")
        with pytest.raises(UserError, match=r"movies\.dat not found"):
            obtain_dataset("ml-1m", ml_1m(server))
        assert not (home / "datasets" / "ml-1m").exists()

    def test_a_wheel_with_another_checksum_is_not_used(self, wheel):
        wheel.sha256 = "0" * 64
        with pytest.raises(UserError, match=f"the recipe pins {'0' * 64}"):
            obtain_dataset("ml-100k", Source(format="ml-100k", wheel=wheel))

    def test_a_changed_cache_says_what_to_delete(self, server, ml_1m_zip):
        folder = obtain_dataset("ml-1m", ml_1m(server)).folder
        (folder / "ratings.dat").write_text("1::")
        with pytest.raises(UserError, match=f"ratings.dat is not the file .* delete {folder} "):
            obtain_dataset("ml-1m", ml_1m(server))

    def test_a_cache_that_cannot_be_written(self, server, ml_1m_zip, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "file"))
        with pytest.raises(UserError, match="set LLMREC_HOME to another folder"):
            obtain_dataset("ml-1m", ml_1m(server))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, server, ml_1m_zip, home, monkeypatch):
        def open_full(path, mode="r", **settings):
            return open("/dev/full" if "w" in mode else path, mode, **settings)

        monkeypatch.setattr(downloads, "open", open_full, raising=False)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            obtain_dataset("ml-1m", ml_1m(server))
        assert not (home / "datasets" / "ml-1m").exists()


class TestOwnFiles:
    SOURCE = Source(format="csv", interactions="visits.csv", items="things.csv", columns=Columns(user="who"))

    def test_paths_are_relative_to_the_current_folder(self, monkeypatch):
        monkeypatch.chdir(FIXTURES / "csv")
        asset = obtain_dataset("mine", self.SOURCE)
        assert (asset.folder, asset.origin) == (Path(), "local")
        assert asset.files == {name: sha256(FIXTURES / "csv" / name) for name in ("visits.csv", "things.csv")}

    def test_a_missing_path_is_named(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"visits\.csv and things\.csv not found"):
            obtain_dataset("mine", self.SOURCE)


class TestProbe:
    def test_the_first_failure_decides_for_the_process(self, server, ml_1m_zip):
        assert not downloads.outside_answers("http://127.0.0.1:9/")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert not downloads.outside_answers(f"{server.url}/ml-1m.zip")
        assert server.asked == []

    def test_an_answer_is_remembered(self, server, ml_1m_zip):
        assert downloads.outside_answers(f"{server.url}/ml-1m.zip")
        assert downloads.outside_answers(f"{server.url}/ml-1m.zip")
        assert server.asked == ["HEAD /ml-1m.zip"]

    @pytest.mark.parametrize("url", ["nonsense", "http://[", "https://127.0.0.1:9"])
    def test_it_never_raises(self, url):
        assert not downloads.outside_answers(url)


def test_checksums_are_remembered_until_the_file_changes(tmp_path, home):
    path = tmp_path / "file"
    path.write_text("one")
    assert file_sha256(path) == sha256(path)
    known = home / "checksums.json"
    stored = json.loads(known.read_text())
    stored[str(path)][2] = "remembered"
    known.write_text(json.dumps(stored))
    assert file_sha256(path) == "remembered"
    path.write_text("three")
    assert file_sha256(path) == sha256(path)
    known.write_text("{ damaged")
    assert file_sha256(path) == sha256(path)


class TestModels:
    def folder(self, path: Path, *names: str) -> Path:
        path.mkdir(parents=True)
        for name in names:
            (path / name).write_text("{}")
        return path

    def test_a_folder_is_used_as_it_is(self, tmp_path):
        folder = self.folder(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors", "optimizer.pt")
        asset = obtain_model(str(folder))
        assert (asset.folder, asset.origin) == (folder, "local")
        assert asset.files.keys() == {"config.json", "tokenizer.json", "model.safetensors"}

    def test_pickled_weights_are_not_read(self, tmp_path):
        folder = self.folder(tmp_path / "model", "config.json", "pytorch_model.bin")
        with pytest.raises(UserError, match="pickled weights are not read"):
            obtain_model(str(folder))

    def test_a_missing_shard_is_named(self, tmp_path):
        folder = self.folder(tmp_path / "model", "config.json", "model-1.safetensors")
        shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
        with pytest.raises(UserError, match=r"lacks model-2\.safetensors"):
            obtain_model(str(folder))

    @pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c"])
    def test_a_missing_folder_is_named(self, model):
        with pytest.raises(UserError, match=f"missing base model {model}: no such folder"):
            obtain_model(model)

    def test_offline_without_a_copy(self, home, monkeypatch):
        monkeypatch.setenv("LLMREC_OFFLINE", "1")
        with pytest.raises(UserError, match=f"into {home}/models/somebody--something@v1, or give the path"):
            obtain_model("somebody/something", revision="v1")

    def test_the_wheel_when_the_hub_does_not_answer(self, home, wheel, monkeypatch):
        monkeypatch.setenv("LLMREC_OFFLINE", "1")
        wheel.path = "tinydata/model.gguf"
        asset = obtain_model("somebody/something", wheel=wheel, licence="Apache-2.0")
        assert (asset.folder, asset.origin) == (home / "models" / "somebody--something", "wheel")
        assert asset.files == {"model.gguf": hashlib.sha256(b"GGUF").hexdigest()}
        assert obtain_model("somebody/something", wheel=wheel, licence="Apache-2.0") == asset

    def test_a_model_in_the_data_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
        folder = self.folder(tmp_path / "somebody--something", "config.json", "model.safetensors")
        assert obtain_model("somebody/something").folder == folder


HUB = """
import hashlib, http.server, json, os, sys, threading
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
COMMIT = "a" * 40

class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def send(self, body, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)
    def do_GET(self):
        path = self.path.split("?")[0]
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in FILES.items()]
            self.send(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            body = {"id": "o/m", "modelId": "o/m", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.send(json.dumps(body).encode(), Content_Type="application/json")
        elif "/resolve/" in path:
            body = FILES[path.rsplit("/", 1)[1]]
            self.send(body, ETag='"%s"' % hashlib.sha1(body).hexdigest(), X_Repo_Commit=COMMIT)
        else:
            self.send(b"")
    do_HEAD = do_GET

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from llmrec.assets import obtain_model
first = obtain_model("o/m")
FILES["config.json"] = b'{"ssm_cfg": {"layer": "Mamba2"}}'
del FILES["model.safetensors"]
mamba = obtain_model("state-spaces/mamba2-130m")
server.shutdown(); server.server_close()
again = obtain_model("o/m")  # the hub is gone, the hub's cache is not
print(json.dumps([first.origin, sorted(first.files), again == first, sorted(mamba.files)]))
"""


def test_the_hub_delivers_safetensors_and_text_only_but_for_mamba_checkpoints(tmp_path):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files, of_mamba = ["config.json", "model.safetensors", "tokenizer.json"], ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert json.loads(done.stdout) == ["official", files, True, of_mamba]


def test_a_converted_mamba_that_keeps_ssm_cfg_is_an_ordinary_model(tmp_path):
    """As state-spaces/mamba-130m-hf says it: safetensors, and no pytorch_model.bin."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "ssm_cfg": {}}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not is_mamba_checkpoint(tmp_path)
    assert {"config.json", "model.safetensors"} <= set(obtain_model(str(tmp_path)).files)
