"""gRPC's use of HTTP/2 header fields: requests, responses and trailers as byte pairs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.seam import CallError, Fields, Metadata
from nearcast.wire import status

RESPONSE: Fields = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OK = (b"grpc-status", b"0")
OK_TRAILERS: Fields = (OK,)
USER_AGENT = b"grpc-python-nearcast/0.1"
# RFC 9113 counts 32 bytes for each field.
FIELD_OVERHEAD_BYTES = 32
# Fields up to this size are remembered in both forms: most calls repeat those of the calls before.
CACHED_FIELD_SIZE_BYTES_MAX = 128

_log = logging.getLogger(__name__)
_CONTENT_TYPE = re.compile(rb"application/grpc(?:\+[a-z0-9.-]+)?(?: *;.*)?")
_NAME = re.compile(r"[0-9a-z_.-]+")
# They belong to HTTP/2 and gRPC; methods see them, if at all, as fields of `Call`.
_PROTOCOL_NAMES = frozenset(
    {
        b":scheme",
        b":authority",
        b"te",
        b"content-type",
        b"content-length",
        b"accept-encoding",
        b"grpc-accept-encoding",
        b"user-agent",
    }
)
# HTTP statuses of proxies in between, by the gRPC project's table "HTTP to gRPC status code mapping".
_FROM_HTTP = {
    b"400": Code.INTERNAL,
    b"401": Code.UNAUTHENTICATED,
    b"403": Code.FORBIDDEN,
    b"404": Code.UNSUPPORTED,
    b"415": Code.UNSUPPORTED,
    b"429": Code.UNAVAILABLE,
    b"502": Code.UNAVAILABLE,
    b"503": Code.UNAVAILABLE,
    b"504": Code.UNAVAILABLE,
}


class RequestHead(msgspec.Struct):
    """What a call's headers say. `problem` is set if the call must be refused."""

    path: str = ""
    timeout_s: float | None = None
    encoding: str = "identity"
    metadata: Mapping[str, str] = ()  # type: ignore[assignment]
    problem: MeshError | None = None
    is_grpc: bool = False
    size_bytes: int = 0


def read_request(fields: Iterable[tuple[bytes, bytes]], *, size_bytes_max: int, count_max: int) -> RequestHead:
    """Read a request's header fields."""
    head = RequestHead()
    metadata: dict[str, str] = {}
    size_bytes = count = 0
    is_post = False
    try:
        for name, value in fields:
            size_bytes += len(name) + len(value)
            count += 1
            if name == b":path":
                head.path = value.decode("latin-1")
            elif name == b":method":
                is_post = value == b"POST"
            elif name in _PROTOCOL_NAMES:
                if name == b"content-type":
                    head.is_grpc = value == b"application/grpc" or _CONTENT_TYPE.fullmatch(value) is not None
            elif name.startswith(b"grpc-"):
                if name == b"grpc-timeout":
                    head.timeout_s = status.parse_timeout(value.decode("latin-1"))
                elif name == b"grpc-encoding":
                    head.encoding = value.decode("latin-1")
            else:
                _add(metadata, name.decode("latin-1"), value.decode("latin-1"))
    except MeshError as error:
        head.problem = error
    head.metadata = metadata
    head.is_grpc = head.is_grpc and is_post
    head.size_bytes = size_bytes + count * FIELD_OVERHEAD_BYTES
    if head.size_bytes > size_bytes_max or count > count_max:
        head.problem = MeshError(
            Code.INVALID_REQUEST, f"The metadata is over the limit of {size_bytes_max} bytes or {count_max} entries."
        )
    return head


def write_request(prefix: Fields, metadata: Metadata, timeout_s: float | None) -> list[tuple[bytes, bytes]]:
    """A call's header fields: `prefix`, the metadata, the deadline if there is one.

    Raises:
        MeshError: INVALID_REQUEST for a name or value that may not travel.
    """
    fields = list(prefix)
    for name, value in metadata:
        field, _ = _wire_field((name, value))
        if field is None:
            status.require_metadata_value(name, value)
            raise MeshError(Code.INVALID_REQUEST, f"{name!r} cannot be used as a metadata name.")
        fields.append(field)
    if timeout_s is not None:
        fields.append((b"grpc-timeout", status.format_timeout(timeout_s).encode()))
    return fields


