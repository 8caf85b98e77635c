"""Inference requests: as they came (`WireRequest`) and as they are made here (`TensorRequest`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nearcast.handler import InferRequest, Parameter, Tensors
from nearcast.wire.framing import encode_prefix, encode_text
from nearcast.wire.layout import Layout, Layouts
from nearcast.wire.message import NO_PARAMETERS, encode_message, encode_requested

_LAYOUTS = Layouts(raw_field=7)


class WireRequest(InferRequest):
    """A `ModelInferRequest` as received. Top-level fields are read at once, tensors only when asked for.

    The arrays of `decode` are read-only and may view the body.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are no protobuf message.
    """

    __slots__ = ("_body", "_inputs", "_layout")

    def __init__(self, body: bytes) -> None:
        layout = _LAYOUTS.read(body)
        self.model = layout.model
        self.version = layout.version
        self.id = layout.read_id(body)
        self.parameters = layout.parameters
        self._body = body
        self._layout = layout
        self._inputs: Tensors | None = None

    @property
    def size_bytes(self) -> int:
        return len(self._body)

    @property
    def form(self) -> Layout | None:
        return self._layout if self._layout.is_plain else None

    @property
    def is_extended(self) -> bool:
        """Whether a tensor may lie in shared memory, or an output be wanted there or as its classes."""
        return self._layout.is_extended

    def decode(self) -> Tensors:
        if self._inputs is None:
            self._inputs = self._layout.read_tensors(self._body)
        return self._inputs

    def encode(self) -> bytes:
        return self._body

    def encode_pieces(self) -> Sequence[bytes]:
        """The original bytes, in one piece."""
        return (self._body,)

    def requested_outputs(self) -> Sequence[str]:
        """Names of the outputs asked for; empty = all.

        Raises:
            MeshError: INVALID_REQUEST if malformed; UNSUPPORTED for outputs by classification or in shared memory.
        """
        return self._layout.read_requested(self._body)


class PiecedRequest(WireRequest):
    """A `ModelInferRequest` as received in several pieces. They are joined only where somebody needs them to be.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are no protobuf message.
    """

    __slots__ = ("_pieces", "_size_bytes")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._size_bytes = sum(map(len, pieces))
        self._pieces = pieces
        layout = _LAYOUTS.recognise(pieces[0], self._size_bytes)
        if layout is None:
            super().__init__(b"".join(pieces))
            self._pieces = (self._body,)
            return
        self.model = layout.model
        self.version = layout.version
        self.id = layout.read_id(pieces[0])
        self.parameters = layout.parameters
        self._body = b""
        self._layout = layout
        self._inputs = None

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def decode(self) -> Tensors:
        if self._inputs is not None:
            return self._inputs
        if self._layout.is_plain and not self._body:
            self._inputs = self._layout.gather_tensors(self._pieces)
            return self._inputs
        self.encode()
        return super().decode()

    def encode(self) -> bytes:
        if not self._body:
            self._body = b"".join(self._pieces)
        return self._body

    def encode_pieces(self) -> Sequence[bytes]:
        """The original bytes as they came."""
        return self._pieces

    def requested_outputs(self) -> Sequence[str]:
        # Recognised by its first piece, a message has them and its id there.
        return self._layout.read_requested(self._pieces[0])


class TensorRequest(InferRequest):
    """A request made from arrays: what REST, MQTT and clients build. Arrays must not change afterwards."""

    __slots__ = ("_encoded", "_inputs", "_outputs", "_pieces")

    def __init__(
        self,
        *,
        model: str,
        inputs: Tensors,
        version: str = "",
        id: str = "",  # noqa: A002 - the protocol's word
        parameters: Mapping[str, Parameter] = NO_PARAMETERS,
        outputs: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.parameters = parameters
        self._inputs = inputs
        self._outputs = tuple(outputs)
        self._pieces: tuple[bytes, ...] | None = None
        self._encoded: bytes | None = None

    @property
    def size_bytes(self) -> int:
        if self._pieces is not None:
            return sum(map(len, self._pieces))
        return 64 + sum(64 + array.nbytes for array in self._inputs.values())

    def decode(self) -> Tensors:
        return self._inputs

    def encode(self) -> bytes:
        if self._encoded is None:
            pieces = self.encode_pieces()
            self._encoded = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._encoded

    def encode_pieces(self) -> Sequence[bytes]:
        """The message in pieces, so that large tensors are not copied once more to be joined. Cached.

        Raises:
            MeshError: INVALID_REQUEST if an array or a parameter cannot travel.
        """
        if self._pieces is None:
            self._pieces = encode_message(
                model=self.model,
                version=self.version,
                id_=self.id,
                parameters=self.parameters,
                tensors=self._inputs,
                sixth=encode_requested(self._outputs),
                raw_field=7,
            )
        return self._pieces

    def requested_outputs(self) -> Sequence[str]:
        return self._outputs


class StandInRequest(InferRequest):
    """The same request to another model, its channel's choice of version. Shares everything with the original.

    On the wire the new name follows the original message: of two values of a field the last one counts.
    """

    __slots__ = ("_original", "_suffix")

    def __init__(self, original: InferRequest, model: str) -> None:
        self.model = model
        self.version = ""
        self.id = original.id
        self.parameters = original.parameters
        self._original = original
        name = encode_text(model)
        self._suffix = encode_prefix(1, len(name)) + name + encode_prefix(2, 0)

    @property
    def size_bytes(self) -> int:
        return self._original.size_bytes + len(self._suffix)

    def decode(self) -> Tensors:
        return self._original.decode()

    def encode(self) -> bytes:
        return b"".join(self.encode_pieces())

    def encode_pieces(self) -> Sequence[bytes]:
        """The original's pieces and the name that replaces its model's."""
        return (*request_pieces(self._original), self._suffix)

    def requested_outputs(self) -> Sequence[str]:
        return self._original.requested_outputs()


_IN_PIECES = (WireRequest, TensorRequest, StandInRequest)


def request_pieces(request: InferRequest) -> Sequence[bytes]:
    """The request as pieces of one `ModelInferRequest`, whatever class it is of."""
    if isinstance(request, _IN_PIECES):
        return request.encode_pieces()
    return (request.encode(),)
