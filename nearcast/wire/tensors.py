"""Tensors of the Open Inference Protocol and numpy: datatypes, raw little-endian bytes, the framing of BYTES.

An array that `from_raw` returns is C-contiguous and aligned to its items; treat it as read-only. A large one views the
message where its bytes happen to be aligned, and is a copy otherwise: native kernels may use instructions that fault on
unaligned data, and a client chooses the offset by the length of its model's name.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.wire.framing import LIMITS, encode_text

Array = npt.NDArray[np.generic]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_DATATYPES = {dtype: name for name, dtype in _DTYPES.items()}
DATATYPES = (*_DTYPES, "BF16")
"""Every datatype that this build reads; BF16 needs `ml_dtypes` to be installed, because numpy has no such type."""
_ELEMENT_TYPES: dict[str, set[type]] = {
    "b": {bool, int},
    "i": {int},
    "u": {int},
    "f": {int, float},
    "V": {int, float},
}
"""Python types that may fill an array, by numpy's kind; V is BF16's."""
_U32 = struct.Struct("<I")


@cache
def _bfloat16() -> np.dtype[Any] | None:
    try:
        import ml_dtypes
    except ImportError:
        return None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy type of a datatype; `object` for BYTES.

    Raises:
        MeshError: INVALID_REQUEST for an unknown name, UNSUPPORTED for BF16 without `ml_dtypes`.
    """
    dtype = _DTYPES.get(datatype)
    if dtype is not None:
        return dtype
    if datatype != "BF16":
        known = ", ".join(DATATYPES)
        raise MeshError(Code.INVALID_REQUEST, f"Datatype '{datatype[:32]}' is unknown; use one of {known}.")
    bfloat16 = _bfloat16()
    if bfloat16 is None:
        raise MeshError(Code.UNSUPPORTED, "BF16 tensors need the package ml-dtypes on this node.")
    return bfloat16


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a numpy type; text and `object` arrays are BYTES.

    Raises:
        MeshError: INVALID_REQUEST for a type that the protocol lacks, such as complex numbers.
    """
    name = _DATATYPES.get(dtype)
    if name is not None:
        return name
    if dtype.kind in "SU":
        return "BYTES"
    if dtype.kind in "biuf" and (name := _DATATYPES.get(dtype.newbyteorder("<"))) is not None:
        return name
    if dtype == _bfloat16():
        return "BF16"
    raise MeshError(
        Code.INVALID_REQUEST, f"Arrays of {dtype} cannot travel; convert them to one of {', '.join(DATATYPES)}."
    )


def size_bytes(datatype: str, shape: Sequence[int]) -> int | None:
    """Raw size of a tensor; None for BYTES, whose elements have their own lengths."""
    return None if datatype == "BYTES" else dtype_of(datatype).itemsize * prod(shape)


def from_raw(name: str, datatype: str, shape: tuple[int, ...], body: bytes, start: int, stop: int) -> Array:
    """The array in `body[start:stop]`.

    Raises:
        MeshError: INVALID_REQUEST naming the tensor, the bytes expected and the bytes found.
    """
    if datatype == "BYTES":
        return _shaped(name, split_bytes(name, body[start:stop]), shape)
    dtype = dtype_of(datatype)
    expected = dtype.itemsize * prod(shape)
    if expected != stop - start:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Tensor '{name}' of {datatype} {list(shape)} needs {expected} bytes, got {stop - start}.",
        )
    try:
        if datatype == "BOOL":
            # Any byte but 0 is true; numpy itself assumes that only 0 and 1 occur.
            true: Array = np.ndarray(shape, np.uint8, body, start) != 0
            return true
        return view_raw(shape, dtype, body, start, stop)
    except (ValueError, TypeError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The shape of tensor '{name}' is too large.") from error


def view_raw(shape: tuple[int, ...], dtype: np.dtype[Any], body: bytes, start: int, stop: int) -> Array:
    """The array that `body[start:stop]` is, whose size is known to be right; a copy if it is small or not aligned."""
    if stop - start < LIMITS.zero_copy_size_bytes_min:
        return np.ndarray(shape, dtype, body[start:stop])
    array: Array = np.ndarray(shape, dtype, body, start)
    return array if array.flags.aligned else np.ndarray(shape, dtype, body[start:stop])


def to_raw(array: Array) -> bytes:
    """Little-endian row-major bytes of an array: one copy, because transports take `bytes` only.

    Raises:
        MeshError: INVALID_REQUEST if the array's type or an element cannot travel.
    """
    datatype = datatype_of(array.dtype)
    if datatype == "BYTES":
        return join_bytes(elements_of(array))
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def elements_of(array: Array) -> list[bytes]:
    """Elements of a BYTES tensor in row-major order; text becomes UTF-8.

    Raises:
        MeshError: INVALID_REQUEST if an element is neither bytes nor text.
    """
    out = []
    for element in array.reshape(-1).tolist():
        if isinstance(element, bytes):
            out.append(element)
        elif isinstance(element, str):
            out.append(encode_text(element))
        else:
            raise MeshError(Code.INVALID_REQUEST, "A BYTES tensor may hold bytes and text only.")
    return out


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """Frame BYTES elements: each is its length as u32, then its bytes."""
    pieces: list[bytes] = []
    for element in elements:
        pieces += (_U32.pack(len(element)), element)
    return b"".join(pieces)


def split_bytes(name: str, raw: bytes) -> list[bytes]:
    """Undo `join_bytes`.

    Raises:
        MeshError: INVALID_REQUEST if the framing does not end with the bytes, or there are more than
            `bytes_elements_max` elements.
    """
    out: list[bytes] = []
    position = 0
    end = len(raw)
    while position < end:
        if position + 4 > end or (stop := position + 4 + _U32.unpack_from(raw, position)[0]) > end:
            raise MeshError(
                Code.INVALID_REQUEST, f"The elements of BYTES tensor '{name}' are truncated at byte {position}."
            )
        if len(out) == LIMITS.bytes_elements_max:
            raise MeshError(
                Code.INVALID_REQUEST, f"BYTES tensor '{name}' has more than {LIMITS.bytes_elements_max} elements."
            )
        out.append(raw[position + 4 : stop])
        position = stop
    return out


def from_elements(name: str, datatype: str, shape: tuple[int, ...], elements: Sequence[Any]) -> Array:
    """The array of typed contents or JSON numbers, checked against its shape.

    Raises:
        MeshError: INVALID_REQUEST if the count does not fit the shape or an element does not fit the datatype.
    """
    if datatype == "BYTES":
        return _shaped(name, elements, shape)
    dtype = dtype_of(datatype)
    _require_count(name, datatype, shape, len(elements))
    try:
        if not set(map(type, elements)) <= _ELEMENT_TYPES[dtype.kind]:
            raise TypeError("numpy would parse text and cut fractions silently")
        if dtype.kind in "iu":
            return np.array(elements, dtype=dtype).reshape(shape)
        if dtype.kind == "b":
            return _booleans(elements).reshape(shape)
        # The nearest value is what a float is about: too large becomes infinite, as it does in C.
        with np.errstate(over="ignore"):
            floats: Array = np.array(elements, dtype=np.float64).astype(dtype).reshape(shape)
        return floats
    except (ValueError, TypeError, OverflowError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"Tensor '{name}' holds a value that {datatype} cannot hold.") from error


def _booleans(elements: Sequence[Any]) -> Array:
    if not set(elements) <= {0, 1}:
        raise ValueError("a boolean is true, false, 0 or 1")
    return np.array(elements, dtype=np.bool_)


def _shaped(name: str, elements: Sequence[Any], shape: tuple[int, ...]) -> Array:
    _require_count(name, "BYTES", shape, len(elements))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The shape of tensor '{name}' is too large.") from error


def _require_count(name: str, datatype: str, shape: tuple[int, ...], got: int) -> None:
    expected = prod(shape)
    if expected != got:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Tensor '{name}' of {datatype} {list(shape)} needs {expected} elements, got {got}.",
        )