def request_prefix(method: str, *, authority: str, is_tls: bool) -> Fields:
    """The fields that all calls of one method on one connection share."""
    return (
        (b":method", b"POST"),
        (b":scheme", b"https" if is_tls else b"http"),
        (b":path", method.encode()),
        (b":authority", authority.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", USER_AGENT),
    )


def write_trailers(trailers: Metadata, *, size_bytes_max: int, ready: Fields = ()) -> Fields:
    """Trailers of a call that went well, and behind them what is `ready` to be sent as it is.

    Fields that may not travel, or no longer fit, are left out and logged.
    """
    if not trailers:
        return (OK, *ready)
    fields = list(OK_TRAILERS)
    _append_custom(fields, trailers, size_bytes_max)
    fields += ready
    return fields


def write_error(error: MeshError, *, is_first: bool, size_bytes_max: int) -> Fields:
    """Trailers of a failed call; with the response's fields before them if nothing was sent yet ("trailers-only")."""
    said = status.error_to_status(error)
    fields = list(RESPONSE) if is_first else []
    fields.append((b"grpc-status", str(said.code).encode()))
    fields.append((b"grpc-message", said.message.encode()))
    if error.code is Code.UNSUPPORTED:
        fields.append((b"grpc-accept-encoding", b"identity,gzip"))
    _append_custom(fields, said.trailers, size_bytes_max)
    if isinstance(error, CallError):
        names = {name for name, _ in said.trailers}
        _append_custom(fields, [pair for pair in error.trailers if pair[0] not in names], size_bytes_max)
    return fields


def write_http_error(http_status: int, text: str) -> Fields:
    """The answer to a request that is not gRPC at all: a plain HTTP status and why."""
    return (
        (b":status", str(http_status).encode()),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"3"),
        (b"grpc-message", status.encode_message(text).encode()),
    )


def read_trailers(fields: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, str, list[tuple[str, str]]]:
    """Status number (None if there is none), raw message and custom trailers of a response."""
    number: int | None = None
    message = ""
    trailers: list[tuple[str, str]] = []
    for name, value in fields:
        if name == b"grpc-status":
            number = int(value) if value.isdigit() and len(value) <= 4 else 2
        elif name == b"grpc-message":
            message = value.decode("latin-1")
        else:
            pair = _metadata_pair(name, value)
            if pair is not None:
                trailers.append(pair)
    return number, message, trailers


def response_problem(fields: Fields) -> CallError | None:
    """Why a response's first header fields are no gRPC answer, if they are none."""
    if fields == RESPONSE:
        return None
    found = dict(fields)
    http = found.get(b":status", b"")
    if http != b"200" and b"grpc-status" not in found:
        code = _FROM_HTTP.get(http, Code.INTERNAL)
        return CallError(code, f"The peer answered HTTP status {http.decode('latin-1')} instead of gRPC.", sent=True)
    if not found.get(b"content-type", b"application/grpc").startswith(b"application/grpc"):
        return CallError(Code.INTERNAL, "The peer's answer is no gRPC (wrong content-type).", sent=True)
    return None


def _append_custom(fields: list[tuple[bytes, bytes]], trailers: Metadata, size_bytes_max: int) -> None:
    left_bytes = size_bytes_max
    for name, value in fields:
        left_bytes -= len(name) + len(value) + FIELD_OVERHEAD_BYTES
    for text in trailers:
        field, size_bytes = _wire_field(text)
        left_bytes -= size_bytes
        if field is not None and left_bytes >= 0:
            fields.append(field)
        else:
            _log.warning("left out the trailer %s: it cannot travel or the trailers are too large", text[0][:64])


@lru_cache(maxsize=512)
def _wire_name(name: str) -> bytes | None:
    """A custom metadata name as bytes; None if it may not be one."""
    is_custom = _NAME.fullmatch(name) is not None and not name.startswith("grpc-")
    return name.encode() if is_custom and name.encode() not in _PROTOCOL_NAMES else None


def _encode_field(text: tuple[str, str]) -> tuple[tuple[bytes, bytes] | None, int]:
    """Custom metadata as it travels, None if it may not; and what it adds to the size of a header list."""
    name, value = text
    wire_name = _wire_name(name)
    # The library would send a line feed as it is, and the peer would answer by resetting the call.
    is_clean = value.isascii() and (value.isprintable() or not value)
    field = (wire_name, value.encode()) if wire_name is not None and is_clean else None
    return field, len(name) + len(value) + FIELD_OVERHEAD_BYTES


_encode_field_once = lru_cache(maxsize=4096)(_encode_field)


def _wire_field(text: tuple[str, str]) -> tuple[tuple[bytes, bytes] | None, int]:
    return _encode_field_once(text) if len(text[1]) <= CACHED_FIELD_SIZE_BYTES_MAX else _encode_field(text)


def _decode_field(name: bytes, value: bytes) -> tuple[str, str] | None:
    """A received field as custom metadata; None if it is none."""
    if name.startswith((b":", b"grpc-")) or name in _PROTOCOL_NAMES:
        return None
    return name.decode("latin-1"), value.decode("latin-1")


_decode_field_once = lru_cache(maxsize=1024)(_decode_field)


def _metadata_pair(name: bytes, value: bytes) -> tuple[str, str] | None:
    is_short = len(name) + len(value) <= CACHED_FIELD_SIZE_BYTES_MAX
    return _decode_field_once(name, value) if is_short else _decode_field(name, value)


def _add(metadata: dict[str, str], name: str, value: str) -> None:
    before = metadata.get(name)
    metadata[name] = value if before is None else f"{before},{value}"
