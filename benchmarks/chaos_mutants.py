"""Nodes with one mistake each: the same judgement must find every mistake.

Most are made on the node's link: what the broker sees is then what a node with this mistake would have said. Two are
made in the node itself (`chaos_node`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import mqtt5

from benchmarks.chaos_history import History
from benchmarks.chaos_node import FORGETS_LEDGER, RUNS_TWICE
from benchmarks.chaos_proxy import Session
from benchmarks.chaos_wire import PUBACK, PUBLISH, NodeWire, publication_of, read_publish, request_of

LATE_S = 3.2
OTHER = "d0"
EARLY = "acknowledges before the commit"
LATE = "answers late"
Spoil: TypeAlias = Callable[["SpoiledWire", Session, mqtt5.PublishPacket], bytes]
"""What goes to the broker in place of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """What is wrong with one answer in `every` of those that are wanted, and the faults of which one must be found."""

    spoil: Spoil
    found: frozenset[str]
    wants: Callable[[mqtt5.PublishPacket], bool] = lambda _packet: True
    every: int = 3


class SpoiledWire(NodeWire):
    """The link of a node that makes a mistake with some of its answers."""

    def __init__(self, history: History, mistake: Mistake) -> None:
        super().__init__(history)
        self._mistake = mistake
        self._seen = 0
        self.latest: Session | None = None

    def watch(self, session: Session, is_client: bool, frame: bytes) -> bytes:
        self.latest = session
        if is_client and frame[0] >> 4 == PUBLISH:
            packet = read_publish(frame)
            event = publication_of(packet)
            if event is not None and event.kind == "replied" and event.status == 200 and self._mistake.wants(packet):
                self._seen += 1
                if self._seen % self._mistake.every == 0:
                    frame = self._mistake.spoil(self, session, packet)
        return super().watch(session, is_client, frame) if frame else b""


class EarlyWire(NodeWire):
    """The link of a node that acknowledges before it has stored anything."""

    def watch(self, session: Session, is_client: bool, frame: bytes) -> bytes:
        kind = frame[0] >> 4
        if not is_client and kind == PUBLISH:
            packet = read_publish(frame)
            if request_of(packet) is not None and packet.packet_id is not None:
                acknowledgement = mqtt5.PubAckPacket(packet.packet_id).write()
                session.mids[False, packet.packet_id] = request_of(packet)
                super().watch(session, True, acknowledgement)
                write_to_broker(session, acknowledgement)
        elif is_client and kind == PUBACK:
            return b""
        return super().watch(session, is_client, frame)


def write_to_broker(session: Session, data: bytes) -> None:
    """Say something in the node's name."""
    transport = session.broker.transport
    if transport is not None and not transport.is_closing():
        transport.write(data)


def changed(packet: mqtt5.PublishPacket, *, topic: str = "", payload: bytes = b"", is_marked: bool = True) -> bytes:
    """A publication that differs in one thing."""
    user = [pair for pair in packet.user_properties if is_marked or pair[0] != "dedup"]
    return mqtt5.PublishPacket(
        topic or packet.topic,
        payload or packet.payload,
        qos=packet.qos,
        packet_id=packet.packet_id,
        message_expiry_interval=None,
        content_type=packet.content_type,
        correlation_data=packet.correlation_data,
        user_properties=user,
    ).write()


def is_marked(packet: mqtt5.PublishPacket) -> bool:
    """Whether an answer says that it may be a repetition."""
    return ("dedup", "1") in packet.user_properties


def _forget(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    assert session.client.transport is not None
    session.client.transport.write(mqtt5.PubAckPacket(packet.packet_id or 0).write())
    return b""


def _misdirect(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    levels = packet.topic.split("/")
    levels[3] = "d1" if levels[3] == OTHER else OTHER
    return changed(packet, topic="/".join(levels))


def _confuse(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    return changed(packet, payload=bytes(8) + packet.payload[8:])


def _alter(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    return changed(packet, payload=packet.payload[:-1] + bytes([packet.payload[-1] ^ 1]))


def _unmark(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    return changed(packet, is_marked=False)


def _delay(wire: SpoiledWire, session: Session, packet: mqtt5.PublishPacket) -> bytes:
    frame = changed(packet)

    def send() -> None:
        NodeWire.watch(wire, session, True, frame)
        write_to_broker(wire.latest or session, frame)

    asyncio.get_running_loop().call_later(LATE_S, send)
    return b""


def _is_hasty(packet: mqtt5.PublishPacket) -> bool:
    return (packet.message_expiry_interval or 0) <= 1


SPOILED = {
    "forgets an answer before the broker has it": Mistake(spoil=_forget, found=frozenset({"lost", "unanswered"})),
    "answers another device": Mistake(spoil=_misdirect, found=frozenset({"misdelivered"})),
    "answers with another's result": Mistake(spoil=_confuse, found=frozenset({"misdelivered"})),
    "repeats another answer": Mistake(spoil=_alter, found=frozenset({"different"}), wants=is_marked, every=1),
    "does not mark a repetition": Mistake(spoil=_unmark, found=frozenset({"unmarked"}), wants=is_marked, every=1),
    LATE: Mistake(spoil=_delay, found=frozenset({"late"}), wants=_is_hasty, every=1),
}
MUTANTS: dict[str, frozenset[str]] = {
    EARLY: frozenset({"lost"}),
    RUNS_TWICE: frozenset({"rerun"}),
    FORGETS_LEDGER: frozenset({"rerun", "different", "lost"}),
    **{name: mistake.found for name, mistake in SPOILED.items()},
}
"""What is done wrong → the faults of which one must be found."""


def wire_of(wrong: str, history: History) -> NodeWire:
    """The watcher of the node's link: an honest one, or the link of a node that makes this mistake."""
    if wrong == EARLY:
        return EarlyWire(history)
    if wrong in SPOILED:
        return SpoiledWire(history, SPOILED[wrong])
    return NodeWire(history)
