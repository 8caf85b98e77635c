"""An inference over HTTP: what its head and its body ask, and the answer, whoever reads and writes the bytes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferResponse
from nearcast.transport.context import read_context
from nearcast.transport.json_layouts import JsonLayouts
from nearcast.transport.json_tensors import Body, Wanted, decode_raw_request, decode_request, encode_response
from nearcast.transport.outputs import form_outputs
from nearcast.transport.seam import Call, Fields, Limits
from nearcast.transport.service import InferenceService
from nearcast.wire import status
from nearcast.wire.request import TensorRequest

T = TypeVar("T")
JSON_SIZE = "Inference-Header-Content-Length"
_JSON_SIZE = JSON_SIZE.encode()
_JSON, _BINARY = b"application/json", b"application/octet-stream"
_INLINE_SIZE_BYTES_MAX = 128 * 1024
_CONTEXT = (status.IDEMPOTENCY_KEY, status.TRACE, status.PRIORITY)


class RestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that HTTP needs beside `Limits`; `Limits.concurrent_streams_max` bounds the requests in flight."""

    body_timeout_s: float = 30.0
    retry_after_ms: int = 100
    deadline_ms_max: float = 24 * 3600 * 1000.0


REST_LIMITS = RestLimits()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What path and headers say.

    Attributes:
        deadline_ms: as it came; "" = none.
        json_size_bytes: where the JSON of the body ends; None = with the body.
        context: the headers that `read_context` looks at.
    """

    model: str
    version: str
    deadline_ms: str
    json_size_bytes: int | None
    context: Mapping[str, str]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent: `fields` are headers beside those of every answer."""

    pieces: Sequence[bytes]
    code: int = 200
    kind: bytes = _JSON
    fields: Fields = ()


def read_ask(model: str, version: str, headers: Mapping[str, str]) -> Ask:
    """What the path's names and the headers ask.

    Raises:
        MeshError: INVALID_REQUEST for a size of the JSON that is none.
    """
    text = headers.get(JSON_SIZE)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 16):
        raise MeshError(Code.INVALID_REQUEST, f"The header {JSON_SIZE} must be a number of bytes.")
    return Ask(
        model=model,
        version=version,
        deadline_ms=headers.get(status.DEADLINE_MS, ""),
        json_size_bytes=None if text is None else int(text),
        context={name: headers[name] for name in _CONTEXT if name in headers},
    )


def answer_error(error: MeshError) -> Answer:
    """How an error is told."""
    fields = [(status.CODE.encode(), str(error.code).encode())]
    if error.retry_after_ms is not None:
        fields.append((b"Retry-After", b"%d" % max(1, math.ceil(error.retry_after_ms / 1000))))
        fields.append((status.RETRY_AFTER_MS.encode(), b"%d" % max(0, error.retry_after_ms)))
    body = msgspec.json.encode({"error": error.message})
    return Answer(pieces=(body,), code=CATALOGUE[error.code].http, fields=tuple(fields))


class RestInference:
    """The inferences of one listener. Nothing that clients say about the mesh (`nc-hop`, `nc-tenant`) counts."""

    def __init__(self, service: InferenceService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._clock = service.clock
        self.wall = service.clock.wall
        self._layouts = JsonLayouts()
        self._in_flight = 0
        self.is_draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    def open(self, ask: Ask) -> float | None:
        """Begin a request, before its body is there; returns its deadline.

        Raises:
            MeshError: UNAVAILABLE at the end of the node; INVALID_REQUEST for a deadline that is none.
        """
        if self.is_draining:
            text = "This node is shutting down; ask another."
            raise MeshError(Code.UNAVAILABLE, text, retry_after_ms=REST_LIMITS.retry_after_ms)
        if not ask.deadline_ms:
            return None
        try:
            value = float(ask.deadline_ms)
        except ValueError:
            value = math.nan
        if not 0 < value <= REST_LIMITS.deadline_ms_max:
            text = f"The header {status.DEADLINE_MS} must be a number of milliseconds above 0."
            raise MeshError(Code.INVALID_REQUEST, text)
        return self._clock.monotonic() + value / 1e3

    async def answer(self, ask: Ask, body: Body, deadline: float | None, call: Call) -> Answer:
        """Answer one request whose body is there.

        Raises:
            MeshError: what is wrong with the request, or went wrong with it.
        """
        # Not before the body was there: those who send slowly could hold all places.
        if self._in_flight >= self._limits.concurrent_streams_max:
            text = "Too many requests are in flight on this listener; try again later."
            raise MeshError(Code.OVERLOADED, text, retry_after_ms=REST_LIMITS.retry_after_ms)
        self._in_flight += 1
        self.idle.clear()
        try:
            return await self._run(ask, body, deadline, call)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self.idle.set()

    async def _run(self, ask: Ask, body: Body, deadline: float | None, call: Call) -> Answer:
        request, wanted = await self._read(ask, body, call)
        context = read_context(
            ask.context,
            request.parameters,
            deadline=deadline,
            identity=call.identity,
            trusted=False,
            clock=self._clock,
        )
        response = await self._service.infer(request, context)
        fields = status.served_to_fields(response.served)
        head, pieces = self._layouts.write(response, wanted) or await self._write(response, wanted, call)
        if not pieces:
            return Answer(pieces=(head,), fields=fields)
        return Answer(pieces=(head, *pieces), kind=_BINARY, fields=(*fields, (_JSON_SIZE, b"%d" % len(head))))

    async def _read(self, ask: Ask, body: Body, call: Call) -> tuple[TensorRequest, Wanted]:
        size_bytes = len(body) if ask.json_size_bytes is None else ask.json_size_bytes
        known = self._layouts.read(ask.model, ask.version, body, size_bytes)
        if known is not None:
            return known, known.form.wanted
        if size_bytes == 0:
            return decode_raw_request(await self._service.metadata(ask.model, ask.version), ask.version, body)
        fetch = partial(self._service.regions.read, call)
        decode = partial(decode_request, ask.model, ask.version, body, size_bytes, fetch)
        request, wanted = await _apart(size_bytes, decode)
        self._layouts.learn(body, size_bytes, request, wanted)
        return request, wanted

    async def _write(self, response: InferResponse, wanted: Wanted, call: Call) -> tuple[bytes, list[bytes]]:
        outputs = await form_outputs(self._service, response, wanted.forms, call)
        json_arrays = [each.array for each in outputs if each.array is not None and not wanted.is_binary(each.name)]
        encode = partial(encode_response, response, outputs, wanted)
        return await _apart(sum(array.nbytes for array in json_arrays), encode)


async def _apart(size_bytes: int, work: Callable[[], T]) -> T:
    """Run what deals with much JSON in a thread: a second of it on the loop would be a second for everybody."""
    if size_bytes <= _INLINE_SIZE_BYTES_MAX:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
