"""What the trailers of a passed answer say, and which of them go on: bytes in, bytes out, the usual ones untouched."""

from __future__ import annotations

from functools import lru_cache

from nearcast.handler import Served
from nearcast.transport.ngh2_headers import OK
from nearcast.transport.seam import Fields
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
_USUAL = (OK[0], _SERVED_BY, _TIER, _VERSION, _QUEUE_US, _COMPUTE_US, _LOAD)
"""The trailers of a mesh node in their order (`served_to_fields`): recognised, they go on as they are."""
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
    if len(trailers) == len(_USUAL):
        queue, compute, load = trailers[4], trailers[5], trailers[6]
        names = _read_names(tuple(trailers[:4]))
        if names and queue[0] == _QUEUE_US and compute[0] == _COMPUTE_US and load[0] == _LOAD:
            served = Served(
                node=names[0],
                tier=names[1],
                version=names[2],
                queue_us=_counter(queue[1]),
                compute_us=_counter(compute[1]),
                in_flight=_in_flight(load[1]),
                load=_load(load[1]) if b"," in load[1] else "",
            )
            return served, trailers
    return _read_any(trailers, node, version)


@lru_cache(maxsize=256)
def _read_names(head: Fields) -> tuple[str, ...]:
    """Who answered, from the trailers that say the same each time; empty if they are not those."""
    if tuple(name for name, _ in head) != _USUAL[:4] or not head[1][1]:
        return ()
    return tuple(_text(value) for _, value in head[1:])


def _read_any(trailers: Fields, node: str, version: str) -> tuple[Served, Fields]:
    found = dict(trailers)
    if not found.get(_SERVED_BY):
        served = Served(node=node, version=version, load=_load(found.get(_LOAD, b"")))
        return served, (OK, *status.served_to_fields(served))
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
        load=_load(get(_LOAD, b"")),
    )
    return served, [field for field in trailers if field[0] in _PASSED and len(field[1]) <= _VALUE_SIZE_BYTES_MAX]


@lru_cache(maxsize=1024)
def _text(value: bytes) -> str:
    return status.decode_message(value.decode("latin-1"))


def _load(value: bytes) -> str:
    return status.read_load_text(value.decode("latin-1"))


@lru_cache(maxsize=1024)
def _in_flight(value: bytes) -> int:
    return status.served_from_trailers(((status.LOAD, value.decode("latin-1")),)).in_flight


@lru_cache(maxsize=4096)
def _counter(value: bytes) -> int:
    return min(int(value), status.COUNTER_MAX) if value.isdigit() and len(value) <= 16 else 0
