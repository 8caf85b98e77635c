"""What everybody saw while requests and faults went on: one list of events in the order of one clock.

The instants are CLOCK_MONOTONIC, which all processes of a machine share. `body` says what a device must find in a right
answer: it depends on nothing but who asked what, so a wrong delivery shows in the bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

BODY_BYTES = 8
Kind: TypeAlias = Literal[
    "asked",  # a device sends a request for the first time
    "again",  # … and once more, the same one
    "accepted",  # the node's PUBACK of a request, on the wire
    "ran",  # the model begins to run it
    "replied",  # the node's PUBLISH of an answer, on the wire
    "answered",  # an answer reaches a device
    "sent",  # a device sends a message of a stream
    "kept",  # the broker's PUBACK of it
    "taken",  # the node's PUBACK of it, on the wire
    "event",  # the node's PUBLISH of its result, on the wire
    "buried",  # the node's PUBLISH of a dead letter, on the wire
    "node killed",
    "node ready",
    "broker killed",
    "link cut",
]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that somebody saw.

    Attributes:
        at: monotonic seconds.
        device: whose request or stream it is; for a link, whose link.
        key: the correlation in hex, or `stream/boot-id/seq`; of a dead letter the model or the stream.
        deadline: of a request that is asked, monotonic seconds. `once`: its device will not send it again by itself.
        status: of an answer. `digest` names its content, `body` is what it says to whom.
        marked: the answer says itself that it may be a repetition.
        life: the process that ran it.
    """

    at: float
    kind: Kind
    device: str = ""
    key: str = ""
    deadline: float = 0.0
    once: bool = False
    status: int = 0
    digest: str = ""
    body: str = ""
    marked: bool = False
    life: int = 0


class History:
    """Collects events; `events` are in the order of time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._owed: set[tuple[str, str]] = set()
        self._paid: set[tuple[str, str]] = set()

    def note(self, kind: Kind, *, device: str = "", key: str = "", deadline: float = 0.0, once: bool = False) -> None:
        """Write down what happens now."""
        self.add(Event(at=time.monotonic(), kind=kind, device=device, key=key, deadline=deadline, once=once))

    def add(self, *events: Event) -> None:
        """Take in what somebody else wrote down."""
        self._events += events
        for event in events:
            one = {(event.device, event.key)}
            if event.kind in ("replied", "event"):
                self._paid |= one
                self._owed -= one
            elif event.kind in ("accepted", "taken"):
                self._owed |= one - self._paid

    def events(self) -> Sequence[Event]:
        """All of them, sorted."""
        return sorted(self._events, key=lambda event: event.at)

    @property
    def is_owed(self) -> bool:
        """Whether the node has acknowledged something and not answered it yet."""
        return bool(self._owed)


def body_of(device: str, key: str) -> bytes:
    """The first bytes of a request, which come back in its answer: nobody else's request has the same."""
    return hashlib.sha256(f"{device}/{key}".encode()).digest()[:BODY_BYTES]


def digest_of(payload: bytes, content_type: str, user: Iterable[tuple[str, str]]) -> str:
    """Names what an answer says. The mark of a repetition is no part of it."""
    state = hashlib.sha256(payload)
    for name, value in [("content-type", content_type), *sorted(user)]:
        if name != "dedup":
            state.update(f"\0{name}\0{value}".encode())
    return state.hexdigest()[:16]


def save(events: Iterable[Event], path: Path) -> None:
    """One JSON object a line."""
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def load(path: Path) -> list[Event]:
    """What `save` wrote."""
    return [msgspec.json.decode(line, type=Event) for line in path.read_bytes().splitlines()]
