"""Packets out of bytes: however they are cut, and whatever they contain."""

from __future__ import annotations

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.transport.mqtt.framing import FramingError, PacketReader, Unreadable

# The codec's own way to say that text is not UTF-8; it then panics, and that is what is handled.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
BYTES_MAX = 4096


def publish(mid: int, payload: bytes = b"", topic: str = "t") -> bytes:
    qos = mqtt5.QoS.AT_LEAST_ONCE if mid else mqtt5.QoS.AT_MOST_ONCE
    return mqtt5.PublishPacket(topic, payload, qos=qos, packet_id=mid or None).write()


def spoilt(mid: int) -> bytes:
    """A PUBLISH with a property that does not exist."""
    whole = bytearray(
        mqtt5.PublishPacket("t", b"", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=mid, content_type="x").write()
    )
    whole[-4] = 0x7F
    return bytes(whole)


@given(
    st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=300)), max_size=20),
    st.lists(st.integers(1, 400), min_size=1, max_size=50),
)
def test_where_the_bytes_are_cut_does_not_matter(messages, sizes):
    data = b"".join(publish(mid, payload) for mid, payload in messages)
    reader, seen, begin = PacketReader(BYTES_MAX), [], 0
    for size in [*sizes, len(data)]:
        seen += list(reader.feed(data[begin : begin + size]))
        begin += size
    assert [(packet.packet_id or 0, packet.payload) for packet in seen] == messages


@given(st.binary(max_size=200), st.integers(0, 200))
def test_bytes_of_any_kind_are_read_or_refused(data, cut):
    reader = PacketReader(BYTES_MAX)
    try:
        for part in (data[:cut], data[cut:]):
            list(reader.feed(part))
    except FramingError:
        pass


def test_a_message_that_makes_no_sense_is_named_and_the_next_is_read():
    first, bad, last = PacketReader(BYTES_MAX).feed(publish(1) + spoilt(7) + publish(2))
    assert (first.packet_id, last.packet_id) == (1, 2)
    assert isinstance(bad, Unreadable)
    assert bad.mid == 7


def test_text_that_is_no_utf8_is_a_message_that_makes_no_sense():
    data = publish(9, topic="ab").replace(b"ab", b"\xff\xfe")
    (bad,) = PacketReader(BYTES_MAX).feed(data)
    assert bad == Unreadable(9, "text is not UTF-8")


@pytest.mark.parametrize(
    "data",
    [
        publish(1, b"x" * BYTES_MAX)[:5],
        b"\x30\xff\xff\xff\xff\x01",
        b"\xf0\x01\x00",
        b"\x36\x06\x00\x01t\x00\x01\x00"[:8],
        b"\x32\x03\x00\x09t",
        b"\x40\x03\x00\x01\x55",
    ],
    ids=[
        "too large, told by its header",
        "a length without end",
        "no such packet",
        "QoS 3",
        "no identifier",
        "no reason",
    ],
)
def test_what_cannot_be_followed_ends_the_connection(data):
    reader = PacketReader(BYTES_MAX)
    with pytest.raises(FramingError):
        list(reader.feed(data))
