"""Small real models for the serving tests: built with `onnx`, wrapped in folders and manifests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from nearcast.store import Manifest, Pointer, Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File, GoldenTensor, GoldenVector, Tensor
from nearcast.wire.tensors import datatype_of, to_raw


def affine_model(scale: float = 2.0, *, width: int = 4, repeat: int = 0) -> bytes:
    """y = scale * x over [n, width]; `repeat` adds square matrix products (identities), to make it slow."""
    nodes, constants, last = [], [helper.make_tensor("s", TensorProto.FLOAT, [1], [scale])], "m"
    nodes.append(helper.make_node("Mul", ["x", "s"], ["m"]))
    if repeat:
        identity = np.eye(width, dtype=np.float32)
        constants.append(onnx.numpy_helper.from_array(identity, "i"))
        for index in range(repeat):
            # Erf-free and not foldable: the runtime cannot take the products away.
            nodes.append(helper.make_node("MatMul", [last, "i"], [f"p{index}"]))
            last = f"p{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    return _serialise(
        nodes, constants, [("x", TensorProto.FLOAT, ["n", width])], [("y", TensorProto.FLOAT, ["n", width])]
    )


def recurrent_model() -> bytes:
    """Explicit state like Silero's: x [n, 3], state [2, n, 3] -> y [n, 3] = x + state[0], new state = state + 1."""
    nodes = [
        helper.make_node("Gather", ["state", "zero"], ["first"], axis=0),
        helper.make_node("Add", ["x", "first"], ["y"]),
        helper.make_node("Add", ["state", "one"], ["state_out"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["n", 3]), ("state", TensorProto.FLOAT, [2, "n", 3])]
    outputs = [("y", TensorProto.FLOAT, ["n", 3]), ("state_out", TensorProto.FLOAT, [2, "n", 3])]
    return _serialise(nodes, constants, inputs, outputs)


def scaled_model() -> bytes:
    """y = rate * x: x [n, 3] has a batch axis, the scalar `rate` has none."""
    nodes = [
        helper.make_node("Cast", ["rate"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["n", 3]), ("rate", TensorProto.INT64, [])]
    return _serialise(nodes, [], inputs, [("y", TensorProto.FLOAT, ["n", 3])])


def text_model() -> bytes:
    """Strings in, the same strings out."""
    spec = ("x", TensorProto.STRING, ["n"])
    return _serialise([helper.make_node("Identity", ["x"], ["y"])], [], [spec], [("y", *spec[1:])])


def lookup_model(length: int = 4) -> bytes:
    """y = table[x]: an index outside of 0..length-1 makes the engine fail."""
    table = helper.make_tensor("t", TensorProto.FLOAT, [length], [float(i) for i in range(length)])
    node = helper.make_node("Gather", ["t", "x"], ["y"])
    return _serialise([node], [table], [("x", TensorProto.INT64, ["n"])], [("y", TensorProto.FLOAT, ["n"])])


def tensor(name: str, datatype: str, shape: tuple[int, ...], batch_axis: int | None = 0) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape, batch_axis=batch_axis)


AFFINE_TENSORS: dict[str, Any] = {
    "inputs": (tensor("x", "FP32", (-1, 4)),),
    "outputs": (tensor("y", "FP32", (-1, 4)),),
}


def write_version(
    folder: Path,
    model: bytes,
    *,
    name: str = "affine",
    release: int = 1,
    golden: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (),
    atol: float = 1e-5,
    extra: dict[str, bytes] | None = None,
    **fields: Any,
) -> Manifest:
    """A version folder with a fitting manifest."""
    fields = AFFINE_TENSORS | {"engine": "onnxruntime", "semver": f"1.0.{release}", "licence": "Apache-2.0"} | fields
    fields.setdefault("model_file", "model.onnx")
    files = {fields["model_file"]: model, **(extra or {})}
    blob, vectors = b"", []
    for inputs, outputs in golden:
        sides = []
        for arrays in (inputs, outputs):
            side = []
            for key, array in arrays.items():
                raw = to_raw(array)
                side.append(
                    GoldenTensor(
                        name=key, datatype=datatype_of(array.dtype), shape=array.shape, file="golden.bin",
                        offset=len(blob), size_bytes=len(raw),
                    )
                )  # fmt: skip
                blob += raw
            sides.append(tuple(side))
        vectors.append(GoldenVector(inputs=sides[0], outputs=sides[1], atol=atol))
    if vectors:
        files["golden.bin"] = blob
    manifest = Manifest(
        name=name, release=release, golden=tuple(vectors), files=tuple(_file(*item) for item in files.items()), **fields
    )
    folder.mkdir(parents=True, exist_ok=True)
    for key, data in files.items():
        (folder / key).write_bytes(data)
    (folder / "manifest.json").write_bytes(manifest.encode())
    return manifest


def install(store: Store, model: bytes, *, name: str = "affine", release: int = 1, **fields: Any) -> Manifest:
    """Commit a version to a store."""
    staged = store.stage_folder(name, release)
    manifest = write_version(staged, model, name=name, release=release, **fields)
    store.commit(name, release, staged)
    return manifest


def activate(store: Store, name: str = "affine", **pointer: Any) -> None:
    store.write_pointer(name, Pointer(**pointer))


def _file(path: str, data: bytes) -> File:
    chunks = [data[at : at + CHUNK_SIZE_BYTES] for at in range(0, len(data), CHUNK_SIZE_BYTES)]
    digests = tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)
    return File(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), chunks=digests)


def _serialise(nodes: list[Any], constants: list[Any], inputs: list[Any], outputs: list[Any]) -> bytes:
    values = [[helper.make_tensor_value_info(*spec) for spec in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "tiny", *values, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
