"""From the payload of a stream's message to samples, or to the one tensor that it is. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_node.mqtt.ledger.records import StoredInput
from edge_node.mqtt.streams.plan import Plan
from edge_node.mqtt.streams.windows import Samples
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.content_types import OCTETS, WAV, media_type
from nearcast.transport.mqtt.payload import decode_request
from nearcast.transport.mqtt.payload_media import SAMPLE_RATE, read_wav
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.wire.tensors import Array, dtype_of


def read_samples(plan: Plan, stored: StoredInput) -> Samples:
    """The samples of a message in the model's type, 1-D: raw ones, those of a WAV file, or of the one tensor sent.

    Raises:
        MeshError: INVALID_REQUEST or UNSUPPORTED saying what does not fit.
    """
    samples: Samples
    kind = media_type(stored.input.content_type) or OCTETS
    if kind == WAV:
        rate_hz, samples = read_wav(stored.payload)
        _require_rate(plan, rate_hz)
    elif kind == OCTETS:
        samples = _read_raw(plan, stored)
    else:
        samples = read_tensor(plan, stored).reshape(-1)
        _require_numbers(samples.dtype, "BYTES")
    wanted, scale = dtype_of(plan.data.datatype), plan.definition.scale
    if scale == 1.0 or kind == WAV:
        return samples if samples.dtype == wanted else samples.astype(wanted)
    return (samples.astype(np.float64) * scale).astype(wanted)


def read_tensor(plan: Plan, stored: StoredInput) -> Array:
    """The tensor of a message that is one input as it is.

    Raises:
        MeshError: INVALID_REQUEST or UNSUPPORTED saying what does not fit.
    """
    item, definition = stored.input, plan.definition
    asked = Asked(model=definition.model, version=definition.version, metadata=plan.metadata, user=item.user)
    tensors = decode_request(stored.payload, media_type(item.content_type) or OCTETS, asked).decode()
    if tensors.keys() != {plan.data.name}:
        raise MeshError(
            Code.INVALID_REQUEST, f"A message of the stream {definition.name} is the tensor {plan.data.name} alone."
        )
    return tensors[plan.data.name]


def _read_raw(plan: Plan, stored: StoredInput) -> Samples:
    datatype = stored.input.user.get("dtype", "").upper() or plan.definition.datatype or plan.data.datatype
    dtype = dtype_of(datatype)
    _require_numbers(dtype, datatype)
    if len(stored.payload) % dtype.itemsize:
        raise MeshError(
            Code.INVALID_REQUEST, f"{len(stored.payload)} bytes are no whole number of samples of {datatype}."
        )
    return np.frombuffer(stored.payload, dtype)


def _require_numbers(dtype: np.dtype[Any], datatype: str) -> None:
    if dtype.kind not in "biuf":
        raise MeshError(Code.UNSUPPORTED, f"Samples are numbers, not {datatype}.")


def _require_rate(plan: Plan, rate_hz: int) -> None:
    stated = plan.metadata.properties.get(SAMPLE_RATE, "")
    wanted = plan.definition.sample_rate_hz or (int(stated) if stated.isdigit() else 0)
    if wanted and wanted != rate_hz:
        raise MeshError(
            Code.UNSUPPORTED, f"The stream {plan.definition.name} takes {wanted} Hz; this sound has {rate_hz} Hz."
        )
