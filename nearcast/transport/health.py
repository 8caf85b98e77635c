"""The standard health service `grpc.health.v1.Health/Check`, small enough to be read and written by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nearcast.errors import Code, MeshError
from nearcast.transport.seam import Call, Methods, Reply

CHECK_METHOD = "/grpc.health.v1.Health/Check"
_SERVING = Reply((b"\x08\x01",))
_NOT_SERVING = Reply((b"\x08\x02",))
_SERVICE_TAG = 0x0A


def health_methods(is_ready: Callable[[str], Awaitable[bool]]) -> Methods:
    """The health service.

    Args:
        is_ready: takes the service asked for ("" = the server); raises MeshError MODEL_NOT_FOUND for an unknown one.
    """

    async def check(message: bytes, call: Call) -> Reply:  # noqa: ARG001 - the shape of a UnaryMethod
        return _SERVING if await is_ready(_service(message)) else _NOT_SERVING

    return Methods(unary={CHECK_METHOD: check})


def _service(message: bytes) -> str:
    """Field 1 of `HealthCheckRequest`. Its only field, shorter than 128 bytes: a tag, a length, the text."""
    if not message:
        return ""
    if len(message) >= 2 and message[0] == _SERVICE_TAG and message[1] == len(message) - 2 < 128:
        try:
            return message[2:].decode()
        except UnicodeDecodeError:
            pass
    raise MeshError(Code.INVALID_REQUEST, "This is no HealthCheckRequest with a service name below 128 bytes.")
