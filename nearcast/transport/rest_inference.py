"""An inference over HTTP: what its head and its body ask, and the answer, whoever reads and writes the bytes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferResponse, RequestContext
from nearcast.transport.context import read_context
from nearcast.transport.json_layouts import JsonLayouts
from nearcast.transport.json_tensors import Body, Wanted, decode_raw_request, decode_request, encode_response
from nearcast.transport.outputs import as_they_are, form_outputs
from nearcast.transport.seam import Call, Fields, Limits, Taken
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

    def begin(
        self, ask: Ask, body: Body, deadline: float | None, call: Call, tell: Callable[[Answer], None]
    ) -> Taken | Coroutine[Any, Any, Answer]:
        """As `answer`, but where layout and handler allow it, no coroutine is needed: then `tell` hears the answer.

        Raises:
            MeshError: as `answer`.
        """
        request = self._layouts.read(ask.model, ask.version, body, _json_size(ask, body))
        if request is None:
            return self.answer(ask, body, deadline, call)
        wanted, context = request.form.wanted, self._context(ask, request, deadline, call)
        beginning = self._service.beginning
        if beginning is not None and context.deadline is None and wanted.is_all_binary and self._enter():
            asker = _Asker(self, wanted, tell)
            try:
                asker.taken = beginning.begin(request, context, asker)
            except MeshError as error:
                asker.refuse(error)
            except BaseException:
                asker.cancel()
                raise
            if asker.taken is not None or asker.is_done:
                return asker
            asker.cancel()
        return self._within_bounds(self._run(request, wanted, context, call))

    async def answer(self, ask: Ask, body: Body, deadline: float | None, call: Call) -> Answer:
        """Answer one request whose body is there.

        Raises:
            MeshError: what is wrong with the request, or went wrong with it.
        """
        return await self._within_bounds(self._read_and_run(ask, body, deadline, call))

    async def _within_bounds(self, answer: Coroutine[Any, Any, Answer]) -> Answer:
        # Not before the body was there: those who send slowly could hold all places.
        if not self._enter():
            answer.close()
            text = "Too many requests are in flight on this listener; try again later."
            raise MeshError(Code.OVERLOADED, text, retry_after_ms=REST_LIMITS.retry_after_ms)
        try:
            return await answer
        finally:
            self._leave()

    def _enter(self) -> bool:
        if self._in_flight >= self._limits.concurrent_streams_max:
            return False
        self._in_flight += 1
        self.idle.clear()
        return True

    def _leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self.idle.set()

    async def _read_and_run(self, ask: Ask, body: Body, deadline: float | None, call: Call) -> Answer:
        size_bytes = _json_size(ask, body)
        if size_bytes == 0:
            metadata = await self._service.metadata(ask.model, ask.version)
            request, wanted = decode_raw_request(metadata, ask.version, body)
        else:
            fetch = partial(self._service.regions.read, call)
            decode = partial(decode_request, ask.model, ask.version, body, size_bytes, fetch)
            request, wanted = await _apart(size_bytes, decode)
            self._layouts.learn(body, size_bytes, request, wanted)
        return await self._run(request, wanted, self._context(ask, request, deadline, call), call)

    def _context(self, ask: Ask, request: TensorRequest, deadline: float | None, call: Call) -> RequestContext:
        return read_context(
            ask.context,
            request.parameters,
            deadline=deadline,
            identity=call.identity,
            trusted=False,
            clock=self._clock,
        )

    async def _run(self, request: TensorRequest, wanted: Wanted, context: RequestContext, call: Call) -> Answer:
        response = await self._service.infer(request, context)
        if wanted.is_all_binary:
            return self._write_binary(response, wanted)
        return _make_answer(response, *await self._write(response, wanted, call))

    def _write_binary(self, response: InferResponse, wanted: Wanted) -> Answer:
        found = self._layouts.write(response, wanted)
        return _make_answer(response, *(found or encode_response(response, as_they_are(response), wanted)))

    async def _write(self, response: InferResponse, wanted: Wanted, call: Call) -> tuple[bytes, list[bytes]]:
        outputs = await form_outputs(self._service, response, wanted.forms, call)
        json_arrays = [each.array for each in outputs if each.array is not None and not wanted.is_binary(each.name)]
        encode = partial(encode_response, response, outputs, wanted)
        return await _apart(sum(array.nbytes for array in json_arrays), encode)


class _Asker:
    """Who asked, for a handler that answers without a coroutine."""

    __slots__ = ("_inference", "_tell", "_wanted", "is_done", "taken")

    def __init__(self, inference: RestInference, wanted: Wanted, tell: Callable[[Answer], None]) -> None:
        self._inference = inference
        self._wanted = wanted
        self._tell = tell
        self.is_done = False
        self.taken: Taken | None = None

    def answer(self, response: InferResponse) -> None:
        self._end(self._inference._write_binary(response, self._wanted))  # noqa: SLF001 (its own)

    def refuse(self, error: MeshError) -> None:
        self._end(answer_error(error))

    def cancel(self) -> None:
        if self.is_done:
            return
        self.is_done = True
        self._inference._leave()  # noqa: SLF001
        if self.taken is not None:
            self.taken.cancel()

    def _end(self, answer: Answer) -> None:
        if self.is_done:
            return
        self.is_done = True
        self._inference._leave()  # noqa: SLF001
        self._tell(answer)


def _make_answer(response: InferResponse, head: bytes, pieces: Sequence[bytes]) -> Answer:
    fields = status.served_to_fields(response.served)
    if not pieces:
        return Answer(pieces=(head,), fields=fields)
    return Answer(pieces=(head, *pieces), kind=_BINARY, fields=(*fields, (_JSON_SIZE, b"%d" % len(head))))


def _json_size(ask: Ask, body: Body) -> int:
    return len(body) if ask.json_size_bytes is None else ask.json_size_bytes


async def _apart(size_bytes: int, work: Callable[[], T]) -> T:
    """Run what deals with much JSON in a thread: a second of it on the loop would be a second for everybody."""
    if size_bytes <= _INLINE_SIZE_BYTES_MAX:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
