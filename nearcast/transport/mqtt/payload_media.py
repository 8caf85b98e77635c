"""Files as payloads: images for models that decode them, sounds for models that take samples."""

from __future__ import annotations

import io
import struct
import wave
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
_FULL_SCALE = {1: 128.0, 2: 32768.0, 4: 2147483648.0}
_SAMPLE_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}


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
        samples = np.clip(np.rint(samples * 32768.0), -32768, 32767)
    return _request(asked, spec, samples.astype(dtype_of(spec.datatype)).reshape(shape))


def read_wav(payload: bytes) -> tuple[int, npt.NDArray[np.float32]]:
    """Sample rate in Hz and the samples of one channel, FP32 in [-1, 1).

    Raises:
        MeshError: INVALID_REQUEST if it is no WAV file of PCM with one channel and 8, 16 or 32 bits.
    """
    try:
        with wave.open(io.BytesIO(payload)) as file:
            rate_hz, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = file.readframes(len(payload))
    except (wave.Error, EOFError, struct.error, ValueError, RuntimeError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The payload is no PCM file in WAV format: {error}.") from error
    if channels != 1 or width not in _SAMPLE_TYPES:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"The sound has {channels} channels of {8 * width} bits; send one channel of 8, 16 or 32 bits.",
        )
    samples = np.frombuffer(raw[: len(raw) - len(raw) % width], _SAMPLE_TYPES[width]).astype(np.float64)
    scale = _FULL_SCALE[width]
    return rate_hz, ((samples - scale if width == 1 else samples) / scale).astype(np.float32)


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
