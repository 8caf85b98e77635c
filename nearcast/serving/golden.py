"""Golden vectors: real inputs with the answers that a version must give, and its warm-up data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.store.contents import Contents
from nearcast.store.manifest import GoldenTensor, Manifest
from nearcast.wire.tensors import dtype_of, from_raw

VECTORS_SIZE_BYTES_MAX = 64 * 1024 * 1024
"""All golden tensors of one version together."""


def read_tensors(contents: Contents, tensors: Sequence[GoldenTensor]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one side of a golden vector.

    Raises:
        MeshError: UNTRUSTED if bytes are missing or do not fit the shape; as `Contents.read`.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.size_bytes > VECTORS_SIZE_BYTES_MAX:
            raise MeshError(
                Code.UNTRUSTED, f"The golden tensor {tensor.name} is larger than {VECTORS_SIZE_BYTES_MAX} bytes."
            )
        data = contents.read(tensor.file)[tensor.offset : tensor.offset + tensor.size_bytes]
        try:
            arrays[tensor.name] = from_raw(tensor.name, tensor.datatype, tensor.shape, data, 0, len(data))
        except MeshError as error:
            raise MeshError(Code.UNTRUSTED, f"The golden tensor {tensor.name} is malformed: {error.message}") from error
    return arrays


def zeros(manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """Inputs of zeros (empty strings for BYTES), free axes 1 long: warm-up data where there is no better."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in manifest.inputs:
        shape = tuple(1 if axis == -1 else axis for axis in tensor.shape)
        dtype = dtype_of(tensor.datatype)
        arrays[tensor.name] = np.full(shape, b"", dtype=object) if dtype.hasobject else np.zeros(shape, dtype)
    return arrays


def difference(expected: Tensors, got: Tensors, atol: float) -> str:
    """What is wrong with an answer, in one sentence; "" if every expected tensor is there and within `atol`.

    NaN equals NaN; whole numbers, booleans and bytes differ by at most `atol` too, so by nothing below 1.
    """
    for name, want in expected.items():
        have = got.get(name)
        if have is None:
            return f"output {name} is missing"
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"output {name} is {have.dtype} {list(have.shape)}, expected {want.dtype} {list(want.shape)}"
        if want.dtype == object:
            if want.tolist() != have.tolist():
                return f"output {name} has other contents than expected"
            continue
        if want.dtype.kind in "biu" and atol < 1:
            if not np.array_equal(want, have):
                return f"output {name} has other values than expected"
            continue
        exact, near = want.astype(np.float64), have.astype(np.float64)
        if not np.allclose(near, exact, rtol=0.0, atol=atol, equal_nan=True):
            with np.errstate(invalid="ignore"):
                largest = np.nan_to_num(np.abs(near - exact), nan=np.inf, posinf=np.inf).max()
            return f"output {name} differs by up to {largest:.6g}, allowed is {atol:.6g}"
    return ""
