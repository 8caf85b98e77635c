"""How errors, deadlines and what happened to a request look in gRPC's headers and trailers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import Served

CODE = "nc-code"
RETRY_AFTER_MS = "nc-retry-after-ms"
SENT = "nc-sent"
HOP = "nc-hop"
VERSION = "nc-version"
TENANT = "nc-tenant"
IDEMPOTENCY_KEY = "nc-idempotency-key"
PRIORITY = "nc-priority"
DEADLINE_MS = "nc-deadline-ms"
"""REST's deadline; gRPC has its own."""
LATEST = "nc-latest"
"""On a stream: only the newest frame counts, one that waits is answered as superseded when the next comes."""
TRACE = "traceparent"
SERVED_BY = "nc-served-by"
TIER = "nc-tier"
MODEL_VERSION = "nc-model-version"
QUEUE_US = "nc-queue-us"
COMPUTE_US = "nc-compute-us"
ESCALATE = "nc-escalate"
"""The answer is uncertain; the value names the larger model that would know better."""
LOAD = "endpoint-load-metrics"
"""Open Request Cost Aggregation's header; ours is its text form."""

TIMEOUT_S_MAX = 99_999_999 * 3600.0
COUNTER_MAX = 2**53
MESSAGE_CHARS_MAX = 2048
"""A longer `grpc-message` is cut: it has to fit the peer's header list beside everything else."""
SERVED_CHARS_MAX = 512
"""So is each longer text of what happened to a request, as it travels: a character may become twelve. Ours are far
shorter, but some come from another server."""

