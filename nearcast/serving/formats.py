"""Is this file what its engine expects, and does it stay inside of its folder? Decided without loading it.

ONNX is walked as protobuf (`onnx.proto3`: field numbers below) for external data, which names files; TFLite is known by
its FlatBuffers identifier. Nothing here runs or maps anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import PATH_PATTERN, Manifest

_DEPTH_MAX = 64
_TFLITE_IDENTIFIER = b"TFL3"
Fields: TypeAlias = Iterator[tuple[int, int, memoryview]]

# Where tensors hide: message -> {field: message}. The names are those of onnx.proto3.
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_IR_VERSION, _GRAPH, _OPSET_IMPORT = 1, 7, 8


def require_format(manifest: Manifest, folder: Path) -> None:
    """Refuse a version whose files are not of the declared format, or name files outside of the version.

    Raises:
        MeshError: UNTRUSTED with the reason.
    """
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_symlink() or not path.is_file():
            raise MeshError(Code.UNTRUSTED, f"The file {entry.path} is missing or no regular file.")
        if path.stat().st_size != entry.size_bytes:
            raise MeshError(Code.UNTRUSTED, f"The file {entry.path} has not the size that the manifest says.")
    data = memoryview((folder / manifest.model_file).read_bytes())
    if manifest.engine == "litert":
        if bytes(data[4:8]) != _TFLITE_IDENTIFIER:
            raise MeshError(Code.UNTRUSTED, f"The file {manifest.model_file} is no TFLite model.")
        return
    _require_onnx(manifest, data)


def external_locations(data: memoryview) -> set[str]:
    """Every file that an ONNX model takes tensors from.

    Raises:
        MeshError: UNTRUSTED if the bytes are no protobuf message, or nested too deeply.
    """
    found: set[str] = set()
    stack = [("Model", data, 0)]
    while stack:
        kind, message, depth = stack.pop()
        if depth > _DEPTH_MAX:
            raise MeshError(Code.UNTRUSTED, f"The model is nested more than {_DEPTH_MAX} messages deep.")
        nested = _NESTED[kind]
        for number, wire_type, value in _fields(message):
            inner = nested.get(number)
            if inner is None or wire_type != _LENGTH:
                continue
            if inner == "Entry":
                found |= _location(value)
            else:
                stack.append((inner, value, depth + 1))
    return found


def _require_onnx(manifest: Manifest, data: memoryview) -> None:
    try:
        numbers = {number for number, _, _ in _fields(data)}
        locations = external_locations(data)
    except MeshError as error:
        raise MeshError(Code.UNTRUSTED, f"The file {manifest.model_file} is no ONNX model: {error.message}") from error
    if not {_IR_VERSION, _GRAPH, _OPSET_IMPORT} <= numbers:
        raise MeshError(Code.UNTRUSTED, f"The file {manifest.model_file} is no ONNX model: it has no graph or version.")
    listed = {entry.path for entry in manifest.files}
    for location in sorted(locations):
        if re.fullmatch(PATH_PATTERN, location) is None or location not in listed:
            raise MeshError(
                Code.UNTRUSTED,
                f"The model takes data from {location[:128]!r}, which is no file of its manifest.",
            )


def _location(entry: memoryview) -> set[str]:
    key, value = b"", b""
    for number, wire_type, content in _fields(entry):
        if wire_type == _LENGTH and number == 1:
            key = bytes(content)
        elif wire_type == _LENGTH and number == 2:
            value = bytes(content)
    return {value.decode("utf-8", "replace")} if key == b"location" else set()


_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def _fields(message: memoryview) -> Fields:
    """Field number, wire type and content of each field; the content of a varint is empty."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        start = position
        if wire_type == _VARINT:
            _, position = _varint(message, position)
            start = position
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _LENGTH:
            size, start = _varint(message, position)
            position = start + size
        else:
            raise MeshError(Code.UNTRUSTED, f"wire type {wire_type} is not in use.")
        if position > end or number == 0:
            raise MeshError(Code.UNTRUSTED, "the bytes end in the middle of a field.")
        yield number, wire_type, message[start:position]


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise MeshError(Code.UNTRUSTED, "the bytes end in the middle of a field.")
