"""What the trailers of a passed answer say, and which of them go on: bytes in, bytes out, the usual ones untouched."""

from __future__ import annotations

from functools import lru_cache

from nearcast.handler import Served
from nearcast.transport.ngh2_headers import OK, write_trailers
from nearcast.transport.seam import DEFAULT_LIMITS, Fields
from nearcast.wire import status

_SERVED_BY, _TIER, _VERSION, _QUEUE_US, _COMPUTE_US, _LOAD, _ESCALATE = _NAMES = tuple(
    name.encode()
    for name in (
        status.SERVED_BY,
        status.TIER,
        status.MODEL_VERSION,
        status.QUEUE_US,
        status.COMPUTE_US,
        status.LOAD,
        status.ESCALATE,
    )
)
_PASSED = frozenset((*_NAMES, OK[0]))
_VALUE_SIZE_BYTES_MAX = 512
"""Of one trailer that goes on; ours are far shorter."""


def read_served(trailers: Fields, node: str, version: str) -> tuple[Served, Fields]:
    """What happened to an answered request, and the trailers that its client gets.

    Args:
        trailers: of a mesh node, or of a server that says nothing of itself.
        node: what the target is called here, if it does not say.
        version: that was asked for, if it does not say.
    """
    found = dict(trailers)
    if not found.get(_SERVED_BY):
        served = Served(node=node, version=version)
        return served, write_trailers(
            status.served_to_trailers(served), size_bytes_max=DEFAULT_LIMITS.metadata_size_bytes_max
        )
    get = found.get
    names = _text(get(_SERVED_BY, b"")), _text(get(_TIER, b"")), _text(get(_VERSION, b""))
    served = Served(
        node=names[0],
        tier=names[1],
        version=names[2],
        queue_us=_counter(get(_QUEUE_US, b"")),
        compute_us=_counter(get(_COMPUTE_US, b"")),
        in_flight=_in_flight(get(_LOAD, b"")),
        escalate=_text(get(_ESCALATE, b"")),
    )
    return served, [field for field in trailers if field[0] in _PASSED and len(field[1]) <= _VALUE_SIZE_BYTES_MAX]


@lru_cache(maxsize=1024)
def _text(value: bytes) -> str:
    return status.decode_message(value.decode("latin-1"))


@lru_cache(maxsize=1024)
def _in_flight(value: bytes) -> int:
    return status.served_from_trailers(((status.LOAD, value.decode("latin-1")),)).in_flight


def _counter(value: bytes) -> int:
    return min(int(value), status.COUNTER_MAX) if value.isdigit() and len(value) <= 16 else 0
