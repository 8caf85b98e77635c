"""What a stream remembers from one message to the next, as bytes in the ledger. Pure."""

from __future__ import annotations

import msgspec
import numpy as np

from edge_node.mqtt.streams.plan import Plan
from edge_node.mqtt.streams.windows import Samples, first_rest
from nearcast.handler import Tensors
from nearcast.wire.tensors import Array, dtype_of, from_raw, to_raw


class StreamState(msgspec.Struct, frozen=True, array_like=True):
    """Everything that the next message of a stream depends on.

    Attributes:
        boot, seq: the device's count of the last message; "" and None where it keeps none.
        version: model@version that made the tensors; "" = nothing has run yet.
        rest: samples that no window has ended on yet, in the model's type.
        tensors: values of the inputs that are fed back, raw.
        recent: the last scores of each class, for their mean.
        shown: class names in the last event.
    """

    boot: str = ""
    seq: int | None = None
    version: str = ""
    rest: bytes = b""
    tensors: dict[str, bytes] = {}
    recent: tuple[tuple[float, ...], ...] = ()
    shown: tuple[str, ...] = ()


NOTHING = StreamState()
_decoder = msgspec.msgpack.Decoder(StreamState)
_encoder = msgspec.msgpack.Encoder()


def encode_state(state: StreamState) -> bytes:
    """The state as the ledger keeps it."""
    return _encoder.encode(state)


def decode_state(data: bytes) -> StreamState:
    """The state that the ledger kept; nothing at all where another version of this program wrote it otherwise."""
    try:
        return _decoder.decode(data) if data else NOTHING
    except msgspec.DecodeError:
        return NOTHING


def rest_of(state: StreamState, plan: Plan) -> Samples:
    """The samples that the next message continues."""
    definition = plan.definition
    dtype = dtype_of(plan.data.datatype)
    rest = np.frombuffer(state.rest, dtype) if len(state.rest) % dtype.itemsize == 0 else np.empty(0, dtype)
    first = first_rest(definition.window, definition.step, dtype)
    # Shorter: a new stream, or one behind a gap. Longer: the window was configured anew.
    return rest if len(first) <= len(rest) < definition.window else first


def tensors_of(state: StreamState, plan: Plan) -> Tensors:
    """Values of the fed-back inputs; zeros where the state holds none of that size."""
    tensors: dict[str, Array] = {}
    for entry in plan.feedback:
        dtype = dtype_of(entry.datatype)
        data = state.tensors.get(entry.input, b"")
        zeros = np.zeros(entry.shape, dtype)
        fits = len(data) == zeros.nbytes
        tensors[entry.input] = from_raw(entry.input, entry.datatype, entry.shape, data, 0, len(data)) if fits else zeros
    return tensors


def keep_tensors(outputs: Tensors, plan: Plan) -> dict[str, bytes]:
    """The outputs that are fed back, by the inputs that they go to."""
    return {entry.input: to_raw(outputs[entry.output]) for entry in plan.feedback}
