"""Another node, or any server of the protocol, as an `InferenceHandler`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import lru_cache

import msgspec
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served
from nearcast.load import NodeReport
from nearcast.transport.mesh import REPORT
from nearcast.transport.oip import MODEL_INFER, MODEL_METADATA, MODEL_READY, MODEL_STREAM_INFER, SERVER_READY
from nearcast.transport.oip_models import decode_metadata
from nearcast.transport.seam import Channel, DirectChannel, Fields, Metadata, PassedCall, Receiver
from nearcast.transport.stream_answers import decode_answer
from nearcast.wire import status
from nearcast.wire.report import decode_report
from nearcast.wire.request import request_pieces
from nearcast.wire.response import WireResponse
from nearcast.wire.v1 import oip_pb2 as pb

_HEADS_MAX = 256
"""Header blocks remembered, by version, tenant and priority."""


class RemoteNode:
    """A server behind a channel.

    Requests go out as they came in, bytes untouched. `nc-hop`, `nc-version` and `nc-tenant` are said only for a
    forwarded context (`RequestContext.forward`): the peer believes them on its mesh listener alone.
    """

    def __init__(self, channel: Channel, name: str = "") -> None:
        self.name = name
        self._channel = channel
        self._direct: DirectChannel | None = channel if isinstance(channel, DirectChannel) else None
        self._heads: dict[tuple[str, str, int], Fields] = {}

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Send the request and wait for the answer.

        Raises:
            CallError: the peer's error, or the channel's; `sent` says whether the model may have run.
            MeshError: INTERNAL if the answer is malformed, INVALID_REQUEST if a value cannot travel.
        """
        reply = await self._channel.unary(
            MODEL_INFER, request_pieces(request), metadata=_metadata(context), deadline=context.deadline
        )
        served = status.served_from_trailers(reply.trailers)
        if not served.node:
            served = msgspec.structs.replace(served, node=self.name)
        return WireResponse(_whole(reply.body), served)

    def pass_on(
        self, request: InferRequest, context: RequestContext, version: str, now: float, receiver: Receiver
    ) -> PassedCall | None:
        """Forward a request as `infer` would for `context.forward(version)`, without a coroutine.

        The receiver keeps the deadline, and hears what comes back. None: not now, `infer` has to wait; or never.

        Raises:
            MeshError: INVALID_REQUEST if a value cannot travel.
        """
        channel = self._direct
        if channel is None:
            return None
        # What differs from call to call is not worth remembering.
        is_usual = not (context.idempotency_key or context.trace)
        key = (version, context.tenant, context.priority)
        head = self._heads.get(key) if is_usual else None
        if head is None:
            head = tuple(channel.write_head(MODEL_INFER, self._describe(context.forward(version))))
            if is_usual:
                if len(self._heads) >= _HEADS_MAX:
                    self._heads.clear()
                self._heads[key] = head
        if context.deadline is not None:
            head = (*head, (b"grpc-timeout", status.format_timeout(context.deadline - now).encode()))
        return channel.pass_on(head, self._write(request, version), now, receiver)

    def _describe(self, context: RequestContext) -> Metadata:
        """What the call says beside its message."""
        return _metadata(context)

    def _write(self, request: InferRequest, version: str) -> Sequence[bytes]:
        """The message, for the version that was chosen."""
        return request_pieces(request)

    async def stream(
        self, requests: AsyncIterator[InferRequest], context: RequestContext
    ) -> AsyncIterator[InferResponse]:
        """Send the requests as one stream, each as soon as there is one, and yield the answers in their order.

        The context is that of the whole stream: its deadline ends it.

        Raises:
            CallError: of the first request that fails, or the channel's; both end the stream.
            MeshError: INTERNAL if an answer is malformed, INVALID_REQUEST if a value cannot travel.
        """

        async def bodies() -> AsyncIterator[Sequence[bytes]]:
            async for request in requests:
                yield request_pieces(request)

        metadata, served = _metadata(context), Served(node=self.name)
        replies = self._channel.stream(MODEL_STREAM_INFER, bodies(), metadata=metadata, deadline=context.deadline)
        async with aclosing(replies):
            async for body in replies:
                response = decode_answer(body, served)
                if response.version:
                    response.served = Served(node=self.name, version=response.version)
                yield response

    async def report(self, *, deadline: float | None = None) -> NodeReport:
        """What the node says about itself, clamped.

        Raises:
            CallError: if the node cannot be asked.
            MeshError: INTERNAL if the report is malformed.
        """
        reply = await self._channel.unary(REPORT, (b"",), deadline=deadline)
        return decode_report(_whole(reply.body))

    async def metadata(self, model: str, version: str = "", *, deadline: float | None = None) -> ModelMetadata:
        """Tensors and versions of a model.

        Raises:
            CallError: the peer's error, such as MODEL_NOT_FOUND.
            MeshError: INTERNAL if the answer is malformed.
        """
        body = pb.ModelMetadataRequest(name=model, version=version).SerializeToString()
        reply = await self._channel.unary(MODEL_METADATA, (body,), deadline=deadline)
        return decode_metadata(_whole(reply.body))

    async def is_ready(self, model: str = "", version: str = "", *, deadline: float | None = None) -> bool:
        """Whether the model ("" = the server) answers requests now.

        Raises:
            CallError: if the node cannot be asked.
        """
        try:
            if not model:
                reply = await self._channel.unary(SERVER_READY, (b"",), deadline=deadline)
                return pb.ServerReadyResponse.FromString(_whole(reply.body)).ready
            body = pb.ModelReadyRequest(name=model, version=version).SerializeToString()
            reply = await self._channel.unary(MODEL_READY, (body,), deadline=deadline)
            return pb.ModelReadyResponse.FromString(_whole(reply.body)).ready
        except DecodeError as error:
            raise MeshError(Code.INTERNAL, "The peer's readiness is malformed.") from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _metadata(context: RequestContext) -> Metadata:
    out = list(_forwarding(context.version, context.tenant)) if context.forwarded else []
    if context.priority:
        out.append((status.PRIORITY, str(context.priority)))
    _add(out, status.IDEMPOTENCY_KEY, context.idempotency_key)
    _add(out, status.TRACE, context.trace)
    return out


@lru_cache(maxsize=256)
def _forwarding(version: str, tenant: str) -> tuple[tuple[str, str], ...]:
    out = [(status.HOP, "1")]
    _add(out, status.VERSION, version)
    _add(out, status.TENANT, tenant)
    return tuple(out)


def _add(out: list[tuple[str, str]], name: str, value: str) -> None:
    if value:
        out.append((name, status.require_metadata_value(name, value)))


def _whole(body: Sequence[bytes]) -> bytes:
    return body[0] if len(body) == 1 else b"".join(body)
