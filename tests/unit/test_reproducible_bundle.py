"""The same inputs make the same bundle: on another day, under another umask and hash seed, from another folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_sync.publisher.bundle import (
    BundleSpec,
    Seal,
    check_sbom,
    create_bundle,
    pass_gate,
    read_bundle,
    read_sbom,
    read_spec,
    verify_bundle,
)
from nearcast.errors import Code, MeshError
from nearcast.store.contents import Contents
from nearcast.store.sealing import SEAL_SIZE_BYTES, key_id
from tests.tiny_models import affine_model

ROOT = Path(__file__).resolve().parents[2]
SPEC = f"""
name = "affine"
release = 3
semver = "1.2.0"
engine = "onnxruntime"
model_file = "affine.onnx"
files = ["zebra.txt", "labels.json"]
licence = "apache-2.0 OR mit"
golden = ["second.npz", "first.npz"]
quality = 0.9
data_sha256 = "{"d" * 64}"
parent = 2
properties = {{ zeta = "1", alpha = "2" }}

[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
batch_axis = 0

[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 4]
batch_axis = 0
"""
CREATE = """
import sys
from pathlib import Path
from model_sync.publisher.bundle import Seal, create_bundle, read_spec
source, out, seal = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
create_bundle(read_spec(source / "spec.toml"), source, out, seal=Seal(tenant="acme", key=b"k" * 32) if seal else None)
"""


def write_source(folder: Path, names: tuple[str, ...]) -> Path:
    """The same files, made in another order, with other times."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    makers: dict[str, Any] = {
        "affine.onnx": lambda path: path.write_bytes(affine_model()),
        "zebra.txt": lambda path: path.write_text("stripes\n"),
        "labels.json": lambda path: path.write_text('["a"]'),
        "second.npz": lambda path: np.savez(path, in_x=x),
        "first.npz": lambda path: np.savez(path, in_x=x + 1),
        "spec.toml": lambda path: path.write_text(SPEC),
    }
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        makers[name](folder / name)
        os.utime(folder / name, (1_000_000_000 + index, 1_500_000_000 - index))
    return folder


NAMES = ("affine.onnx", "zebra.txt", "labels.json", "second.npz", "first.npz", "spec.toml")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", NAMES)


@pytest.fixture
def spec(source: Path) -> BundleSpec:
    return read_spec(source / "spec.toml")


def seen(folder: Path) -> dict[str, tuple[str, int]]:
    files = {path.name: path for path in folder.iterdir()}
    return {
        name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode & 0o777)
        for name, path in files.items()
    }


