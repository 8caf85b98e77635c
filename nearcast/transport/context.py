"""What surrounds a request, read from metadata or headers. Both gRPC and REST come through here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import Parameter, RequestContext
from nearcast.identity.name import parse_uri
from nearcast.wire import status

FORWARDING_ROLES = frozenset({"edge", "cloud", "router"})
"""Whose word `nc-hop` is: nodes that route."""


class ContextLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what a client may say about its request."""

    idempotency_key_chars_max: int = 256
    tenant_chars_max: int = 64
    priority_max: int = 2**31 - 1


LIMITS = ContextLimits()
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def read_context(
    metadata: Mapping[str, str],
    parameters: Mapping[str, Parameter],
    *,
    deadline: float | None,
    identity: str,
    trusted: bool,
    clock: Clock,
) -> RequestContext:
    """The context of one incoming request.

    Args:
        metadata: lower-case names to values.
        parameters: of the request; `timeout` (microseconds) shrinks the deadline, `priority` is the schedule policy's.
        deadline: monotonic instant that the transport says.
        identity: URI of the peer's certificate; "" without one.
        trusted: whether this is a mesh listener, where nodes may say what they decided. Elsewhere that is dropped.
        clock: for `timeout`.

    Raises:
        MeshError: INVALID_REQUEST for values out of bounds; UNAUTHENTICATED or FORBIDDEN if a mesh listener's peer is
            no mesh node.
    """
    if not (metadata or parameters or trusted):
        return RequestContext(deadline=deadline, principal=identity)
    key, trace = metadata.get(status.IDEMPOTENCY_KEY, ""), metadata.get(status.TRACE, "")
    if len(key) > LIMITS.idempotency_key_chars_max:
        most = LIMITS.idempotency_key_chars_max
        raise MeshError(Code.INVALID_REQUEST, f"The idempotency key is longer than {most} characters.")
    forwarded, version, tenant = _forwarding(metadata, identity) if trusted else (False, "", "")
    return RequestContext(
        deadline=_deadline(deadline, parameters.get("timeout", 0), clock),
        priority=_priority(metadata.get(status.PRIORITY) or parameters.get("priority", 0)),
        tenant=tenant or "local",
        principal=identity,
        idempotency_key=key,
        trace=read_trace(trace) if trace else "",
        forwarded=forwarded,
        version=version,
    )


def read_trace(text: str) -> str:
    """A W3C `traceparent`; "" for what is none."""
    return text if _TRACE.fullmatch(text) else ""


@lru_cache(maxsize=256)
def _may_forward(identity: str) -> bool:
    return parse_uri(identity)[0] in FORWARDING_ROLES


def _forwarding(metadata: Mapping[str, str], identity: str) -> tuple[bool, str, str]:
    if not _may_forward(identity):
        raise MeshError(Code.FORBIDDEN, "This listener answers nodes of the mesh only; use the client listener.")
    tenant = metadata.get(status.TENANT, "")
    if len(tenant) > LIMITS.tenant_chars_max:
        raise MeshError(Code.INVALID_REQUEST, f"The tenant is longer than {LIMITS.tenant_chars_max} characters.")
    if metadata.get(status.HOP, "") != "1":
        return False, "", tenant
    return True, metadata.get(status.VERSION, ""), tenant


def _deadline(deadline: float | None, timeout_us: Parameter, clock: Clock) -> float | None:
    if not timeout_us:
        return deadline
    number = _number("timeout", timeout_us)
    if number <= 0:
        return deadline
    own = clock.monotonic() + number * 1e-6
    return own if deadline is None else min(deadline, own)


def _priority(value: Parameter) -> int:
    return int(min(LIMITS.priority_max, max(0.0, _number("priority", value)))) if value else 0


def _number(name: str, value: Parameter) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise MeshError(Code.INVALID_REQUEST, f"The value of {name} must be a number.")
    return number
