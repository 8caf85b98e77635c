"""Golden vectors on their way into a bundle: read from an author's files, completed by the engine, packed in one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import GoldenTensor, GoldenVector, Manifest, Tensor
from nearcast.wire.tensors import datatype_of, dtype_of, to_raw

GOLDEN_FILE = "golden.bin"
VECTORS_MAX = 1024
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ALIGNMENT_BYTES = 64
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Vector:
    """One vector as its author gave it; `outputs` may lack some or all."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]


def read_vectors(
    source: Path, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Vector]:
    """Read the golden files of a specification, in order.

    Raises:
        MeshError: INVALID_REQUEST naming the file and the tensor that does not fit.
    """
    vectors: list[Vector] = []
    for name in names:
        try:
            if name.endswith(".npz"):
                vectors.append(_read_npz(source / name))
            elif name.endswith(".json"):
                vectors.extend(_read_json(source / name, [*inputs, *outputs]))
            elif name.lower().endswith(IMAGE_SUFFIXES):
                vectors.append(_read_image(source / name, inputs))
            else:
                raise MeshError(Code.INVALID_REQUEST, f"The golden file {name} is no .npz, .json or image.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"The golden file {name} cannot be used: {error}.") from error
    for vector in vectors:
        for tensors, declared, is_input in ((vector.inputs, inputs, True), (vector.outputs, outputs, False)):
            _check(tensors, {tensor.name: tensor for tensor in declared}, is_input=is_input)
    if len(vectors) > VECTORS_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"A bundle holds at most {VECTORS_MAX} golden vectors.")
    return vectors


def _read_npz(path: Path) -> Vector:
    with np.load(path, allow_pickle=False) as arrays:
        inputs = {name[3:]: arrays[name] for name in arrays.files if name.startswith("in_")}
        outputs = {name[4:]: arrays[name] for name in arrays.files if name.startswith("out_")}
    return Vector(inputs, outputs)


def _read_image(path: Path, inputs: Sequence[Tensor]) -> Vector:
    if [tensor.datatype for tensor in inputs] != ["BYTES"]:
        raise ValueError("an image is a vector only of a model with one input, of BYTES")
    return Vector({inputs[0].name: np.array([path.read_bytes()], dtype=object)}, {})


def _read_json(path: Path, tensors: Sequence[Tensor]) -> Iterator[Vector]:
    datatypes = {tensor.name: tensor.datatype for tensor in tensors}

    def array(name: str, value: Any) -> Array:
        dtype = dtype_of(datatypes[name])
        if not dtype.hasobject:
            return np.asarray(value, dtype)
        texts = np.asarray(value)
        encoded = [str(text).encode() for text in texts.ravel().tolist()]
        filled = np.empty(len(encoded), object)
        filled[:] = encoded
        return filled.reshape(texts.shape)

    for entry in json.loads(path.read_text()):
        yield Vector(
            {name: array(name, value) for name, value in entry["inputs"].items()},
            {name: array(name, value) for name, value in entry.get("outputs", {}).items()},
        )


def _check(tensors: dict[str, Array], declared: dict[str, Tensor], *, is_input: bool) -> None:
    if unknown := sorted(set(tensors) - set(declared)):
        raise MeshError(Code.INVALID_REQUEST, f"A golden vector has the tensor {unknown[0]}, which is not declared.")
    if is_input and (missing := sorted(set(declared) - set(tensors))):
        raise MeshError(Code.INVALID_REQUEST, f"A golden vector lacks the input {missing[0]}.")
    for name, array in tensors.items():
        wanted = declared[name]
        fits = len(array.shape) == len(wanted.shape) and all(
            axis in (-1, length) for axis, length in zip(wanted.shape, array.shape, strict=True)
        )
        if datatype_of(array.dtype) != wanted.datatype or not fits:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The golden tensor {name} is {datatype_of(array.dtype)} {list(array.shape)}, "
                f"declared is {wanted.datatype} {list(wanted.shape)}.",
            )


def pack_vectors(vectors: Sequence[Vector], manifest: Manifest, folder: Path, atol: float) -> tuple[GoldenVector, ...]:
    """Write all vectors into `golden.bin` of `folder`, computing outputs that are missing; answers their entries.

    Raises:
        MeshError: UNTRUSTED if the model cannot be loaded as the manifest says, INTERNAL if it fails on a vector.
    """
    wanted = [tensor.name for tensor in manifest.outputs]
    if any(name not in vector.outputs for vector in vectors for name in wanted):
        vectors = _complete(vectors, manifest, folder)
    packed: list[GoldenVector] = []
    with (folder / GOLDEN_FILE).open("wb") as file:

        def write(tensors: dict[str, Array], order: Sequence[Tensor]) -> tuple[GoldenTensor, ...]:
            written = []
            for tensor in order:
                array = tensors[tensor.name]
                data = to_raw(array)
                file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
                offset = file.tell()
                file.write(data)
                written.append(
                    GoldenTensor(
                        name=tensor.name,
                        datatype=tensor.datatype,
                        shape=tuple(array.shape),
                        file=GOLDEN_FILE,
                        offset=offset,
                        size_bytes=len(data),
                    )
                )
            return tuple(written)

        for vector in vectors:
            inputs, outputs = write(vector.inputs, manifest.inputs), write(vector.outputs, manifest.outputs)
            packed.append(GoldenVector(inputs=inputs, outputs=outputs, atol=atol))
    return tuple(packed)


def _complete(vectors: Sequence[Vector], manifest: Manifest, folder: Path) -> list[Vector]:
    from nearcast.serving.engines import load_engine
    from nearcast.store.contents import Contents

    with contextlib.closing(load_engine(Contents(manifest, folder), threads=1)) as model:
        # With hidden state an answer depends on the vectors before it, so they run in order from the start state.
        runner = model.new_sequence() if manifest.stateful == "hidden" else model
        return [Vector(vector.inputs, {**runner.run(vector.inputs), **vector.outputs}) for vector in vectors]
