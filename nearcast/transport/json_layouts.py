"""Bodies with binary data, recognised: the JSON before the tensors of a request, and that before those of an answer.

A client sends the same JSON again and again; only the bytes of the tensors behind it differ. So it is parsed once, and
that of the answer is written once. Each is bounded like the layouts of protobuf messages (`wire/layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from nearcast.handler import InferResponse, Parameter, Tensors
from nearcast.transport.json_tensors import Body, Wanted, encode_response
from nearcast.transport.outputs import as_they_are
from nearcast.wire.framing import LIMITS
from nearcast.wire.request import TensorRequest
from nearcast.wire.tensors import Array

K = TypeVar("K")
V = TypeVar("V")
_PLAIN = "iuf"
"""Kinds of numpy types whose elements are their bytes, whatever these are."""


class Layout:
    """What all requests with one JSON share. `tensors` are names, types, shapes, and where the bytes lie."""

    __slots__ = ("id", "outputs", "parameters", "size_bytes", "tensors", "wanted")

    def __init__(self, request: TensorRequest, wanted: Wanted, json_size_bytes: int) -> None:
        self.id = request.id
        self.parameters: Mapping[str, Parameter] = request.parameters
        self.outputs = request.requested_outputs()
        self.wanted = wanted
        self.tensors: list[tuple[str, np.dtype[Any], tuple[int, ...], int, int]] = []
        position = json_size_bytes
        for name, array in request.decode().items():
            start, position = position, position + array.nbytes
            self.tensors.append((name, array.dtype, array.shape, start, position))
        self.size_bytes = position


class LayoutRequest(TensorRequest):
    """A request of a known layout."""

    __slots__ = ("_layout",)

    def __init__(self, model: str, version: str, layout: Layout, inputs: Tensors) -> None:
        super().__init__(
            model=model,
            version=version,
            id=layout.id,
            inputs=inputs,
            parameters=layout.parameters,
            outputs=layout.outputs,
        )
        self._layout = layout

    @property
    def form(self) -> Layout:
        return self._layout


class JsonLayouts:
    """The layouts of one listener's requests and answers."""

    def __init__(self) -> None:
        self._requests: dict[bytes, Layout] = {}
        self._answers: dict[object, bytes] = {}

    def read(self, model: str, version: str, body: Body, json_size_bytes: int) -> LayoutRequest | None:
        """The request in a body, if its layout is known."""
        if json_size_bytes > min(len(body), LIMITS.layout_size_bytes_max):
            return None
        layout = self._requests.get(bytes(body[:json_size_bytes]))
        if layout is None or layout.size_bytes != len(body):
            return None
        inputs: dict[str, Array] = {}
        for name, dtype, shape, start, stop in layout.tensors:
            # A slice of bytes is a copy and so aligned; the first tensor of a memoryview is, and the others beside it.
            inputs[name] = np.ndarray(shape, dtype, body[start:stop])
        return LayoutRequest(model, version, layout, inputs)

    def learn(self, body: Body, json_size_bytes: int, request: TensorRequest, wanted: Wanted) -> None:
        """Remember the layout of a body that was decoded, if all inputs lie behind the JSON as they are."""
        arrays = request.decode().values()
        if json_size_bytes > LIMITS.layout_size_bytes_max or not all(
            array.dtype.kind in _PLAIN and array.nbytes for array in arrays
        ):
            return
        layout = Layout(request, wanted, json_size_bytes)
        # Inputs that are elsewhere, in the JSON or in shared memory, make it longer than the body.
        if layout.size_bytes != len(body) or any(
            (start - json_size_bytes) % dtype.itemsize for _, dtype, _, start, _ in layout.tensors
        ):
            return
        _remember(self._requests, bytes(body[:json_size_bytes]), layout)

    def write(self, response: InferResponse, wanted: Wanted) -> tuple[bytes, list[bytes]] | None:
        """An answer all of whose outputs are wanted behind the JSON; None = its JSON would not be that of others."""
        if response.id or response.parameters:
            return None
        pieces: list[bytes] = []
        key: list[object] = [response.model, response.version]
        for name, array in response.decode().items():
            dtype = array.dtype
            if dtype.kind not in _PLAIN or dtype.byteorder == ">":
                return None
            pieces.append(array.tobytes())
            key += (name, dtype, array.shape)
        known = tuple(key)
        head = self._answers.get(known)
        if head is None:
            head, _ = encode_response(response, as_they_are(response), wanted)
            if len(head) <= LIMITS.layout_size_bytes_max:
                _remember(self._answers, known, head)
        return head, pieces


def _remember(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= LIMITS.layouts_max:
        # The oldest: what is still in use is back with its next request.
        del known[next(iter(known))]
    known[key] = value
