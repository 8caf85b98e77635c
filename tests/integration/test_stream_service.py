"""Streams over the real ledger: order, state, retries, dead letters, lanes, crashes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import asynccontextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.limits import LedgerLimits, MessageLimits, StreamLimits
from edge_node.mqtt.streams.batches import BATCH_MAX
from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from edge_node.mqtt.streams.metrics import StreamMetrics
from edge_node.mqtt.streams.service import BACKLOG_SHARE, StreamService
from edge_node.mqtt.streams.volatile import VolatileInputs
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Served, TensorSpec
from nearcast.transport.mqtt.message import Message
from nearcast.wire.response import TensorResponse

LIMITS = StreamLimits(retry_base_s=0.002, retry_max_s=0.004)
POISON = -1.0


class Accumulator:
    """`sum` adds up all it has seen, in explicit or hidden state; the answer is the sum so far."""

    def __init__(self, stateful="explicit", version="1"):
        self.stateful = stateful
        self.version = version
        self.failure: MeshError | None = None
        self.fails = 0
        self.gate: asyncio.Event | None = None
        self.order: list[str] = []
        self.sums: dict[str, float] = {}

    async def metadata(self, model, version):
        if self.failure is not None and self.failure.code is Code.MODEL_NOT_FOUND:
            raise self.failure
        state = (TensorSpec("s", "FP64", (1,)),) if self.stateful == "explicit" else ()
        return ModelMetadata(
            name=model,
            versions=(self.version,),
            platform="test",
            inputs=(TensorSpec("x", "FP32", (-1, 2)), *state),
            outputs=(TensorSpec("y", "FP32", (-1, 1)), *(TensorSpec("sN", "FP64", (1,)) for _ in state)),
            properties={"stateful": self.stateful},
        )

    async def infer(self, request, context):
        inputs = request.decode()
        if self.fails:
            self.fails -= 1
            raise self.failure
        if inputs["x"][0, 0] == POISON and self.gate is not None:
            await self.gate.wait()
        self.order.append(context.principal)
        if self.stateful == "hidden":
            key = request.parameters["sequence_id"]
            if not request.parameters["sequence_start"] and key not in self.sums:
                raise MeshError(Code.INVALID_REQUEST, "not started")
            before = 0.0 if request.parameters["sequence_start"] else self.sums[key]
            self.sums[key] = total = before + float(inputs["x"].sum())
            outputs = {}
        else:
            total = float(inputs["s"][0]) + float(inputs["x"].sum())
            outputs = {"sN": np.array([total])}
        outputs["y"] = np.array([[total]], np.float32)
        return TensorResponse(
            model=request.model, version=self.version, outputs=outputs, served=Served(version=self.version)
        )

    async def is_ready(self, model="", version=""):
        return True

    def stream(self, requests, context):
        raise NotImplementedError


class Rows:
    """A model without state: each row is answered with its sum; a negative row fails with all that come along."""

    def __init__(self, outputs=("y",)):
        self.outputs = outputs
        self.runs = []

    async def metadata(self, model, version):
        return ModelMetadata(
            name=model,
            versions=("1",),
            platform="test",
            inputs=(TensorSpec("x", "FP32", (-1, 2)),),
            outputs=tuple(TensorSpec(name, "FP32", (-1, 1)) for name in self.outputs),
        )

    async def infer(self, request, context):
        x = request.decode()["x"]
        if (x < 0).any():
            raise MeshError(Code.INVALID_REQUEST, "negative")
        self.runs.append(len(x))
        sums = {name: x.sum(axis=1, keepdims=True) for name in self.outputs}
        return TensorResponse(model=request.model, version="1", outputs=sums, served=Served(version="1"))

    async def is_ready(self, model="", version=""):
        return True

    def stream(self, requests, context):
        raise NotImplementedError


class Node:
    """One life of a node: the service, its ledger, and what it sent."""

    def __init__(self, handler, ledger, registry, definitions, limits):
        self.events = []
        self.registry = registry
        self.acknowledged = 0
        self.ledger = ledger
        ledger.on_commit(lambda committed: [self._send(outgoing) for outgoing in committed.added])
        metrics = StreamMetrics(registry)
        self.service = StreamService(
            handler,
            handler,
            ledger,
            definitions,
            limits=limits,
            messages=MessageLimits(),
            clock=SYSTEM_CLOCK,
            metrics=metrics,
        )

    def _send(self, outgoing):
        if "/out/" in outgoing.message.topic:
            self.events.append(json.loads(outgoing.message.payload))

    def push(self, x, *, seq=None, boot="b1", device="d1", stream="add"):
        user = {} if seq is None else {"boot-id": boot, "seq": str(seq)}
        payload = np.asarray(x, np.float32).tobytes()
        message = Message(topic=f"nc/v1/local/{device}/up/data/{stream}", payload=payload, user=user)
        self.service.receive(message, self._acknowledge)

    def _acknowledge(self):
        self.acknowledged += 1

    async def until(self, condition, timeout_s=5.0):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels)

    def scores(self, device="d1"):
        return [event["results"][0]["score"] for event in self.events if event["device"] == device]


@asynccontextmanager
async def life(folder, handler, *, limits=LIMITS, crash=False, **fields):
    """A node from its start to its end, or to a moment at which it just stops."""
    definition = StreamDefinition(name="add", model="sum", window=2, **fields)
    ledger = Ledger(folder / "ledger.sqlite", boot="boot", limits=LedgerLimits())
    recovered = await ledger.open(SYSTEM_CLOCK.monotonic())
    node = Node(handler, ledger, CollectorRegistry(), by_name([definition]), limits)
    node.service.recover(recovered.inputs, crashed=recovered.crashed)
    try:
        yield node
    finally:
        if crash:
            node.service._closing = True
            await ledger._commits.close()  # as a crash leaves it: nobody has said goodbye
        else:
            await node.service.close()
            await ledger.close()


async def test_explicit_state_goes_on_where_it_was_after_a_restart(tmp_path):
    handler = Accumulator()
    async with life(tmp_path, handler) as node:
        for seq in range(1, 4):
            node.push([1, seq], seq=seq)
        await node.until(lambda: len(node.events) == 3)
    async with life(tmp_path, handler) as after:
        after.push([1, 4], seq=4)
        after.push([1, 4], seq=4)
        await after.until(lambda: after.acknowledged == 2 and after.events)
    assert node.scores() + after.scores() == [2.0, 5.0, 9.0, 14.0]
    assert after.count("nc_mqtt_inputs_total", verdict="duplicate") == 1
    event = node.events[1]
    assert (event["boot_id"], event["seq"], event["stream"], event["model"]) == ("b1", 2, "add", "sum")
    assert event["version"] == "1"
    assert event["latency_ms"] > 0


async def test_windows_are_cut_across_messages_and_never_across_a_gap_or_a_reboot(tmp_path):
    async with life(tmp_path, Accumulator()) as node:
        node.push([1], seq=1)
        node.push([2, 3, 4, 5], seq=2)  # 1 2 | 3 4 | 5
        node.push([10, 10], seq=4)  # the gap takes the 5
        node.push([7, 7], seq=1, boot="b2")
        await node.until(lambda: len(node.events) == 3)
        assert [[result["score"] for result in event["results"]] for event in node.events] == [[3, 10], [30], [14]]
        assert node.count("nc_mqtt_inputs_lost_total") == 1


async def test_hidden_state_follows_each_stream_and_begins_anew_with_the_host(tmp_path):
    handler = Accumulator("hidden")
    async with life(tmp_path, handler) as node:
        node.push([1, 1, 2, 2])
        node.push([5, 5], device="d2")
        await node.until(lambda: len(node.events) == 2)
        handler.sums.clear()
        node.push([3, 3])
        await node.until(lambda: len(node.events) == 3)
    assert [result["score"] for result in node.events[0]["results"]] == [2, 6]
    assert node.scores("d2") == [10.0]
    assert node.events[2]["results"][0]["score"] == 6.0


async def test_another_version_does_not_inherit_the_state(tmp_path):
    handler = Accumulator()
    async with life(tmp_path, handler) as node:
        node.push([1, 1])
        await node.until(lambda: node.events)
        handler.version = "2"
        node.push([3, 3])
        await node.until(lambda: len(node.events) == 2)
    assert node.scores() == [2.0, 6.0]
    assert [event["version"] for event in node.events] == ["1", "2"]


async def test_a_wish_gives_streams_another_meaning_from_the_next_message_on(tmp_path):
    async with life(tmp_path, Accumulator()) as node:
        node.push([1, 1])
        await node.until(lambda: node.events)
        node.service.redefine(by_name([StreamDefinition(name="add", model="other", window=4)]))
        node.push([1, 2, 3, 4])
        await node.until(lambda: len(node.events) == 2)
        node.service.redefine({})
        node.push([1, 1])
        await node.until(lambda: node.count("nc_mqtt_inputs_total", verdict="unknown") == 1)
    assert [(event["model"], event["results"][0]["score"]) for event in node.events] == [("sum", 2.0), ("other", 10.0)]


async def test_messages_of_a_model_without_state_are_joined_and_a_bad_one_spoils_only_itself(tmp_path):
    handler = Rows()
    async with life(tmp_path, handler) as node:
        for seq in range(1, 21):
            node.push([seq, -1 if seq == 10 else 1, seq, 2], seq=seq)
        await node.until(lambda: node.count("nc_mqtt_inputs_executed_total", outcome="done") == 19)
        assert node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 1
        for seq in range(21, 41):
            node.push([seq, 1, seq, 2], seq=seq)
        await node.until(lambda: node.count("nc_mqtt_inputs_executed_total", outcome="done") == 39)
    assert max(handler.runs) > 2, "a message alone is two windows"
    got = {event["seq"]: [result["score"] for result in event["results"]] for event in node.events}
    assert got == {seq: [seq + 1, seq + 2] for seq in range(1, 41) if seq != 10}
    assert list(got) == sorted(got)


async def test_a_model_whose_answers_are_no_scores_buries_messages_instead_of_holding_them(tmp_path):
    async with life(tmp_path, Rows(outputs=("y", "z"))) as node:
        for seq in range(1, 9):
            node.push([1, 1], seq=seq)
        await node.until(lambda: node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 8)


async def test_events_may_tell_changes_only(tmp_path):
    async with life(tmp_path, Accumulator(), threshold=5.0, emit="change") as node:
        for x in ([1, 1], [1, 1], [1, 1], [1, 1], [-9, 0], [1, 1]):
            node.push(x)
        await node.until(lambda: node.count("nc_mqtt_inputs_executed_total", outcome="done") == 6)
    assert [[result["score"] for result in event["results"]] for event in node.events] == [[6.0], []]


async def test_what_cannot_be_read_is_buried_and_the_stream_goes_on(tmp_path):
    async with life(tmp_path, Accumulator()) as node:
        message = Message(topic="nc/v1/local/d1/up/data/add", payload=b"odd")
        node.service.receive(message, node._acknowledge)
        node.push([1, 1])
        await node.until(lambda: node.events and node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 1)
    assert node.scores() == [2.0]


@pytest.mark.parametrize("code", [Code.MODEL_NOT_FOUND, Code.OVERLOADED])
async def test_a_stream_waits_for_its_model_in_order_and_others_do_not_wait_for_it(tmp_path, code):
    handler = Accumulator()
    handler.failure = MeshError(code, "not now")
    handler.fails = 10**9
    limits = StreamLimits(retry_base_s=0.002, retry_max_s=0.004, in_hand_max=8)
    async with life(tmp_path, handler, limits=limits) as node:
        for seq in range(1, 201):
            node.push([1, 0], seq=seq)
        await node.until(lambda: node.acknowledged == 200)
        await asyncio.sleep(0.05)
        handler.failure, handler.fails = None, 0
        node.push([5, 5], device="d2")
        await node.until(lambda: len(node.events) == 201)
    assert node.scores() == [float(n) for n in range(1, 201)]
    assert node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 0


async def test_a_message_at_which_the_model_breaks_again_and_again_is_buried(tmp_path):
    handler = Accumulator()
    handler.failure, handler.fails = MeshError(Code.INTERNAL, "The model broke."), LIMITS.tries_max
    async with life(tmp_path, handler) as node:
        node.push([1, 1])
        node.push([2, 2])
        await node.until(lambda: node.events)
        assert node.scores() == [4.0]
        assert node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 1


async def test_live_streams_go_before_a_backlog_and_the_backlog_keeps_its_order(tmp_path):
    handler = Accumulator()
    async with life(tmp_path, handler) as node:
        node.service._closing = True  # what is taken stays on disk
        for seq in range(1, 501):
            node.push([1, 0], seq=seq)
        await node.until(lambda: node.acknowledged == 500)
    async with life(tmp_path, handler) as after:
        for seq in range(1, 21):
            after.push([1, 0], seq=seq, device="live")
        await after.until(lambda: len(after.events) == 520)
    assert after.scores("d1") == [float(n) for n in range(1, 501)]
    assert after.scores("live") == [float(n) for n in range(1, 21)]
    last = max(place for place, event in enumerate(after.events) if event["device"] == "live")
    assert last < 20 + 3 * StreamLimits().in_hand_max // BACKLOG_SHARE, (
        "live messages wait for what is in hand already, not for the backlog"
    )


async def test_a_message_that_ends_the_node_is_buried_after_three_crashes(tmp_path):
    handler = Accumulator()
    crashes = 0
    async with life(tmp_path, handler, crash=True) as node:
        handler.gate = asyncio.Event()
        for seq, x in enumerate([1.0, 2.0, POISON, 3.0], start=1):
            node.push([x, 0], seq=seq)
        node.push([7, 0], seq=1, device="innocent")
        await node.until(lambda: node.acknowledged == 5)
        crashes += 1
    for _ in range(5):
        async with life(tmp_path, handler, crash=True) as node:
            await asyncio.sleep(0.05)
            if 6.0 in node.scores():
                break
            crashes += 1
    assert crashes == 3
    assert node.count("nc_mqtt_inputs_executed_total", outcome="buried") == 1


async def test_without_a_disk_the_broker_keeps_a_message_until_its_event_is_on_its_way(tmp_path):
    sent, acknowledged = [], []
    store = VolatileInputs(lambda outgoing, handed: sent.append((outgoing, handed)), LIMITS)
    definitions = by_name([StreamDefinition(name="add", model="sum", window=2)])
    handler = Accumulator()
    service = StreamService(
        handler,
        handler,
        store,
        definitions,
        limits=LIMITS,
        messages=MessageLimits(),
        clock=SYSTEM_CLOCK,
        metrics=StreamMetrics(CollectorRegistry()),
        hold=store.hold,
    )

    def push(seq):
        payload = np.array([seq, 0], np.float32).tobytes()
        message = Message(topic="nc/v1/local/d1/up/data/add", payload=payload, user={"boot-id": "b", "seq": str(seq)})
        service.receive(message, lambda seq=seq: acknowledged.append(seq))

    async def until_sent(count):
        async with asyncio.timeout(5):
            while len(sent) < count:
                await asyncio.sleep(0)

    push(1)
    push(2)
    push(2)
    await until_sent(2)
    assert acknowledged == [], "no connection has an event yet"
    sent.clear()  # as a lost connection does
    push(1)
    push(2)
    await until_sent(2)
    for _, handed in sent:
        handed()
    assert acknowledged == [1, 2]
    assert [json.loads(out.message.payload)["results"][0]["score"] for out, _ in sent] == [1.0, 3.0]
    push(2)
    await asyncio.sleep(0)
    assert acknowledged == [1, 2, 2], "a duplicate of what is over"
    assert len(handler.order) == 2, "what the broker sent again was not executed again"
    await service.close()


def test_a_batch_fits_into_what_may_be_in_hand():
    assert StreamLimits().in_hand_max >= 2 * BATCH_MAX
    assert StreamLimits().in_hand_max >= 2 * BACKLOG_SHARE, "a backlog of several messages makes a batch"


async def test_a_message_that_could_not_be_stored_is_not_overtaken(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_node.mqtt.streams.intake.STORE_RETRY_S", 0.01)
    async with life(tmp_path, Accumulator()) as node:
        take, failures = node.ledger._streams.take, iter([True, True, False, True])

        def sometimes(*arguments, **options):
            if next(failures, False):
                raise sqlite3.OperationalError("database or disk is full")
            return take(*arguments, **options)

        monkeypatch.setattr(node.ledger._streams, "take", sometimes)
        for seq in range(1, 9):
            node.push([seq, 0], seq=seq)
            await asyncio.sleep(0.002)
        await node.until(lambda: len(node.events) == 8)
        assert [event["seq"] for event in node.events] == list(range(1, 9))
        assert (node.acknowledged, node.count("nc_mqtt_inputs_lost_total")) == (8, 0)


async def test_a_message_that_can_never_be_stored_is_counted_and_acknowledged(tmp_path, monkeypatch):
    async with life(tmp_path, Accumulator()) as node:
        monkeypatch.setattr(node.ledger._streams, "take", lambda *_, **__: 1 / 0)
        node.push([1, 0], seq=1)
        await node.until(lambda: node.acknowledged)
        assert node.count("nc_mqtt_inputs_total", verdict="failed") == 1
