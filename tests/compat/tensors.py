"""A tensor as the protocol's raw bytes, and the same as typed or JSON values. Shares nothing with the server's code."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
DATATYPES = (*NUMPY, "BF16", "BYTES")
TYPED_FIELDS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """`raw` is little-endian and row-major; an element of BYTES is its length as u32, then its bytes."""

    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    def values(self) -> list[Any]:
        """Elements, row by row, as Python values."""
        if self.datatype == "BYTES":
            return unpack_bytes(self.raw)
        if self.datatype == "BF16":
            return (np.frombuffer(self.raw, "<u2").astype("<u4") << 16).view("<f4").tolist()
        return np.frombuffer(self.raw, NUMPY[self.datatype]).tolist()

    def json_values(self) -> list[Any]:
        """Elements as JSON can hold them; BYTES must be UTF-8."""
        return [value.decode() for value in self.values()] if self.datatype == "BYTES" else self.values()

    def __repr__(self) -> str:
        return f"{self.datatype}{list(self.shape)} {self.raw[:24].hex(' ')}{'…' if len(self.raw) > 24 else ''}"


def make(datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """A tensor from Python values, row by row."""
    if datatype == "BYTES":
        raw = b"".join(struct.pack("<I", len(data)) + data for data in map(_to_bytes, values))
    elif datatype == "BF16":
        raw = (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        raw = np.asarray(values, NUMPY[datatype]).tobytes()
    assert datatype == "BYTES" or math.prod(shape) * WIDTHS[datatype] == len(raw), "the sample does not fit its shape"
    return Tensor(datatype, tuple(shape), raw)


def unpack_bytes(raw: bytes) -> list[bytes]:
    """The elements of a BYTES tensor; ValueError if the framing is wrong."""
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise ValueError("a BYTES tensor ends within a length")
        (size,) = struct.unpack_from("<I", raw, at)
        if at + 4 + size > len(raw):
            raise ValueError("an element of a BYTES tensor is longer than what is left")
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def _to_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


WIDTHS = {name: np.dtype(code).itemsize for name, code in NUMPY.items()} | {"BF16": 2}
_INTEGERS = {
    name: [int(np.iinfo(code).min), int(np.iinfo(code).max), 0, 1, 7, int(np.iinfo(code).max) - 1]
    for name, code in NUMPY.items()
    if "INT" in name
}
FINITE: dict[str, list[Any]] = _INTEGERS | {
    "BOOL": [True, False, False, True, True, False],
    "FP16": [0.0, -1.5, 65504.0, 6.1e-05, 0.333251953125, -2.0],
    "BF16": [0.0, -1.5, 2.0**100, 2.0**-100, 0.333984375, -2.0],
    "FP32": [0.0, -1.5, 3.4028234663852886e38, 1.401298464324817e-45, 0.3333333432674408, -2.0],
    "FP64": [0.0, -1.5, 1.7976931348623157e308, 5e-324, 1 / 3, -2.0],
    "BYTES": ["", "a", "naïve ✓ 𝄞", 'quote " and \\ and \n', "x" * 300, "0"],
}
"""Six values of each datatype with its extremes; all of them can be JSON."""


def sample(datatype: str) -> Tensor:
    """A [2, 3] tensor with the datatype's extremes."""
    return make(datatype, (2, 3), FINITE[datatype])
