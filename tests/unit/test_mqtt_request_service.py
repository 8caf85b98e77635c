"""Requests whose copies, storage or execution fail: each message is acknowledged once it is safe, and not before."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from edge_node.mqtt.ledger.records import Admission, Outgoing, Reply
from edge_node.mqtt.limits import MessageLimits, RequestLimits
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.requests import RequestService
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.message import Message

FULL = MeshError(Code.UNAVAILABLE, "The disk is full.")


class Executor:
    """Answers when `gate` opens."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.runs = 0

    async def close(self):
        pass

    async def answer(self, request, payload):
        self.runs += 1
        await self.gate.wait()
        if payload == b"bug":
            raise RuntimeError("a bug")
        return Reply(topic=request.reply_topic, correlation=request.correlation, user={"status": "200"}, expires=1e9)


class Publisher:
    """Keeps what it is to send, with whom to tell."""

    def __init__(self):
        self.sent = []

    def send(self, outgoing, handed=None):
        self.sent.append((outgoing.message, handed))

    def notify(self, message, expires, handed=None):
        self.sent.append((message, handed))


class Ledger:
    """A disk that is full `failures` times."""

    def __init__(self, failures=0):
        self.failures = failures
        self.begun = 0
        self.expected = set()
        self.finished = []

    def knows(self, key):
        return key in self.expected

    def expect(self, key):
        self.expected.add(key)

    def forget(self, key):
        self.expected.discard(key)

    def doubt(self, key):
        self.expected.discard(key)

    def accept(self, request, payload, *, has_room=True, attempts=0):
        return self._resolved(Admission("accept", 1))

    def begin(self, row):
        self.begun += 1
        return self._stored(None)

    def answer(self, request, reply, now):
        return self._stored((Admission("accept", 1), ()))

    def finish(self, row, reply, now, *, buried=""):
        return self._stored((Outgoing(row, Message(topic=reply.topic), 0.0),))

    def _stored(self, value):
        if self.failures:
            self.failures -= 1
            return self._resolved(FULL)
        self.finished.append(value)
        return self._resolved(value)

    def _resolved(self, value):
        future = asyncio.get_running_loop().create_future()
        future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
        return future


def serve(ledger=None, *, durable, **limits):
    executor, publisher = Executor(), Publisher()
    service = RequestService(
        ledger or Ledger(),
        executor,
        publisher,
        limits=RequestLimits(**limits),
        messages=MessageLimits(),
        clock=SYSTEM_CLOCK,
        metrics=MqttMetrics(),
        durable=durable,
    )
    return service, executor, publisher


def ask(payload=b"x", *, dup=False):
    return Message(topic="nc/v1/local/d1/up/infer/m", payload=payload, correlation=b"1", mid=1, dup=dup)


async def test_without_durability_no_copy_is_acknowledged_before_the_answer_left():
    service, executor, publisher = serve(durable=False)
    acknowledged = []
    service.receive(ask(), lambda: acknowledged.append("first"))
    await asyncio.sleep(0)
    service.receive(ask(dup=True), lambda: acknowledged.append("again"))  # the broker sent it over a new connection
    await asyncio.sleep(0)
    assert acknowledged == []
    executor.gate.set()
    await service.settled()
    ((message, handed),) = publisher.sent
    assert (message.user["status"], acknowledged) == ("200", [])
    handed()
    assert (acknowledged, executor.runs) == (["first", "again"], 1)


async def test_an_accepted_request_outlasts_a_disk_that_is_full(monkeypatch):
    monkeypatch.setattr("edge_node.mqtt.requests.STORE_RETRY_S", 0.0)
    ledger = Ledger(failures=20)
    service, executor, publisher = serve(ledger, durable=True, hold_ms=0.0)
    service.receive(ask(), list)
    await asyncio.sleep(0.005)  # its acceptance is stored
    executor.gate.set()
    await service.settled()
    assert ([message.topic for message, _ in publisher.sent], ledger.failures) == (["nc/v1/local/d1/down/reply/m"], 0)


@pytest.mark.parametrize("durable", [True, False])
async def test_what_fails_unexpectedly_is_answered_and_does_not_hold_the_window(durable):
    service, executor, publisher = serve(durable=durable, hold_ms=10_000.0)
    acknowledged = []
    service.receive(ask(b"bug"), lambda: acknowledged.append(1))
    executor.gate.set()
    await service.settled()
    ((message, handed),) = publisher.sent
    handed()
    assert (message.user["status"], acknowledged) == ("500", [1])
    service.receive(ask(b"bug"), list)  # nothing remembers it as one that runs
    await service.settled()
    assert executor.runs == 2


async def test_after_a_crash_nothing_runs_that_is_not_stored_as_long_as_copies_may_come_unmarked():
    """The request that ended the node comes again, and some brokers do not say so."""
    ledger = Ledger()
    service, executor, _ = serve(ledger, durable=True)
    executor.gate.set()
    service.recover([], crashed=True)
    for number, (dup, begun) in enumerate([(False, 1), (False, 2), (True, 3), (False, 3), (True, 4)]):
        copy = msgspec.structs.replace(ask(dup=dup), correlation=b"%d" % number)
        service.receive(copy, list)
        await service.settled()
        assert (ledger.begun, executor.runs) == (begun, number + 1)