@pytest.mark.parametrize("seal", [(), ("sealed",)], ids=["plain", "sealed"])
def test_i14_same_inputs_same_bytes(tmp_path: Path, source: Path, seal: tuple[str, ...]) -> None:
    other = write_source(tmp_path / "elsewhere" / "deep", NAMES[::-1])
    another_day = ["faketime", "2031-05-06 07:08:09"] if shutil.which("faketime") else []
    runs = [
        ([], source, "one", {"PYTHONHASHSEED": "1", "TZ": "UTC"}, 0o022),
        (another_day, other, "two", {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}, 0o077),
    ]
    for wrapper, folder, out, environ, umask in runs:
        command = [*wrapper, sys.executable, "-c", CREATE, str(folder), str(tmp_path / out), *seal]
        done = subprocess.run(
            command, env={**os.environ, **environ, "PYTHONPATH": str(ROOT)}, umask=umask, capture_output=True,
            check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
    assert seen(tmp_path / "one") == seen(tmp_path / "two")
    names = {"affine.onnx", "zebra.txt", "labels.json", "golden.bin", "sbom.cdx.json", "manifest.json"}
    assert set(seen(tmp_path / "one")) == names


def test_another_input_makes_another_bundle(tmp_path: Path, source: Path, spec: BundleSpec) -> None:
    create_bundle(spec, source, tmp_path / "one")
    (source / "zebra.txt").write_text("dots\n")
    create_bundle(spec, source, tmp_path / "two")
    one, two = seen(tmp_path / "one"), seen(tmp_path / "two")
    changed = {"zebra.txt", "sbom.cdx.json", "manifest.json"}
    assert {name for name in one if one[name] != two[name]} == changed


def test_a_sealed_bundle_opens_with_its_key_alone(tmp_path: Path, source: Path, spec: BundleSpec) -> None:
    plain = create_bundle(spec, source, tmp_path / "plain")
    manifest = create_bundle(spec, source, tmp_path / "sealed", seal=Seal(tenant="acme", key=b"k" * 32))
    assert verify_bundle(tmp_path / "sealed") == manifest
    assert manifest.encryption is not None
    assert (manifest.encryption.tenant, manifest.encryption.key_id) == ("acme", key_id(b"k" * 32))
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "acme.key").touch(0o600)
    (keys / "acme.key").write_bytes(b"k" * 32)
    contents = Contents(manifest, tmp_path / "sealed", tenant_keys=keys)
    for entry, sealed in zip(plain.files, manifest.files, strict=True):
        data = (tmp_path / "plain" / entry.path).read_bytes()
        assert contents.read(entry.path) == data
        assert sealed.size_bytes == entry.size_bytes + SEAL_SIZE_BYTES
        hidden = (tmp_path / "sealed" / entry.path).read_bytes()
        assert not any(data[at : at + 16] in hidden for at in range(0, max(1, len(data) - 16), 16))
    check_sbom(tmp_path / "sealed", manifest, keys)
    assert read_sbom(tmp_path / "sealed", manifest, keys) == read_sbom(tmp_path / "plain", plain)
    assert read_sbom(tmp_path / "sealed", manifest) is None
    assert pass_gate(tmp_path / "sealed", keys).vectors == 2
    with pytest.raises(MeshError, match="is not on this node; put its file into the folder of tenant keys") as caught:
        pass_gate(tmp_path / "sealed")
    assert caught.value.code is Code.UNAVAILABLE
    other = create_bundle(spec, source, tmp_path / "other", seal=Seal(tenant="acme", key=b"o" * 32))
    assert {one.sha256 for one in other.files}.isdisjoint(one.sha256 for one in manifest.files)


def test_a_bill_that_says_otherwise_is_refused(tmp_path: Path, source: Path, spec: BundleSpec) -> None:
    create_bundle(spec, source, tmp_path / "bundle")
    manifest, _ = read_bundle(tmp_path / "bundle")
    check_sbom(tmp_path / "bundle", manifest)
    bill = json.loads((tmp_path / "bundle" / "sbom.cdx.json").read_text())
    assert bill["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]
    from model_sync.publisher.sbom import require_sbom

    digests = {entry.path: entry.sha256 for entry in manifest.files if entry.path != "sbom.cdx.json"}
    data = (tmp_path / "bundle" / "sbom.cdx.json").read_bytes()
    require_sbom(manifest, data, digests)
    with pytest.raises(MeshError, match=r"about zebra\.txt"):
        require_sbom(manifest, data, digests | {"zebra.txt": "0" * 64})
    with pytest.raises(MeshError, match="about extra"):
        require_sbom(manifest, data, digests | {"extra": "0" * 64})
    with pytest.raises(MeshError, match="is no bill"):
        require_sbom(manifest, b"[]", digests)


def test_a_hard_link_is_no_file_of_a_bundle(tmp_path: Path, source: Path, spec: BundleSpec) -> None:
    create_bundle(spec, source, tmp_path / "bundle")
    (tmp_path / "second name").hardlink_to(tmp_path / "bundle" / "affine.onnx")
    with pytest.raises(MeshError, match="or is a link"):
        verify_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("line", "changed", "match"),
    [
        ('licence = "apache-2.0 OR mit"', 'licence = "GPL-3.0-only"', "not on the allow-list"),
        ("parent = 2", "parent = 3", "no earlier release"),
        (f'data_sha256 = "{"d" * 64}"', 'data_sha256 = "d"', "data_sha256"),
        ('"zebra.txt"', '"sbom.cdx.json"', "made here"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, source: Path, line: str, changed: str, match: str) -> None:
    assert line in SPEC
    (source / "spec.toml").write_text(SPEC.replace(line, changed))
    with pytest.raises(MeshError, match=match):
        create_bundle(read_spec(source / "spec.toml"), source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
