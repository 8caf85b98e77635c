"""One request as a device would send it, for the command line and for checks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferRequest, Served
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings, parse_url
from nearcast.transport.mqtt.message import Message
from nearcast.wire.response import WireResponse

CONTENT_TYPE = "application/x-protobuf"


async def ask(url: str, request: InferRequest, *, deadline_ms: float) -> tuple[WireResponse, Mapping[str, str]]:
    """Send `request` over the broker at `mqtt://host:port/tenant/device` and wait for the answer.

    Returns:
        The answer, and the user properties that came with it.

    Raises:
        MeshError: what the mesh answered, UNAVAILABLE without a broker, DEADLINE without an answer.
    """
    host, port, path = parse_url(url)
    tenant, _, device = path.partition("/")
    tenant, device = tenant or "local", device or f"cli-{secrets.token_hex(4)}"
    topic = topics.request_topic(tenant, device, request.model, request.version)
    reply_topic = topics.reply_topic(tenant, device, f"cli-{secrets.token_hex(4)}")
    correlation = secrets.token_bytes(16)
    answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def receive(message: Message) -> None:
        connection.acknowledge(message)
        if message.correlation == correlation and not answer.done():
            answer.set_result(message)

    def lost(reason: str) -> None:
        if not answer.done():
            answer.set_exception(MeshError(Code.UNAVAILABLE, reason, sent=True))

    settings = ConnectionSettings(host=host, port=port, client_id=f"nearcast-cli-{secrets.token_hex(8)}")
    connection = Connection(settings, on_message=receive, on_lost=lost)
    try:
        async with asyncio.timeout(deadline_ms / 1e3):
            await connection.open()
            await connection.subscribe(reply_topic)
            connection.publish(
                Message(
                    topic=topic,
                    payload=request.encode(),
                    content_type=CONTENT_TYPE,
                    correlation=correlation,
                    response_topic=reply_topic,
                    user={"ttl-ms": f"{deadline_ms:g}"},
                )
            )
            message = await answer
    except TimeoutError as error:
        raise MeshError(Code.DEADLINE, f"No answer on {reply_topic} within {deadline_ms:g} ms.", sent=True) from error
    finally:
        await connection.close()
    return _response(message), message.user


def _response(message: Message) -> WireResponse:
    user = message.user
    if user.get("status") == "200":
        return WireResponse(message.payload, Served(node=user.get("served-by", ""), tier=user.get("tier", "")))
    code = user.get("code", "")
    known = Code(code) if code in CATALOGUE else Code.INTERNAL
    retry = user.get("retry-after-ms", "")
    raise MeshError(
        known,
        user.get("status-message", "The answer has no status."),
        retry_after_ms=int(retry) if retry.isascii() and retry.isdigit() else None,
    )
