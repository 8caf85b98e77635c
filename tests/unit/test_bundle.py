"""Bundles: the same bytes every time, and nothing passes that is not what its manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_sync.publisher.bundle import BundleSpec, create_bundle, read_spec, verify_bundle
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES, Manifest, Tensor
from nearcast.wire.tensors import from_raw

SPEC = """
name = "affine"
release = 3
semver = "1.2.0"
engine = "onnxruntime"
model_file = "affine.onnx"
files = ["notes.txt"]
licence = "Apache-2.0"
golden = ["first.npz", "more.json"]
latency_budget_ms = 500
quality = 0.9
properties = { zeta = "1", alpha = "2" }

[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 2]
batch_axis = 0

[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 2]
batch_axis = 0
"""


def write_model(path: Path, offset: float) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["y"])],
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.full(2, offset, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_model(folder / "affine.onnx", 3.0)
    (folder / "notes.txt").write_bytes(bytes(range(256)) * (CHUNK_SIZE_BYTES // 256) + b"tail")
    np.savez(folder / "first.npz", in_x=np.array([[1, 2]], np.float32))
    (folder / "more.json").write_text(
        json.dumps([{"inputs": {"x": [[5, 6], [7, 8]]}, "outputs": {"y": [[8, 9], [10, 11]]}}])
    )
    (folder / "spec.toml").write_text(SPEC)
    return folder


@pytest.fixture
def spec(source: Path) -> BundleSpec:
    return read_spec(source / "spec.toml")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def golden_output(folder: Path, manifest: Manifest, index: int) -> list[list[float]]:
    tensor = manifest.golden[index].outputs[0]
    data = (folder / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]
    return from_raw(tensor.name, tensor.datatype, tensor.shape, data, 0, len(data)).tolist()


def test_missing_outputs_are_computed_by_the_engine(source: Path, spec: BundleSpec, tmp_path: Path) -> None:
    manifest = create_bundle(spec, source, tmp_path / "bundle")
    assert golden_output(tmp_path / "bundle", manifest, 0) == [[4, 5]]
    assert golden_output(tmp_path / "bundle", manifest, 1) == [[8, 9], [10, 11]]
    assert verify_bundle(tmp_path / "bundle") == manifest
    assert {entry.path for entry in manifest.files} == {"affine.onnx", "notes.txt", "golden.bin", "sbom.cdx.json"}
    assert len(manifest.file("notes.txt").chunks) == 2


def test_the_same_files_make_the_same_bytes(source: Path, spec: BundleSpec, tmp_path: Path) -> None:
    create_bundle(spec, source, tmp_path / "one")
    shuffled = msgspec.structs.replace(spec, properties=dict(reversed(spec.properties.items())))
    create_bundle(shuffled, source, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_json_and_npz_give_the_same_vectors(source: Path, spec: BundleSpec, tmp_path: Path) -> None:
    (source / "first.json").write_text(json.dumps([{"inputs": {"x": [[1, 2]]}}]))
    create_bundle(spec, source, tmp_path / "one")
    create_bundle(msgspec.structs.replace(spec, golden=("first.json", "more.json")), source, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("name", ["affine.onnx", "notes.txt", "golden.bin"])
def test_a_flipped_byte_is_found(source: Path, spec: BundleSpec, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    create_bundle(spec, source, bundle)
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(MeshError, match=name) as caught:
        verify_bundle(bundle)
    assert caught.value.code is Code.UNTRUSTED


def test_extra_missing_and_linked_files_are_found(source: Path, spec: BundleSpec, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    create_bundle(spec, source, bundle)
    (bundle / "extra.py").write_text("print()")
    with pytest.raises(MeshError, match=r"extra\.py"):
        verify_bundle(bundle)
    (bundle / "extra.py").unlink()
    (bundle / "notes.txt").rename(tmp_path / "notes.txt")
    with pytest.raises(MeshError, match=r"lacks.*notes\.txt"):
        verify_bundle(bundle)
    (bundle / "notes.txt").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(MeshError, match=r"notes\.txt"):
        verify_bundle(bundle)


def test_nothing_is_overwritten_and_nothing_is_left_after_a_failure(
    source: Path, spec: BundleSpec, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(MeshError) as caught:
        create_bundle(spec, source, tmp_path / "full")
    assert caught.value.code is Code.CONFLICT
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MeshError, match="absent"):
        create_bundle(msgspec.structs.replace(spec, files=("absent",)), source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_file": "notes.txt", "files": ()}, "onnx"),
        ({"files": ("golden.bin",)}, r"golden\.bin"),
        ({"files": ("affine.onnx",)}, "twice"),
        ({"golden": ("first.txt",)}, r"\.npz"),
        ({"golden": ("nowhere.npz",)}, "nowhere"),
        ({"outputs": (Tensor(name="z", datatype="FP32", shape=(-1, 2)),), "golden": ("first.npz",)}, "z"),
        ({"inputs": (Tensor(name="x", datatype="INT8", shape=(-1, 2)),)}, "INT8"),
        ({"inputs": (Tensor(name="x", datatype="FP32", shape=(-1, 3)),)}, "3"),
        ({"inputs": (Tensor(name="w", datatype="FP32", shape=(-1, 2)),)}, "x"),
    ],
)
def test_what_does_not_fit_is_named(
    source: Path, spec: BundleSpec, tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(MeshError, match=text):
        create_bundle(msgspec.structs.replace(spec, **changes), source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_misspelt_key_of_the_specification_is_named(source: Path) -> None:
    (source / "spec.toml").write_text(SPEC.replace("licence", "license"))
    with pytest.raises(MeshError, match="licen"):
        read_spec(source / "spec.toml")


def test_a_pickle_in_an_npz_is_refused(source: Path, spec: BundleSpec, tmp_path: Path) -> None:
    np.savez(source / "first.npz", in_x=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(MeshError, match=r"first\.npz"):
        create_bundle(spec, source, tmp_path / "bundle")
