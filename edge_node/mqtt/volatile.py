"""Requests in memory only: what a node without a disk remembers, and what every QoS 0 request gets."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from edge_node.mqtt.admission import Request
from edge_node.mqtt.backlog import UNSTORED
from edge_node.mqtt.idempotency import Known, decide
from edge_node.mqtt.ledger.outbox import reply_message
from edge_node.mqtt.ledger.records import Admission, Outgoing, Reply
from edge_node.mqtt.ledger.requests import Key
from edge_node.mqtt.limits import RequestLimits

ROW_BYTES = 512
"""What an answer costs besides its payload."""


@dataclass(slots=True)
class _Row:
    known: Known
    reply: Reply | None = None
    finished: float = 0.0


class Volatile:
    """The decisions of the ledger, without waiting. The caller bounds what runs; what was answered is bounded here."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._running: dict[Key, _Row] = {}
        self._answered: OrderedDict[Key, _Row] = OrderedDict()
        self._size_bytes = 0

    def knows(self, key: Key) -> bool:
        """Whether a request may have come before."""
        return key in self._running or key in self._answered

    def accept(self, request: Request, *, has_room: bool) -> Admission:
        """Remember a request, or say why not."""
        key = (request.tenant, request.device, request.correlation)
        row = self._running.get(key) or self._answered.get(key)
        verdict = decide(None if row is None else row.known, request.digest, has_room=has_room)
        if verdict == "accept":
            self._running[key] = _Row(Known(request.digest, "pending"))
        elif verdict == "replay":
            assert row is not None
            assert row.reply is not None
            reply = msgspec.structs.replace(row.reply, topic=request.reply_topic, expires=request.deadline)
            replay = Outgoing(UNSTORED, reply_message(reply, dedup=True), reply.expires, size_bytes=len(reply.payload))
            return Admission(verdict, UNSTORED, replay)
        return Admission(verdict, UNSTORED)

    def forget(self, key: Key) -> None:
        """The request was refused after all; the same one may come again."""
        self._running.pop(key, None)

    def finish(self, request: Request, reply: Reply, now: float) -> tuple[Outgoing, ...]:
        """Remember the answer; returns the order to send it."""
        key = (request.tenant, request.device, request.correlation)
        self._running.pop(key, None)
        self._answered[key] = _Row(Known(request.digest, "done"), reply, now)
        self._size_bytes += len(reply.payload) + ROW_BYTES
        self._forget(now)
        return (Outgoing(UNSTORED, reply_message(reply, dedup=False), reply.expires, size_bytes=len(reply.payload)),)

    def _forget(self, now: float) -> None:
        limits, answered = self._limits, self._answered
        while answered:
            key, oldest = next(iter(answered.items()))
            is_young = now - oldest.finished <= limits.memory_replies_age_max_s
            fits = self._size_bytes <= limits.memory_replies_bytes_max
            if is_young and fits:
                return
            assert oldest.reply is not None
            self._size_bytes -= len(oldest.reply.payload) + ROW_BYTES
            del answered[key]
