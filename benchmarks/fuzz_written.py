"""What we write, read by protobuf's own parser: messages of a few forms, again and again with other values.

A form that was written before is written around what stays the same in it; that must not be what another form has.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from benchmarks.fuzz_decoders import Tally
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.v1 import oip_pb2 as pb

FORMS = 40
_TYPES = {"FP32": "<f4", "INT16": ">i2", "INT64": "<i8", "UINT8": "u1", "BOOL": "?", "BYTES": "O"}
_SIZES = (0, 1, 2, 3, 7)
_LARGE = 20_000
"""Elements of a tensor that travels in a piece of its own."""
_IDS = ("", "", "r", "a longer id", "ä")


def compare_written(rng: random.Random, count: int) -> Tally:
    """Whatever we write protobuf takes for what went in."""
    tally = Tally()
    forms = [_draw_form(rng) for _ in range(min(count, FORMS))]
    for _ in range(count):
        tally.messages += 1
        is_request, model, tensors = rng.choice(forms)
        arrays = {name: _draw_array(datatype, shape, rng) for name, datatype, shape in tensors}
        expected: Any = pb.ModelInferRequest() if is_request else pb.ModelInferResponse()
        expected.model_name, expected.model_version, expected.id = model, "1", rng.choice(_IDS)
        parameters = {"n": rng.randrange(9)} if rng.random() < 0.3 else {}
        for key, number in parameters.items():
            expected.parameters[key].int64_param = number
        for name, datatype, shape in tensors:
            (expected.inputs if is_request else expected.outputs).add(name=name, datatype=datatype, shape=shape)
        raws = expected.raw_input_contents if is_request else expected.raw_output_contents
        raws.extend(_raw(array) for array in arrays.values())
        said: dict[str, Any] = {"model": model, "version": "1", "id": expected.id, "parameters": parameters}
        made = TensorRequest(**said, inputs=arrays) if is_request else TensorResponse(**said, outputs=arrays)
        if not _reads_as(b"".join(made.encode_pieces()), expected):
            tally.disagreements += 1
            tally.note("protobuf reads something else in what was written", made.encode())
    return tally


def _reads_as(data: bytes, expected: Any) -> bool:
    try:
        return bool(type(expected).FromString(data) == expected)
    except DecodeError:
        return False


def _draw_form(rng: random.Random) -> tuple[bool, str, list[tuple[str, str, tuple[int, ...]]]]:
    shapes = [tuple(rng.choice(_SIZES) for _ in range(rng.randrange(3))) for _ in range(rng.randrange(4))]
    tensors = [
        (rng.choice("xyz") * (index + 1), rng.choice(sorted(_TYPES)), shape) for index, shape in enumerate(shapes)
    ]
    if rng.random() < 0.1:
        tensors.insert(rng.randrange(len(tensors) + 1), ("large", "FP32", (_LARGE,)))
    return rng.random() < 0.5, rng.choice(("m", "n" * 40)), tensors


def _draw_array(datatype: str, shape: tuple[int, ...], rng: random.Random) -> Any:
    size = int(np.prod(shape))
    if datatype == "BYTES":
        return np.array([rng.randbytes(rng.randrange(5)) for _ in range(size)], dtype=object).reshape(shape)
    dtype = np.dtype(_TYPES[datatype])
    if datatype == "BOOL":
        return np.array([rng.random() < 0.5 for _ in range(size)], dtype=dtype).reshape(shape)
    array = np.frombuffer(rng.randbytes(size * dtype.itemsize), dtype).reshape(shape)
    return array.T.copy().T if rng.random() < 0.3 else array


def _raw(array: Any) -> bytes:
    if array.dtype.kind == "O":
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.reshape(-1).tolist())
    data: bytes = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return data
