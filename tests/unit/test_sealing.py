"""Sealed files: the same bytes every time, no key and nonce for two contents, and nothing opens that is not genuine."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nearcast.errors import Code, MeshError
from nearcast.store.contents import Contents
from nearcast.store.manifest import Encryption, Manifest
from nearcast.store.sealing import (
    SEAL_SIZE_BYTES,
    SEALED_FILE_SIZE_BYTES_MAX,
    TenantKeys,
    derive_data_key,
    key_id,
    make_key,
    open_file,
    open_payload,
    read_key,
    seal_file,
    seal_payload,
)
from tests.tiny_models import write_version

KEY, OTHER = b"k" * 32, b"o" * 32
KEYS = TenantKeys({key_id(KEY): KEY})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_version(tmp_path / "version", b"model", extra={"notes.txt": b"notes"})


def sealed(manifest: Manifest, tenant: str = "acme") -> tuple[Manifest, bytes]:
    data_key = derive_data_key(KEY, tenant, manifest, [("model.onnx", "0" * 64)])
    return replace(manifest, encryption=KEYS.wrap(data_key, tenant, key_id(KEY))), data_key


def test_a_file_comes_back_and_only_as_itself(manifest: Manifest) -> None:
    manifest, data_key = sealed(manifest)
    data = seal_file(manifest, 0, "model.onnx", b"weights", data_key)
    assert len(data) == len(b"weights") + SEAL_SIZE_BYTES
    assert b"weights" not in data
    assert seal_file(manifest, 0, "model.onnx", b"weights", data_key) == data
    assert open_file(manifest, "model.onnx", data, KEYS) == b"weights"
    assert manifest.encryption is not None
    others = [
        (manifest, "notes.txt", data),
        (manifest, "model.onnx", data[:-1] + bytes([data[-1] ^ 1])),
        (manifest, "model.onnx", data[:4]),
        (replace(manifest, release=2), "model.onnx", data),
        (replace(manifest, name="other"), "model.onnx", data),
        (replace(manifest, encryption=replace(manifest.encryption, tenant="evil")), "model.onnx", data),
        (replace(manifest, encryption=replace(manifest.encryption, wrapped_key="AAAA")), "model.onnx", data),
        (replace(manifest, encryption=replace(manifest.encryption, wrapped_key="no base64!")), "model.onnx", data),
    ]
    for described, path, bytes_ in others:
        with pytest.raises(MeshError, match="not genuine") as caught:
            open_file(described, path, bytes_, KEYS)
        assert caught.value.code is Code.UNTRUSTED


def test_a_key_that_is_not_here_is_named(manifest: Manifest) -> None:
    manifest, data_key = sealed(manifest)
    data = seal_file(manifest, 0, "model.onnx", b"weights", data_key)
    for keys in (TenantKeys(), TenantKeys({key_id(OTHER): OTHER})):
        with pytest.raises(MeshError, match=f"{key_id(KEY)} is not on this node; put its file") as caught:
            open_file(manifest, "model.onnx", data, keys)
        assert caught.value.code is Code.UNAUTHENTICATED


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_other_contents_never_meet_the_same_key(one: bytes, two: bytes) -> None:
    manifest = Manifest(
        name="m", release=1, semver="1", engine="litert", model_file="a", files=(), inputs=(), outputs=(), licence="MIT"
    )
    keys = [derive_data_key(KEY, "t", manifest, [("a", data.hex())]) for data in (one, two)]
    assert (keys[0] == keys[1]) is (one == two)


def test_the_data_key_depends_on_everything_that_is_bound(manifest: Manifest) -> None:
    def derive(key: bytes = KEY, tenant: str = "t", described: Manifest = manifest, files: str = "ab") -> bytes:
        return derive_data_key(key, tenant, described, [(path, "0") for path in files])

    made = [
        derive(), derive(OTHER), derive(tenant="u"), derive(described=replace(manifest, release=2)),
        derive(described=replace(manifest, name="n")), derive(files="ba"), derive(files="a"),
    ]  # fmt: skip
    assert all(one != two for one, two in itertools.combinations(made, 2))
    assert derive() == made[0]


def test_wrapping_is_the_same_every_time_and_bound_to_the_tenant() -> None:
    one = KEYS.wrap(b"d" * 32, "acme", key_id(KEY))
    assert KEYS.wrap(b"d" * 32, "acme", key_id(KEY)) == one
    assert KEYS.unwrap(one) == b"d" * 32
    assert KEYS.wrap(b"d" * 32, "other", key_id(KEY)).wrapped_key != one.wrapped_key
    short: Encryption = KEYS.wrap(b"d" * 16, "acme", key_id(KEY))
    with pytest.raises(MeshError, match="wrong size"):
        KEYS.unwrap(short)


def test_a_payload_opens_for_its_purpose_alone() -> None:
    one, two = (seal_payload("delta a b", b"plain", b"d" * 32) for _ in range(2))
    assert one != two
    assert open_payload("delta a b", one, b"d" * 32) == b"plain"
    for purpose, data in (("delta a c", one), ("delta a b", one[:-1]), ("delta a b", b""), ("delta a b", one[:20])):
        with pytest.raises(MeshError, match="not genuine"):
            open_payload(purpose, data, b"d" * 32)


def test_keys_are_files_of_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "acme.key"
    identifier = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert key_id(read_key(path)) == identifier
    with pytest.raises(MeshError, match="never overwritten"):
        make_key(path)
    with pytest.raises(MeshError, match=r"Name the key acme\.key"):
        make_key(tmp_path / "acme.pem")
    data_key = TenantKeys.load(tmp_path).unwrap(TenantKeys.load(tmp_path).wrap(b"d" * 32, "t", identifier))
    assert data_key == b"d" * 32
    second = make_key(tmp_path / "second.key")
    path.chmod(0o640)
    with pytest.raises(MeshError, match="is not on this node.* readable by you alone"):
        TenantKeys.load(tmp_path).wrap(b"d" * 32, "t", identifier)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(MeshError, match="is not on this node.* must be 32 bytes"):
        TenantKeys.load(tmp_path).wrap(b"d" * 32, "t", identifier)
    assert TenantKeys.load(tmp_path).wrap(b"d" * 32, "t", second).key_id == second, "the other one is not harmed"
    assert TenantKeys.load(None)._keys == {}


def test_a_file_too_large_is_refused_when_it_is_sealed(manifest: Manifest) -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return SEALED_FILE_SIZE_BYTES_MAX + 1

    with pytest.raises(MeshError, match="too large to be sealed") as caught:
        seal_file(manifest, 0, "model.onnx", Large(), KEY)
    assert caught.value.code is Code.TOO_LARGE


def test_contents_are_hashed_as_they_are_used(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "version"
    contents = Contents(manifest, folder)
    assert contents.read("model.onnx") == b"model"
    # Replaced after the check: what was verified is what is used.
    (folder / "model.onnx").write_bytes(b"other")
    assert contents.read("model.onnx") == b"model"
    for replacement, match in ((b"other", "other bytes"), (b"longer than it was", "has not the size")):
        (folder / "model.onnx").write_bytes(replacement)
        with pytest.raises(MeshError, match=match):
            Contents(manifest, folder).read("model.onnx")
    (folder / "model.onnx").unlink()
    (tmp_path / "elsewhere").write_bytes(b"model")
    for make in (
        lambda path: path.symlink_to(tmp_path / "elsewhere"), os.mkfifo, lambda path: path.mkdir(), lambda path: None,
    ):  # fmt: skip
        make(folder / "model.onnx")
        with pytest.raises(MeshError, match="missing or no regular file"):
            Contents(manifest, folder).read("model.onnx")
        path = folder / "model.onnx"
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink() or path.exists():
            path.unlink()
