"""A topic that the broker refuses waits; the others do not wait with it, and its order holds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from edge_node.mqtt.backlog import UNSTORED
from edge_node.mqtt.ledger.records import Committed, Outgoing
from edge_node.mqtt.limits import PublishLimits
from edge_node.mqtt.publisher import Publisher
from nearcast.clock import SYSTEM_CLOCK
from nearcast.transport.mqtt.message import Message

LIMITS = PublishLimits(refusals_max=2, refusal_retry_base_s=0.001, refusal_retry_max_s=30.0)


class Ledger:
    def __init__(self):
        self.refused = []

    def on_commit(self, listener):
        self.commit = listener

    def refuse(self, row, link, reason, now):
        self.refused.append(row)
        return asyncio.get_running_loop().create_future()

    def delivered(self, rows, link):
        return asyncio.get_running_loop().create_future()


def make():
    ledger, sent = Ledger(), []
    publisher = Publisher(ledger, LIMITS, SYSTEM_CLOCK, on_drop=lambda _: None)
    connection = SimpleNamespace(
        publish_window=100, publish=lambda message: sent.append((message.topic, message.payload)) or len(sent)
    )
    publisher.attach(connection)

    def commit(*rows, topic="out/a"):
        expires = SYSTEM_CLOCK.monotonic() + 60
        added = [Outgoing(row, Message(topic=topic, payload=b"%d" % row), expires, is_event=True) for row in rows]
        ledger.commit(Committed(added, frozenset(), {}))

    return publisher, ledger, sent, commit


async def test_what_is_refused_does_not_hold_what_goes_to_others():
    publisher, ledger, sent, commit = make()
    commit(1, 2)
    publisher.confirmed(1, taken=False)
    publisher.confirmed(2, taken=False)
    commit(3)
    commit(4, topic="out/b")
    publisher.send(Outgoing(UNSTORED, Message(topic="down/reply"), SYSTEM_CLOCK.monotonic() + 60))
    assert sent[2:] == [("out/b", b"4"), ("down/reply", b"")]
    async with asyncio.timeout(5):
        while len(sent) < 7:
            await asyncio.sleep(0.001)
    assert sent[4:] == [("out/a", b"1"), ("out/a", b"2"), ("out/a", b"3")]
    assert ledger.refused == []


async def test_behind_a_message_that_was_buried_the_next_of_its_topic_is_offered_once():
    publisher, ledger, sent, commit = make()
    commit(1)
    publisher.confirmed(1, taken=False)
    async with asyncio.timeout(5):
        while len(sent) < 2:
            await asyncio.sleep(0.001)
    publisher.confirmed(2, taken=False)
    assert ledger.refused == [1]
    commit(2, 3)
    publisher.confirmed(3, taken=False)
    publisher.confirmed(4, taken=True)
    assert ledger.refused == [1, 2]
    commit(4)
    publisher.confirmed(5, taken=False)
    assert ledger.refused == [1, 2], "one was taken in between: the next gets its tries"


async def test_what_is_only_in_memory_is_bounded_by_number_and_by_bytes():
    dropped, handed = [], []
    limits = PublishLimits(unstored_max=2, unstored_bytes_max=100)
    publisher = Publisher(Ledger(), limits, SYSTEM_CLOCK, on_drop=dropped.append)
    for number, size_bytes in enumerate((1, 100, 1, 1)):
        answer = Outgoing(UNSTORED, Message(topic="t"), SYSTEM_CLOCK.monotonic() + 60, size_bytes=size_bytes)
        publisher.send(answer, lambda number=number: handed.append(number))
    assert (dropped, handed) == (["crowded", "crowded"], [1, 3])