_ErrorT = TypeVar("_ErrorT", bound=MeshError)
_Trailers = tuple[tuple[str, str], ...]
_Fields = tuple[tuple[bytes, bytes], ...]
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_PLAIN = re.compile(r"[\x20-\x24\x26-\x7e]*")
_METADATA_VALUE = re.compile(r"[\x20-\x7e]*")
_LOAD_HEAD = "TEXT named_metrics.nc_in_flight="
_QUEUE_US, _COMPUTE_US, _LOAD, _ESCALATE = (name.encode() for name in (QUEUE_US, COMPUTE_US, LOAD, ESCALATE))
_LOAD_IN_FLIGHT = re.compile(r"(?:^TEXT |[ ,])named_metrics\.nc_in_flight=([0-9]{1,15})(?:\.0*)?(?:$|[ ,])")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_CUT_ESCAPE = re.compile(r"(?:%[C-F].(?:%[89AB].){0,2})?(?:%.?)?$")
"""The end of an encoded text that was cut: what may be part of an escape, or of the escapes of one character."""
# A gRPC status without `nc-code` is another server's. One that the catalogue lacks means "it went wrong there".
_FOREIGN: dict[int, Code] = {entry.grpc: code for code, entry in reversed(CATALOGUE.items())} | {
    6: Code.CONFLICT,
    11: Code.INVALID_REQUEST,
}
_MAY_HAVE_RUN = frozenset({Code.INTERNAL, Code.DEADLINE, Code.CANCELLED})


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A gRPC status as it goes out: `message` is percent-encoded, `trailers` are `nc-*` pairs."""

    code: int
    message: str
    trailers: _Trailers


def encode_message(text: str) -> str:
    """Percent-encode a `grpc-message`: everything outside printable ASCII, and `%` itself (gRPC over HTTP/2)."""
    if len(text) > MESSAGE_CHARS_MAX:
        text = text[: MESSAGE_CHARS_MAX - 1] + "…"
    if _PLAIN.fullmatch(text):
        return text
    data = text.encode("utf-8", "replace")
    return "".join(chr(b) if 0x20 <= b <= 0x7E and b != 0x25 else f"%{b:02X}" for b in data)


def decode_message(text: str) -> str:
    """Undo `encode_message`; what is no valid escape stays as it is."""
    if "%" not in text:
        return text
    data = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), text.encode("utf-8", "replace"))
    return data.decode("utf-8", "replace")


def parse_timeout(text: str) -> float:
    """Seconds of a `grpc-timeout` header such as `250m`.

    Raises:
        MeshError: INVALID_REQUEST if it is not 1 to 8 digits and one of the units H M S m u n.
    """
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise MeshError(
            Code.INVALID_REQUEST, "The grpc-timeout header needs 1 to 8 digits and one unit of H M S m u n."
        )
    return int(match[1]) * _UNITS[match[2]]


def format_timeout(seconds: float) -> str:
    """A `grpc-timeout` that is never longer than `seconds`, in the finest unit that fits 8 digits."""
    if not seconds > 0:
        return "1n"
    nanos = int(min(seconds, TIMEOUT_S_MAX) * 1e9)
    for unit, divisor in (("n", 1), ("u", 10**3), ("m", 10**6), ("S", 10**9), ("M", 60 * 10**9)):
        if nanos // divisor < 10**8:
            return f"{max(1, nanos // divisor)}{unit}"
    return f"{nanos // (3600 * 10**9)}H"


def require_metadata_value(name: str, value: str) -> str:
    """`value`, if it may travel as metadata.

    Raises:
        MeshError: INVALID_REQUEST if it holds anything but printable ASCII, which the peer would answer with a reset.
    """
    if _METADATA_VALUE.fullmatch(value) is None:
        raise MeshError(Code.INVALID_REQUEST, f"The metadata value of {name} may hold printable ASCII characters only.")
    return value


def error_to_status(error: MeshError) -> Status:
    """What a server sends for an error."""
    trailers = [(CODE, str(error.code))]
    if error.retry_after_ms is not None:
        trailers.append((RETRY_AFTER_MS, str(max(0, int(error.retry_after_ms)))))
    if error.sent:
        trailers.append((SENT, "1"))
    return Status(code=CATALOGUE[error.code].grpc, message=encode_message(error.message), trailers=tuple(trailers))


def error_from_status(
    status: int, message: str, trailers: Mapping[str, str] | Iterable[tuple[str, str]], *, kind: type[_ErrorT]
) -> _ErrorT:
    """The error that a peer's status other than OK means.

    Args:
        status: gRPC status number.
        message: the `grpc-message` as received (percent-encoded).
        trailers: the trailing metadata; `nc-code` wins over the number.
        kind: class of the error to make, such as `CallError`.
    """
    found = dict(trailers)
    text = decode_message(message)
    retry_after_ms = _counter(found.get(RETRY_AFTER_MS, ""))
    said = found.get(CODE, "")
    if said in Code.__members__:
        code = Code[said]
        sent = SENT in found or code in _MAY_HAVE_RUN
    else:
        code = _FOREIGN.get(status, Code.INTERNAL)
        # Another server's UNAVAILABLE may come from a proxy that had passed the request on.
        sent = code in _MAY_HAVE_RUN or code is Code.UNAVAILABLE
        if status not in _FOREIGN:
            text = f"The peer answered gRPC status {status}: {text}"
    text = text or f"The peer gave no reason (gRPC status {status})."
    return kind(code, text, retry_after_ms=retry_after_ms, sent=sent)


def served_to_fields(served: Served) -> _Fields:
    """Trailers that tell what happened to an answered request, as they travel: printable, and bounded in size."""
    node, tier, version = _served_by(served.node, served.tier, served.version)
    queue_us = b"%d" % served.queue_us
    compute_us = b"%d" % served.compute_us
    load = b"TEXT named_metrics.nc_in_flight=%d" % served.in_flight
    if served.load:
        load += _encode_short(served.load)
    if not served.escalate:
        return (node, tier, version, (_QUEUE_US, queue_us), (_COMPUTE_US, compute_us), (_LOAD, load))
    escalate = (_ESCALATE, _encode_short(served.escalate))
    return (node, tier, version, (_QUEUE_US, queue_us), (_COMPUTE_US, compute_us), (_LOAD, load), escalate)


def served_to_trailers(served: Served) -> _Trailers:
    """The same as text, for headers of REST and other transports."""
    return tuple((name.decode(), value.decode()) for name, value in served_to_fields(served))


def served_from_trailers(metadata: Mapping[str, str] | Iterable[tuple[str, str]]) -> Served:
    """The opposite of `served_to_trailers`; what is missing or malformed reads as empty or 0."""
    get = dict(metadata).get
    load = get(LOAD, "")
    return Served(
        node=decode_message(get(SERVED_BY, "")),
        tier=decode_message(get(TIER, "")),
        version=decode_message(get(MODEL_VERSION, "")),
        queue_us=_counter(get(QUEUE_US, "")) or 0,
        compute_us=_counter(get(COMPUTE_US, "")) or 0,
        in_flight=_in_flight(load),
        escalate=decode_message(get(ESCALATE, "")),
        load=read_load_text(load),
    )


def read_load_text(header: str) -> str:
    """What a load header says beyond `nc_in_flight`; "" = nothing, as in nearly all of ours."""
    head, comma, rest = header.partition(",")
    if head.startswith(_LOAD_HEAD):
        return comma + rest
    return f",{header[5:]}" if header.startswith("TEXT ") else ""


@lru_cache(maxsize=256)
def _in_flight(load: str) -> int:
    found = _LOAD_IN_FLIGHT.search(load)
    return int(found[1]) if found else 0


@lru_cache(maxsize=256)
def _served_by(node: str, tier: str, version: str) -> _Fields:
    pairs = ((SERVED_BY, node), (TIER, tier), (MODEL_VERSION, version))
    return tuple((name.encode(), _encode_short(value)) for name, value in pairs)


def _encode_short(text: str) -> bytes:
    encoded = encode_message(text[:SERVED_CHARS_MAX])
    if len(encoded) > SERVED_CHARS_MAX:
        encoded = _CUT_ESCAPE.sub("", encoded[:SERVED_CHARS_MAX])
    return encoded.encode()


def _counter(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        return None
    return min(int(text), COUNTER_MAX)
