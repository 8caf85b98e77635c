"""Inference answers: as they came (`WireResponse`) and as they are made here (`TensorResponse`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, Parameter, Served, Tensors
from nearcast.wire.layout import Layouts
from nearcast.wire.message import NO_PARAMETERS, encode_message

_LAYOUTS = Layouts(raw_field=6)


class WireResponse(InferResponse):
    """A `ModelInferResponse` as received. The arrays of `decode` are read-only and may view the body.

    Raises:
        MeshError: INTERNAL if the bytes are no protobuf message: the peer is at fault, another may answer.
    """

    __slots__ = ("_body", "_layout", "_outputs")

    def __init__(self, body: bytes, served: Served) -> None:
        try:
            layout = _LAYOUTS.read(body)
            self.id = layout.read_id(body)
        except MeshError as error:
            raise _broken(error) from error
        self.model = layout.model
        self.version = layout.version
        self.parameters = layout.parameters
        self.served = served
        self._body = body
        self._layout = layout
        self._outputs: Tensors | None = None

    def decode(self) -> Tensors:
        if self._outputs is None:
            try:
                self._outputs = self._layout.read_tensors(self._body)
            except MeshError as error:
                raise _broken(error) from error
        return self._outputs

    def encode(self) -> bytes:
        return self._body


class TensorResponse(InferResponse):
    """An answer made from arrays: what engines produce. `id` repeats the request's.

    Arrays must not change afterwards.
    """

    __slots__ = ("_encoded", "_outputs", "_pieces")

    def __init__(
        self,
        *,
        model: str,
        version: str,
        outputs: Tensors,
        id: str = "",  # noqa: A002 - the protocol's word
        parameters: Mapping[str, Parameter] = NO_PARAMETERS,
        served: Served | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.parameters = parameters
        self.served = Served() if served is None else served
        self._outputs = outputs
        self._pieces: tuple[bytes, ...] | None = None
        self._encoded: bytes | None = None

    def with_id(self, id: str) -> TensorResponse:  # noqa: A002 - the protocol's word
        """The same answer to a request of another id; the arrays are shared."""
        return TensorResponse(
            model=self.model,
            version=self.version,
            outputs=self._outputs,
            id=id,
            parameters=self.parameters,
            served=self.served,
        )

    def decode(self) -> Tensors:
        return self._outputs

    def encode(self) -> bytes:
        if self._encoded is None:
            pieces = self.encode_pieces()
            self._encoded = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._encoded

    def encode_pieces(self) -> Sequence[bytes]:
        """The message in pieces, so that large tensors are not copied once more to be joined. Cached.

        Raises:
            MeshError: INTERNAL if an array or a parameter cannot travel.
        """
        if self._pieces is None:
            try:
                self._pieces = encode_message(
                    model=self.model,
                    version=self.version,
                    id_=self.id,
                    parameters=self.parameters,
                    tensors=self._outputs,
                    sixth=b"",
                    raw_field=6,
                )
            except MeshError as error:
                raise _broken(error) from error
        return self._pieces


def _broken(error: MeshError) -> MeshError:
    return MeshError(Code.INTERNAL, f"The model's answer is malformed. {error.message}")
