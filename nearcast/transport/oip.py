"""Inference by the Open Inference Protocol over gRPC: messages in, an `InferenceHandler` behind, messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import msgspec
from google.protobuf.message import DecodeError, Message

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, RequestContext
from nearcast.transport.context import read_context
from nearcast.transport.latest import Frame, LatestStream
from nearcast.transport.oip_extended import encode_extended, read_extended
from nearcast.transport.oip_models import NOT_OFFERED, QUESTIONS, Answer, refuse
from nearcast.transport.seam import Call, Methods, PassMethod, Reply, Responder, Taken, UnaryMethod
from nearcast.transport.service import InferenceService, repeat_id
from nearcast.transport.stream_answers import encode_error
from nearcast.wire.framing import encode_prefix
from nearcast.wire.message import encode_parameters
from nearcast.wire.request import PiecedRequest, WireRequest
from nearcast.wire.status import LATEST, served_to_fields

SERVICE = "/inference.GRPCInferenceService/"
MODEL_INFER = SERVICE + "ModelInfer"
MODEL_STREAM_INFER = SERVICE + "ModelStreamInfer"
MODEL_METADATA = SERVICE + "ModelMetadata"
MODEL_READY = SERVICE + "ModelReady"
SERVER_READY = SERVICE + "ServerReady"

_FINAL = encode_parameters({"triton_final_response": True})
"""What says in a stream that a request gets no further answers: every model gives exactly one."""


def oip_methods(service: InferenceService, *, trusted: bool) -> Methods:
    """The protocol's methods for a server.

    Args:
        service: answers; listeners may share one.
        trusted: True on a mesh listener (mTLS): peers must be mesh nodes, and `nc-hop`, `nc-version`, `nc-tenant`
            count. Elsewhere these are dropped.
    """
    unary: dict[str, UnaryMethod] = {
        SERVICE + name: _unary(service, kind, answer) for name, (kind, answer) in QUESTIONS.items()
    }
    unary |= {SERVICE + name: _refusal(name) for name in NOT_OFFERED}
    unary[MODEL_INFER] = _infer(service, trusted=trusted)

    def stream(bodies: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        if call.metadata.get(LATEST) == "1":
            return LatestStream(lambda body: _frame(service, body, call, trusted=trusted)).run(bodies)
        return _stream(service, bodies, call, trusted=trusted)

    # What comes from routers is not passed on.
    passing = {} if trusted else {MODEL_INFER: _pass(service)}
    pieced = frozenset((MODEL_INFER,))
    return Methods(unary=unary, stream={MODEL_STREAM_INFER: stream}, passing=passing, pieced=pieced)


def _infer(service: InferenceService, *, trusted: bool) -> UnaryMethod:
    def infer(body: bytes | Sequence[bytes], call: Call) -> Coroutine[Any, Any, Reply]:
        return _answer(service, *_read(service, body, call, trusted=trusted), call)

    return infer


def _pass(service: InferenceService) -> PassMethod:
    def pass_on(pieces: Sequence[bytes], call: Call, responder: Responder) -> Taken | Coroutine[Any, Any, Reply]:
        request, context = _read(service, pieces, call, trusted=False)
        # Who takes the call over leaves its deadline to the transport, which knows of no other.
        if context.deadline != call.deadline or request.is_extended or not request.model:
            return _answer(service, request, context, call)
        if service.beginning is not None:
            taken = service.beginning.begin(request, context, _Asker(responder))
            return taken or _answer(service, request, context, call)
        if service.passing is None:
            return _answer(service, request, context, call)
        if context.deadline is not None:
            context.require_time(service.clock.monotonic())
        taken = service.passing.pass_on(request, context, responder, service.counts)
        return taken or _answer(service, request, context, call)

    return pass_on


class _Asker(msgspec.Struct, eq=False):
    """Whoever asked, for a handler that knows nothing of messages."""

    responder: Responder

    def answer(self, response: InferResponse) -> None:
        self.responder.reply(_reply(response))

    def refuse(self, error: MeshError) -> None:
        self.responder.refuse(error)


async def _answer(service: InferenceService, request: WireRequest, context: RequestContext, call: Call) -> Reply:
    if not request.is_extended:
        return _reply(repeat_id(request, await service.ask(request, context, kept=call.deadline)))
    fetched, forms = read_extended(service, request.encode(), call)
    response = await service.infer(fetched, context, kept=call.deadline)
    return Reply((await encode_extended(service, response, forms, call),), fields=served_to_fields(response.served))


def _reply(response: InferResponse) -> Reply:
    return Reply(response.encode_pieces(), fields=served_to_fields(response.served))


def _read(
    service: InferenceService, body: bytes | Sequence[bytes], call: Call, *, trusted: bool
) -> tuple[WireRequest, RequestContext]:
    if isinstance(body, bytes):
        request = WireRequest(body)
    else:
        request = WireRequest(body[0]) if len(body) == 1 else PiecedRequest(body)
    context = read_context(
        call.metadata,
        request.parameters,
        deadline=call.deadline,
        identity=call.identity,
        trusted=trusted,
        clock=service.clock,
    )
    return request, context


async def _stream(
    service: InferenceService, bodies: AsyncIterator[bytes], call: Call, *, trusted: bool
) -> AsyncIterator[Reply]:
    """Answers in the order of the requests. A request that fails is answered by its error; the stream goes on."""
    async for body in bodies:
        frame = _frame(service, body, call, trusted=trusted)
        if isinstance(frame, Reply):
            yield frame
            continue
        try:
            reply = await frame.answer()
        except MeshError as error:
            reply = frame.fail(error)
        yield reply


def _frame(service: InferenceService, body: bytes, call: Call, *, trusted: bool) -> Frame | Reply:
    """One message of a stream; its answer at once if it is no request."""
    try:
        request, context = _read(service, body, call, trusted=trusted)
    except MeshError as error:
        return Reply((encode_error(error, ""),))

    is_asked = False

    async def answer() -> Reply:
        nonlocal is_asked
        is_asked = True
        pieces = (await _answer(service, request, context, call)).body
        return Reply((encode_prefix(2, sum(map(len, pieces)) + len(_FINAL)), *pieces, _FINAL))

    def fail(error: MeshError) -> Reply:
        if not is_asked:
            service.frames.count(error.code)
        return Reply((encode_error(error, request.id),))

    return Frame(context.deadline, answer, fail)


def _unary(service: InferenceService, kind: type[Message], answer: Answer) -> UnaryMethod:
    async def method(body: bytes, call: Call) -> Reply:
        try:
            request = kind.FromString(body)
        except DecodeError as error:
            raise MeshError(Code.INVALID_REQUEST, f"The message is no {kind.DESCRIPTOR.name}.") from error
        message = await answer(service, request, call)
        return Reply((message.SerializeToString(),))

    return method


def _refusal(name: str) -> UnaryMethod:
    async def method(_: bytes, __: Call) -> Reply:
        raise refuse(name)

    return method
