"""Files as payloads: images for models that decode them, sounds for models that take samples."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, TensorSpec
from nearcast.transport.mqtt.payload_raw import whole
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.wire.request import TensorRequest
from nearcast.wire.tensors import Array, dtype_of

SAMPLE_RATE = "sample_rate_hz"
"""The property of a model that says which sample rate it takes."""
CHUNKS_MAX = 64
"""Of a WAV file; there are two that matter."""
_FORMAT = struct.Struct("<HHIIHH")
_EXTENSIBLE, _SUBFORMAT = 0xFFFE, 24
_SAMPLE_TYPES: dict[tuple[int, int], np.dtype[Any]] = {
    (1, 8): np.dtype("u1"),
    (1, 16): np.dtype("<i2"),
    (1, 32): np.dtype("<i4"),
    (3, 32): np.dtype("<f4"),
    (3, 64): np.dtype("<f8"),
}
"""By format tag (1 = integers, 3 = floats) and bits."""
_FULL_SCALE = {1: 128.0, 2: 32768.0, 4: 2147483648.0}


def decode_image(payload: bytes, asked: Asked) -> InferRequest:
    """An image file for a model whose pipeline decodes it: the only element of its BYTES input.

    Raises:
        MeshError: UNSUPPORTED if the model takes no files.
    """
    spec = _find(asked, ("BYTES",), "image files; send its tensors")
    return _request(asked, spec, whole(spec, payload))


def decode_wav(payload: bytes, asked: Asked) -> InferRequest:
    """The samples of a sound file: from -1 to 1 as floats, as they are as INT16; to a BYTES input the whole file.

    Raises:
        MeshError: UNSUPPORTED if the model takes no samples, or not of this rate; INVALID_REQUEST for a broken file.
    """
    spec = _find(asked, ("FP32", "INT16", "FP16", "FP64", "BYTES"), "samples; send its tensors")
    if spec.datatype == "BYTES":
        return _request(asked, spec, whole(spec, payload))
    rate_hz, samples = read_wav(payload)
    wanted = asked.metadata.properties.get(SAMPLE_RATE, "")
    if wanted and wanted != str(rate_hz):
        raise MeshError(Code.UNSUPPORTED, f"Model '{asked.model}' takes {wanted} Hz; this sound has {rate_hz} Hz.")
    shape = _audio_shape(spec, samples.size)
    if spec.datatype == "INT16":
        samples = np.nan_to_num(np.minimum(np.rint(np.clip(samples, -1, 1) * np.float32(32768)), np.float32(32767)))
    with np.errstate(over="ignore"):
        return _request(asked, spec, samples.astype(dtype_of(spec.datatype)).reshape(shape))


def read_wav(payload: bytes) -> tuple[int, npt.NDArray[np.float32]]:
    """Sample rate in Hz and the samples of one channel, FP32 from -1 to 1.

    Raises:
        MeshError: INVALID_REQUEST if it is no WAV file of one channel with samples of a known type.
    """
    fmt, data = _find_chunks(payload)
    if len(fmt) < _FORMAT.size:
        raise MeshError(Code.INVALID_REQUEST, "The payload is no WAV file: it has no format chunk.")
    tag, channels, rate_hz, _, _, bits = _FORMAT.unpack_from(fmt)
    if tag == _EXTENSIBLE and len(fmt) >= _SUBFORMAT + 2:
        tag = int.from_bytes(fmt[_SUBFORMAT : _SUBFORMAT + 2], "little")
    dtype = _SAMPLE_TYPES.get((tag, bits))
    if channels != 1 or dtype is None:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"The sound has {channels} channels of {bits} bits in format {tag}; "
            "send one channel, uncompressed, of 8, 16 or 32 bits.",
        )
    whole_bytes = len(data) - len(data) % dtype.itemsize
    with np.errstate(over="ignore", invalid="ignore"):  # floats may be anything, as the tensors of a model may
        samples = np.frombuffer(data[:whole_bytes], dtype).astype(np.float32)
    if dtype.kind == "u":
        samples -= _FULL_SCALE[dtype.itemsize]
    if dtype.kind != "f":
        samples /= _FULL_SCALE[dtype.itemsize]
    return rate_hz, samples


def _find_chunks(payload: bytes) -> tuple[bytes, bytes]:
    """The format and the samples. A size that a writer could not know, and left too large, ends with the payload."""
    found = {b"fmt ": b"", b"data": b""}
    if payload[:4] != b"RIFF" or payload[8:12] != b"WAVE":
        raise MeshError(Code.INVALID_REQUEST, "The payload is no WAV file.")
    position = 12
    for _ in range(CHUNKS_MAX):
        name, size = payload[position : position + 4], int.from_bytes(payload[position + 4 : position + 8], "little")
        position += 8
        if name in found:
            found[name] = payload[position : position + size]
        if name == b"data" or position >= len(payload):
            return found[b"fmt "], found[b"data"]
        position += size + size % 2
    raise MeshError(Code.INVALID_REQUEST, f"The WAV file has more than {CHUNKS_MAX} chunks before its samples.")


def _find(asked: Asked, datatypes: Sequence[str], what: str) -> TensorSpec:
    """The input that the property `name` names, else the first of the wanted types, the best type first."""
    name = asked.user.get("name", "")
    for datatype in datatypes:
        for spec in asked.metadata.inputs:
            if spec.datatype == datatype and name in ("", spec.name):
                return spec
    inputs = ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in asked.metadata.inputs)
    raise MeshError(Code.UNSUPPORTED, f"Model '{asked.model}' takes no {what}: {inputs}.")


def _audio_shape(spec: TensorSpec, samples: int) -> tuple[int, ...]:
    """The last free axis is time; other free axes are batches of one."""
    free = [axis for axis, size in enumerate(spec.shape) if size < 0]
    shape = tuple(1 if size < 0 else size for size in spec.shape)
    if free:
        shape = (*shape[: free[-1]], samples, *shape[free[-1] + 1 :])
    if np.prod(shape, dtype=np.int64) != samples:
        raise MeshError(
            Code.INVALID_REQUEST, f"{samples} samples do not fill {spec.datatype} {list(spec.shape)} of '{spec.name}'."
        )
    return shape


def _request(asked: Asked, spec: TensorSpec, array: Array) -> InferRequest:
    return TensorRequest(
        model=asked.model, version=asked.version, inputs={spec.name: array}, parameters=dict(asked.parameters)
    )
