"""Reads what passes between a node and its broker: what it acknowledged, and what it published."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import mqtt5
import msgspec

from benchmarks.chaos_history import BODY_BYTES, Event, History, digest_of
from benchmarks.chaos_proxy import Session

PUBLISH, PUBACK, SUBACK = 3, 4, 9
REFUSED = 0x80
Moment: TypeAlias = Literal["delivered", "accepted", "replied", "confirmed"]
"""When a trap may close: a request goes to the node, its PUBACK comes, its answer comes, the PUBACK of that goes."""
MOMENTS: tuple[Moment, ...] = ("delivered", "accepted", "replied", "confirmed")


class _Score(msgspec.Struct):
    score: float


class _Result(msgspec.Struct):
    """What of a result event says which message of a stream it belongs to, and what the model said."""

    id: str
    boot_id: str = ""
    seq: int | None = None
    results: tuple[_Score, ...] = ()


class NodeWire:
    """Watches the node's link and writes down what it sees.

    Attributes:
        trap: called once at its moment, before the frame is passed on.
        is_ready: the node has subscribed; whoever kills somebody clears it.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.trap: tuple[Moment, Callable[[], None]] | None = None
        self.is_ready = False

    def watch(self, session: Session, is_client: bool, frame: bytes) -> bytes:
        """One frame; it is passed on as it is."""
        kind = frame[0] >> 4
        if kind == PUBLISH:
            packet = read_publish(frame)
            if is_client:
                self._published(packet)
            elif packet.packet_id is not None:
                self._delivered(session, packet)
        elif kind == PUBACK:
            if is_client:
                self._acknowledged(session, read_puback(frame))
            else:
                self._close_trap("confirmed")
        elif kind == SUBACK and not is_client:
            self.is_ready = True
            self.history.note("node ready")
        return frame

    def _delivered(self, session: Session, packet: mqtt5.PublishPacket) -> None:
        session.mids[False, packet.packet_id or 0] = request_of(packet)
        self._close_trap("delivered")

    def _acknowledged(self, session: Session, packet: mqtt5.PubAckPacket) -> None:
        found = session.mids.pop((False, packet.packet_id), None)
        if not isinstance(found, tuple) or packet.reason_code.value >= REFUSED:
            return
        channel, device, key = found
        self.history.note("accepted" if channel == "infer" else "taken", device=device, key=key)
        self._close_trap("accepted")

    def _published(self, packet: mqtt5.PublishPacket) -> None:
        event = publication_of(packet)
        if event is not None:
            self.history.add(event)
            self._close_trap("replied")

    def _close_trap(self, moment: Moment) -> None:
        if self.trap is not None and self.trap[0] == moment:
            _, close = self.trap
            self.trap = None
            close()


class _Letter(msgspec.Struct):
    """What of a dead letter says whose it was: `name` is the model or the stream."""

    kind: str
    device: str
    name: str


def read_publish(frame: bytes) -> mqtt5.PublishPacket:
    """A frame whose type says PUBLISH."""
    packet, _ = mqtt5.read(memoryview(frame))
    assert isinstance(packet, mqtt5.PublishPacket)
    return packet


def read_puback(frame: bytes) -> mqtt5.PubAckPacket:
    """A frame whose type says PUBACK."""
    packet, _ = mqtt5.read(memoryview(frame))
    assert isinstance(packet, mqtt5.PubAckPacket)
    return packet


def request_of(packet: mqtt5.PublishPacket) -> tuple[str, str, str] | None:
    """`infer` or `data`, device and key of what a device sent; None for anything else."""
    levels = packet.topic.split("/")
    if len(levels) < 7 or levels[4] != "up":
        return None
    if levels[5] == "infer":
        return "infer", levels[3], (packet.correlation_data or b"").hex()
    user = dict(packet.user_properties)
    return "data", levels[3], f"{levels[6]}/{user.get('boot-id', '')}/{user.get('seq', '')}"


def publication_of(packet: mqtt5.PublishPacket) -> Event | None:
    """The event that a node's PUBLISH is; None for its presence and the like."""
    levels, user = packet.topic.split("/"), dict(packet.user_properties)
    now, content_type = time.monotonic(), packet.content_type or ""
    if levels[3] == "dlq" or levels[2] == "dlq":
        letter = msgspec.json.decode(packet.payload, type=_Letter)
        digest = digest_of(packet.payload, content_type, ())
        return Event(at=now, kind="buried", device=letter.device, key=letter.name, body=letter.kind, digest=digest)
    if levels[4:5] == ["down"]:
        return Event(
            at=now,
            kind="replied",
            device=levels[3],
            key=(packet.correlation_data or b"").hex(),
            status=int(user.get("status", "0")),
            digest=digest_of(packet.payload, content_type, user.items()),
            body=packet.payload[:BODY_BYTES].hex(),
            marked=user.get("dedup") == "1",
        )
    if levels[4:5] == ["out"]:
        result = msgspec.json.decode(packet.payload, type=_Result)
        key = f"{levels[5]}/{result.boot_id}/{result.seq}"
        digest = digest_of(packet.payload, content_type, ())
        said = str(round(result.results[0].score)) if result.results else ""
        return Event(at=now, kind="event", device=levels[3], key=key, digest=digest, body=said)
    return None
