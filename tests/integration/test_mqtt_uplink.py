"""The link to a second broker, over real sockets: what it misses waits on disk, and keeps its order."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from edge_node.broker import Broker
from edge_node.config import EdgeConfig, MqttConfig, UpstreamConfig
from edge_node.mqtt.backlog import BacklogLimits
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.letters import list_letters
from edge_node.mqtt.ledger.records import Event, Input
from edge_node.mqtt.limits import LedgerLimits, PublishLimits
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from edge_node.mqtt.uplink import Uplink
from nearcast.backoff import ReconnectLimits
from nearcast.clock import SYSTEM_CLOCK
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings

LIMITS = LedgerLimits(outbox_bytes_max=100_000)
PUBLISH = PublishLimits(
    lanes=BacklogLimits(live_rows_max=4, page_rows_max=8), backlog_window=4, refusals_max=2, refusal_retry_base_s=0.001
)
QUICK = ReconnectLimits(base_s=0.02, max_s=0.05)


class Node:
    """A ledger with its uplink, without a device's side."""

    def __init__(self, folder, port, limits=LIMITS):
        self.ledger = Ledger(folder / "inbox.sqlite", boot="b", limits=limits, links=("upstream",))
        self.metrics = MqttMetrics()
        publisher = Publisher(self.ledger, PUBLISH, SYSTEM_CLOCK, on_drop=self.metrics.dropped, link="upstream")
        settings = ConnectionSettings(host="127.0.0.1", port=port, client_id="node")
        self.uplink = Uplink(settings, publisher, limits=QUICK, metrics=self.metrics)
        self.seq = 0

    async def emit(self, *streams, size=1):
        """An event for each stream, numbered through."""
        for stream in streams:
            self.seq += 1
            item = Input(tenant="local", device="mic", stream=stream, arrived=0.0)
            row = (await self.ledger.take(item, b"")).id
            event = Event(topic=f"nc/v1/local/mic/out/{stream}", payload=b"%*d" % (size, self.seq), ttl_s=60.0)
            await self.ledger.advance(row, SYSTEM_CLOCK.monotonic(), events=[event])


@asynccontextmanager
async def running(folder, port, limits=LIMITS):
    node = Node(folder, port, limits)
    recovered = await node.ledger.open(SYSTEM_CLOCK.monotonic())
    node.uplink.publisher.recover(recovered.outbox["upstream"])
    service = asyncio.create_task(node.uplink.run())
    try:
        yield node
    finally:
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
        await node.ledger.close()


@asynccontextmanager
async def reading(port):
    """What a reader of the upstream broker gets, as (stream, number)."""
    got = []

    def take(message):
        got.append((message.topic.rsplit("/", 1)[1], message.payload))
        connection.acknowledge(message)

    connection = Connection(ConnectionSettings(host="127.0.0.1", port=port, client_id="reader"), on_message=take)
    await connection.open()
    await connection.subscribe("nc/#")
    yield got
    await connection.close()


async def until(condition):
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0.005)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def test_what_an_absent_broker_missed_arrives_in_order_also_after_a_restart(tmp_path):
    port = free_port()
    async with running(tmp_path, port) as node:
        await node.emit(*("ab" * 30))
        assert node.ledger.event_bytes > 60 * 64
        assert node.uplink.publisher.topics_behind == 2
    broker = await Broker.start(tmp_path / "broker", port=port)
    try:
        async with reading(port) as got, running(tmp_path, port) as node:
            node.seq = 60
            await node.emit("a", "c", "b")
            await node.uplink.publisher.settled()
            await until(lambda: len(got) >= 63)
            assert node.ledger.event_bytes == 0
            for stream in "abc":
                numbers = [int(payload) for name, payload in got if name == stream]
                assert numbers == sorted(set(numbers))
            assert node.uplink.publisher.topics_behind == 0
    finally:
        await broker.stop()


async def test_a_link_that_is_cut_again_and_again_loses_nothing_and_keeps_the_order(tmp_path):
    broker = await Broker.start(tmp_path / "broker")
    try:
        async with reading(broker.port) as got, running(tmp_path, broker.port) as node:
            publisher = node.uplink.publisher
            await node.emit(*("abc" * 20))
            for count in (10, 25, 40):
                await until(lambda count=count: len(got) >= count and publisher._connection is not None)
                publisher._connection._transport.abort()
            await node.emit(*("abcd" * 10))
            await publisher.settled()
            for stream in "abcd":
                numbers = list(dict.fromkeys(int(payload) for name, payload in got if name == stream))
                assert numbers == sorted(numbers)
            assert {int(payload) for _, payload in got} == set(range(1, 101))
    finally:
        await broker.stop()


async def test_the_oldest_events_go_when_the_disk_is_full_and_a_dead_letter_tells(tmp_path):
    async with running(tmp_path, free_port()) as node:
        await node.emit(*("a" * 60), size=4000)
        assert node.ledger.event_bytes <= LIMITS.outbox_bytes_max
        await node.ledger.tell_drops(SYSTEM_CLOCK.monotonic())
        (letter,) = list_letters(tmp_path / "inbox.sqlite")
        assert (letter.kind, "outbox_full" in letter.reason) == ("dropped", True)
        kept = (await node.ledger.owed("upstream", 0, 100, 1 << 20)).rows
        numbers = [int(row.message.payload) for row in kept if row.message.topic.endswith("/a")]
        assert numbers == list(range(61 - len(numbers), 61))
    async with running(tmp_path, free_port(), LedgerLimits(outbox_bytes_max=100_000, when_full="reject")) as node:
        before = (await node.ledger.owed("upstream", 0, 100, 1 << 20)).rows
        await node.emit(*("a" * 60), size=4000)
        after = (await node.ledger.owed("upstream", 0, 100, 1 << 20)).rows
        assert [row.id for row in after[: len(before)]] == [row.id for row in before]
        assert node.ledger.event_bytes <= 100_000


async def test_an_event_that_a_broker_never_takes_becomes_a_dead_letter_that_can_be_sent_again(tmp_path):
    broker = await Broker.start(tmp_path / "broker")
    try:
        async with running(tmp_path, broker.port) as node:
            await until(lambda: node.uplink.publisher._connection is not None)
            publisher = node.uplink.publisher
            taken, publisher.confirmed = publisher.confirmed, lambda mid, taken: None
            await node.emit("a")
            for _ in range(2):  # Mosquitto refuses no publisher that it lets in: the refusals are said for it
                await until(lambda: publisher._in_flight)
                taken(next(iter(publisher._in_flight)), taken=False)
            await until(lambda: list_letters(tmp_path / "inbox.sqlite"))
            publisher.confirmed = taken
            (letter,) = list_letters(tmp_path / "inbox.sqlite")
            assert (letter.kind, letter.name, letter.device) == ("outgoing", "upstream", "mic")
    finally:
        await broker.stop()


def test_a_configured_upstream_is_used_for_the_tenants_named():
    from edge_node.devices import upstream_of

    config = EdgeConfig(mqtt=MqttConfig(upstream=UpstreamConfig(url="mqtts://up:1", ca="ca.pem", tenants=("t1",))))
    settings = upstream_of(config, "n1", "t1")
    assert (settings.host, settings.port, settings.client_id, settings.tls.ca.name) == (
        "up",
        1,
        "nearcast-n1-t1-up",
        "ca.pem",
    )
    assert upstream_of(config, "n1", "local") is None
    with pytest.raises(ValueError, match="go together"):
        UpstreamConfig(url="mqtts://up", key="k.pem")
