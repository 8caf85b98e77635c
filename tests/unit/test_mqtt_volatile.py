"""Requests in memory: the ledger's decisions, within bounds."""

from __future__ import annotations

from edge_node.mqtt.admission import Request
from edge_node.mqtt.ledger.records import Advance, Event, Input, Reply
from edge_node.mqtt.limits import RequestLimits, StreamLimits
from edge_node.mqtt.streams.volatile import VolatileInputs
from edge_node.mqtt.volatile import ROW_BYTES, Volatile


def request(correlation: bytes, digest: bytes = b"d") -> Request:
    return Request(
        tenant="local",
        device="d1",
        model="m",
        correlation=correlation,
        reply_topic=f"nc/v1/local/d1/down/reply/{correlation.decode()}",
        content_type="",
        accept="",
        arrived=0.0,
        deadline=30.0,
        digest=digest,
    )


def reply(payload: bytes = b"y") -> Reply:
    return Reply(topic="t", payload=payload, user={"status": "200"}, expires=30.0)


def key(correlation: bytes) -> tuple[str, str, bytes]:
    return "local", "d1", correlation


def test_a_repeated_request_gets_the_same_answer_marked():
    volatile, first = Volatile(RequestLimits()), request(b"1")
    assert not volatile.knows(key(b"1"))
    assert volatile.accept(first, has_room=True).verdict == "accept"
    assert volatile.accept(first, has_room=True).verdict == "pending"
    (sent,) = volatile.finish(first, reply(), now=1.0)
    again = volatile.accept(first, has_room=False)
    assert again.replay is not None
    assert (sent.message.payload, again.replay.message.payload) == (b"y", b"y")
    assert "dedup" not in sent.message.user
    assert again.replay.message.user["dedup"] == "1"
    assert again.replay.message.topic == first.reply_topic
    assert volatile.accept(request(b"1", b"other"), has_room=True).verdict == "conflict"
    assert volatile.accept(request(b"2"), has_room=False).verdict == "full"


def test_what_was_refused_may_come_again():
    volatile = Volatile(RequestLimits())
    volatile.accept(request(b"1"), has_room=True)
    volatile.forget(key(b"1"))
    assert volatile.accept(request(b"1"), has_room=True).verdict == "accept"


def test_answers_are_bounded_by_bytes_and_by_age():
    volatile = Volatile(RequestLimits(memory_replies_bytes_max=2 * (ROW_BYTES + 100), memory_replies_age_max_s=10.0))
    for number, now in ((b"1", 0.0), (b"2", 1.0), (b"3", 2.0)):
        volatile.accept(request(number), has_room=True)
        volatile.finish(request(number), reply(b"x" * 100), now)
    assert [volatile.knows(key(number)) for number in (b"1", b"2", b"3")] == [False, True, True]
    volatile.accept(request(b"4"), has_room=True)
    volatile.finish(request(b"4"), reply(b""), 11.5)
    assert [volatile.knows(key(number)) for number in (b"2", b"3", b"4")] == [False, True, True]


async def test_each_copy_of_a_stream_s_message_is_acknowledged_with_its_event():
    sent, acknowledged = [], []
    store = VolatileInputs(lambda _outgoing, handed: sent.append(handed), StreamLimits())
    item = Input(tenant="local", device="d1", stream="s", boot="b", seq=1, arrived=0.0)
    row = (await store.take(item, b"")).id
    store.hold(row, lambda: acknowledged.append("first"))
    store.hold((await store.take(item, b"")).id, lambda: acknowledged.append("copy"))
    await store.advance_all([Advance(row, [Event(topic="t", ttl_s=1.0)])], 0.0)
    (handed,) = sent
    assert acknowledged == []
    handed()
    assert acknowledged == ["first", "copy"]


async def test_messages_of_streams_without_a_payload_are_bounded_too():
    store = VolatileInputs(lambda _outgoing, _handed: None, StreamLimits(memory_bytes_max=10_000))
    item = Input(tenant="local", device="d1", stream="s", arrived=0.0)
    verdicts = [(await store.take(item, b"")).verdict for _ in range(12)]
    assert (verdicts[0], verdicts[-1]) == ("accept", "full")
