"""Requests from their message to their answer. With durability `full` an accepted request is a row on disk.

A request that nobody has seen before begins at once, beside the commit that accepts it: most models answer sooner than
a disk, and then one transaction holds acceptance, answer and the order to send it. What takes longer is accepted on its
own after `hold_ms`. The ledger stays the judge: what it knows already is answered with what it knows.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from edge_node.mqtt.admission import Refusal, Request, admit
from edge_node.mqtt.envelope import refusal_message, refusal_of
from edge_node.mqtt.executor import Executor
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.outbox import reply_message
from edge_node.mqtt.ledger.records import NOTICE_EXPIRY_S, Admission, Outgoing, Reply, Unanswered
from edge_node.mqtt.ledger.requests import Key
from edge_node.mqtt.limits import MessageLimits, RequestLimits
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from edge_node.mqtt.volatile import Volatile
from nearcast.clock import Clock
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.telemetry import get_logger
from nearcast.transport import eager
from nearcast.transport.mqtt.message import Message

STORE_RETRY_S = 0.2
CAREFUL_S = 60.0
"""For so long after a crash a request that comes again is a suspect, even if the ledger has never heard of it."""
_COME_AGAIN = frozenset({"429", "503"})
R = TypeVar("R")
_log = get_logger("nearcast.mqtt")


@dataclass(slots=True, eq=False)
class _Item:
    """One request under way. `accepted` is set once its own acceptance has been ordered."""

    request: Request
    payload: bytes
    acknowledge: Callable[[], None]
    accepted: asyncio.Future[Admission] | None = None

    @property
    def key(self) -> Key:
        return self.request.tenant, self.request.device, self.request.correlation


class RequestService:
    """Admits, stores, runs and answers requests.

    Args:
        ledger: what was accepted and answered, on disk.
        executor: runs them.
        publisher: takes the answers.
        durable: False = requests are kept in memory only, and acknowledged when their answer is on its way.
        suspects: held by whatever may have ended the node, of any kind, while it is tried again: alone.
    """

    def __init__(
        self,
        ledger: Ledger,
        executor: Executor,
        publisher: Publisher,
        *,
        limits: RequestLimits,
        messages: MessageLimits,
        clock: Clock,
        metrics: MqttMetrics,
        durable: bool,
        suspects: asyncio.Lock | None = None,
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._publisher = publisher
        self._limits = limits
        self._messages = messages
        self._clock = clock
        self._metrics = metrics
        self._durable = durable
        self._volatile = Volatile(limits)
        self._loop = asyncio.get_running_loop()
        self._pending = 0
        self._pending_bytes = 0
        self._held: dict[Key, _Item] = {}
        self._copies: dict[Key, list[Callable[[], None]]] = {}
        self._is_watching = False
        self._suspects = suspects or asyncio.Lock()
        self._careful_until = 0.0
        self._are_copies_marked = False
        self._running: set[asyncio.Task[None]] = set()
        metrics.watch_pending(lambda: self._pending)

    def recover(self, requests: Sequence[Unanswered], *, crashed: bool) -> None:
        """Finish what a former life had accepted."""
        if crashed:
            self._careful_until = self._clock.monotonic() + CAREFUL_S
        for unanswered in requests:
            self._reserve(len(unanswered.payload))
            self._run(self._resume(unanswered), len(unanswered.payload), None)

    def receive(self, message: Message, acknowledge: Callable[[], None]) -> None:
        """Take in a message on a request topic; `acknowledge` is called once, when the broker may forget it."""
        now = self._clock.monotonic()
        verdict = admit(message, now, self._messages, nonce=b"" if message.correlation else os.urandom(16))
        if isinstance(verdict, Refusal):
            self._refuse(verdict, acknowledge)
            return
        payload = message.payload
        item = _Item(verdict, payload, acknowledge)
        has_room = self._has_room(len(payload))
        work: Coroutine[None, None, None]
        if not self._durable or not message.qos:
            known, work = self._volatile.knows(item.key), self._serve_volatile(item, has_room=has_room)
        elif known := self._ledger.knows(item.key):
            self._release_held(item.key)
            work = self._serve(item, has_room=has_room)
        elif now < self._careful_until and (message.dup or not self._are_copies_marked):
            self._are_copies_marked |= message.dup
            work = self._serve_suspect(item, alone=message.dup)
        else:
            work = self._serve_new(item)
        if not known and not has_room:
            work.close()
            self._refuse_full(item)
            return
        self._reserve(len(payload))
        self._run(work, len(payload), item)

    async def settled(self) -> None:
        """Return once every request that was accepted is answered."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def cancel(self) -> None:
        """End what still runs; what was accepted runs again after the next start."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._executor.close()

    # -- one request --------------------------------------------------------------------------------------------------

    async def _serve_new(self, item: _Item) -> None:
        """A request that the ledger has never seen: it runs at once, and is stored with its answer if that is quick."""
        self._ledger.expect(item.key)
        self._hold(item)
        reply = await self._executor.answer(item.request, item.payload)
        if item.accepted is None:
            del self._held[item.key]
            if _is_refusal(reply):
                self._ledger.forget(item.key)
                self._send_refusal(reply_message(reply, dedup=False), reply.expires, item.acknowledge)
                return
            try:
                admission, outgoing = await self._ledger.answer(item.request, reply, self._now())
            except MeshError as error:
                self._refuse_unstored(item, error)
                return
            item.acknowledge()
            if admission.verdict == "accept":
                self._answered(item.request, reply, outgoing)
            else:
                self._settle(item, admission)
        elif row := await self._accepted(item, item.accepted):
            await self._finish(row, item.request, reply)

    async def _serve(self, item: _Item, *, has_room: bool) -> None:
        """A request that may have come before: the ledger is asked first."""
        item.accepted = self._ledger.accept(item.request, item.payload, has_room=has_room)
        if row := await self._accepted(item, item.accepted):
            await self._finish(row, item.request, await self._executor.answer(item.request, item.payload))

    async def _serve_suspect(self, item: _Item, *, alone: bool) -> None:
        """The node may have crashed over this request before it was stored: next time the ledger must know.

        Where the broker does not mark what it sends again any request may be one: then they are not run alone.
        """
        self._ledger.expect(item.key)
        item.accepted = self._ledger.accept(item.request, item.payload, attempts=1)
        if row := await self._accepted(item, item.accepted):
            async with self._suspects if alone else nullcontext():
                await self._try_suspect(row, item.request, item.payload)

    async def _serve_volatile(self, item: _Item, *, has_room: bool) -> None:
        """Without a disk the broker keeps the request until the answer is on its way."""
        admission = self._volatile.accept(item.request, has_room=has_room)
        if admission.verdict == "pending":
            self._metrics.replayed()
            self._copies[item.key].append(item.acknowledge)
            return
        if admission.verdict != "accept":
            self._settle(item, admission)
            return
        copies = self._copies[item.key] = [item.acknowledge]

        def handed() -> None:
            for acknowledge in copies:
                acknowledge()

        try:
            reply = await self._executor.answer(item.request, item.payload)
        finally:
            del self._copies[item.key]
        if _is_refusal(reply):
            self._volatile.forget(item.key)
            self._send_refusal(reply_message(reply, dedup=False), reply.expires, handed)
            return
        self._answered(item.request, reply, self._volatile.finish(item.request, reply, self._now()), handed)

    async def _accepted(self, item: _Item, accepted: asyncio.Future[Admission]) -> int:
        """Wait for the commit, then acknowledge; returns the row, or 0 if there is nothing to execute."""
        try:
            admission = await accepted
        except MeshError as error:
            self._refuse_unstored(item, error)
            return 0
        item.acknowledge()
        if admission.verdict == "accept":
            return admission.id
        self._settle(item, admission)
        return 0

    def _settle(self, item: _Item, admission: Admission) -> None:
        """A request that came before is not executed again."""
        match admission.verdict:
            case "replay" if admission.replay is not None:
                self._metrics.replayed()
                self._publisher.send(admission.replay, item.acknowledge)
            case "conflict":
                reason = "This correlation belongs to a different request; use a new one for each request."
                self._refuse(self._refusal(item.request, Code.CONFLICT, reason), item.acknowledge)
            case "full":
                self._refuse_full(item)
            case _:
                self._metrics.replayed()
                item.acknowledge()

    async def _finish(self, row: int, request: Request, reply: Reply, *, buried: str = "") -> None:
        outgoing = await _store(lambda: self._ledger.finish(row, reply, self._now(), buried=buried))
        self._answered(request, reply, outgoing)

    def _answered(
        self,
        request: Request,
        reply: Reply,
        outgoing: Sequence[Outgoing],
        handed: Callable[[], None] | None = None,
    ) -> None:
        self._metrics.answered(reply.user["status"], self._now() - request.arrived)
        for each in outgoing:
            self._publisher.send(each, handed)

    async def _resume(self, unanswered: Unanswered) -> None:
        request = unanswered.request
        if not unanswered.same_boot:
            now = self._now()
            request = msgspec.structs.replace(request, arrived=now, deadline=now)
        if unanswered.attempts >= self._limits.attempts_max:
            reason = f"The node crashed {unanswered.attempts} times while it ran this request."
            await self._finish(unanswered.id, request, self._executor.quarantined(request), buried=reason)
        elif unanswered.attempts:
            async with self._suspects:  # one at a time, so that a crash has one culprit
                await self._try_suspect(unanswered.id, request, unanswered.payload)
        else:
            await self._finish(unanswered.id, request, await self._executor.answer(request, unanswered.payload))

    async def _try_suspect(self, row: int, request: Request, payload: bytes) -> None:
        await _store(lambda: self._ledger.begin(row))
        await self._finish(row, request, await self._executor.answer(request, payload))

    # -- held acceptances ---------------------------------------------------------------------------------------------

    def _hold(self, item: _Item) -> None:
        if not self._is_watching:
            self._is_watching = True
            self._loop.call_later(self._limits.hold_ms / 1e3, self._release_old)
        self._held[item.key] = item

    def _release_old(self) -> None:
        limit = self._now() - self._limits.hold_ms / 1e3
        for key, item in list(self._held.items()):
            if item.request.arrived > limit:
                break
            self._release_held(key)
        self._is_watching = bool(self._held)
        if self._is_watching:
            self._loop.call_later(self._limits.hold_ms / 1e3, self._release_old)

    def _release_held(self, key: Key) -> None:
        """Order the acceptance of a request whose model is not quick; an order that follows finds it in the ledger."""
        item = self._held.pop(key, None)
        if item is not None:
            item.accepted = self._ledger.accept(item.request, item.payload)
            item.accepted.add_done_callback(lambda done: _acknowledge_stored(item, done))

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock.monotonic()

    def _has_room(self, size_bytes: int) -> bool:
        limits = self._limits
        return self._pending < limits.pending_max and self._pending_bytes + size_bytes <= limits.pending_bytes_max

    def _reserve(self, size_bytes: int) -> None:
        self._pending += 1
        self._pending_bytes += size_bytes

    def _run(self, work: Coroutine[None, None, None], size_bytes: int, item: _Item | None) -> None:
        """Run as far as it goes without waiting; most volatile requests need no task at all."""
        task = eager.start(self._guard(work, size_bytes, item), self._loop)
        if task is not None:
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _guard(self, work: Coroutine[None, None, None], size_bytes: int, item: _Item | None) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001  # one request must neither end the connection nor stop its window
            _log.exception("a request failed unexpectedly")
            if item is not None:
                self._give_up(item)
        finally:
            self._pending -= 1
            self._pending_bytes -= size_bytes

    def _give_up(self, item: _Item) -> None:
        """Nobody expected this failure. What is stored runs again after a restart; the other is answered."""
        if item.accepted is not None:
            item.acknowledge()
            return
        if self._held.pop(item.key, None) is not None:
            self._ledger.forget(item.key)
        self._volatile.forget(item.key)
        reason = "The node failed on this request; see its log."
        self._refuse(self._refusal(item.request, Code.INTERNAL, reason), item.acknowledge)

    def _refusal(self, request: Request, code: Code, reason: str) -> Refusal:
        later = self._limits.retry_after_ms if code in (Code.OVERLOADED, Code.UNAVAILABLE) else None
        return refusal_of(request, CATALOGUE[code].http, code, reason, retry_after_ms=later)

    def _refuse_unstored(self, item: _Item, error: MeshError) -> None:
        self._ledger.doubt(item.key)
        self._refuse(self._refusal(item.request, error.code, error.message), item.acknowledge)

    def _refuse_full(self, item: _Item) -> None:
        reason = "The node's queue is full; send the same request again later."
        self._refuse(self._refusal(item.request, Code.OVERLOADED, reason), item.acknowledge)

    def _refuse(self, refusal: Refusal, acknowledge: Callable[[], None]) -> None:
        """Answer a message that is no request, or is not accepted."""
        if refusal.topic:
            expires = self._now() + NOTICE_EXPIRY_S
            self._send_refusal(refusal_message(refusal), expires, acknowledge)
        else:
            self._metrics.refused(refusal.status)
            _log.warning("a message on an unknown topic was dropped", reason=refusal.reason)
            acknowledge()

    def _send_refusal(self, message: Message, expires: float, acknowledge: Callable[[], None]) -> None:
        """Nothing is stored. The request is acknowledged when the refusal has left: the broker bounds how many wait."""
        self._metrics.refused(int(message.user["status"]))
        self._publisher.notify(message, expires, acknowledge)


async def _store(order: Callable[[], asyncio.Future[R]]) -> R:
    """Give an order to the ledger until it is carried out: what was accepted waits for a disk that is full.

    Raises:
        MeshError: if the order cannot be carried out at all.
    """
    while True:
        try:
            return await order()
        except MeshError as error:
            if error.code is not Code.UNAVAILABLE:
                raise
        await asyncio.sleep(STORE_RETRY_S)


def _is_refusal(reply: Reply) -> bool:
    """Whether the same request may come again and be answered otherwise: it was no answer, and is not kept as one."""
    return reply.user["status"] in _COME_AGAIN


def _acknowledge_stored(item: _Item, accepted: asyncio.Future[Admission]) -> None:
    """The commit is what the broker waits for, not the model."""
    if not accepted.cancelled() and accepted.exception() is None:
        item.acknowledge()
