from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.transport.ngh2_framing import frame
from nearcast.transport.ngh2_inbox import WAITING_SIZE_BYTES_MAX, Inbox
from nearcast.transport.seam import Limits

LIMITS = Limits(message_size_bytes_max=100_000, stream_messages_max=4)
SIZES = st.integers(0, 300)


@settings(deadline=None, max_examples=50)
@given(st.lists(SIZES, max_size=12), st.lists(st.integers(1, 500), min_size=1, max_size=5), st.data())
def test_every_message_arrives_in_order_and_every_byte_of_window_is_given_back(
    sizes: list[int], cuts: list[int], data: st.DataObject
) -> None:
    sent = [bytes([index]) * size for index, size in enumerate(sizes)]
    wire = b"".join(b"".join(frame((message,))) for message in sent)
    inbox, taken, given_back, position = Inbox(LIMITS), [], 0, 0
    while position < len(wire) or inbox:
        if position < len(wire) and (not inbox or data.draw(st.booleans())):
            chunk = wire[position : position + cuts[position % len(cuts)]]
            position += len(chunk)
            inbox.put(chunk, is_end=position == len(wire))
        else:
            taken.append(inbox.take())
        given_back += inbox.credit()
    assert taken == sent
    assert given_back + inbox.discard() == len(wire)
    assert inbox.size_bytes == 0


def test_the_window_stays_shut_while_enough_is_waiting() -> None:
    inbox = Inbox(LIMITS)
    for _ in range(LIMITS.stream_messages_max):
        inbox.put(b"".join(frame((b"x",))))
    assert inbox.credit() == 0
    inbox.take()
    assert inbox.credit() == 24
    few = Inbox(LIMITS)
    for _ in range(3):
        few.put(b"".join(frame((bytes(100_000),))))
    assert few.size_bytes > WAITING_SIZE_BYTES_MAX
    assert few.credit() == 0


def test_a_message_larger_than_any_window_comes_in_piece_by_piece() -> None:
    inbox = Inbox(LIMITS)
    wire = b"".join(frame((bytes(100_000),)))
    for start in range(0, len(wire), 1000):
        inbox.put(wire[start : start + 1000])
        assert inbox.credit() > 0
    assert len(inbox) == 1


def test_bad_ends_are_refused() -> None:
    with pytest.raises(MeshError) as caught:
        Inbox(LIMITS).put(b"\0\0\0\0\5ab", is_end=True)
    assert caught.value.code is Code.INVALID_REQUEST
    with pytest.raises(MeshError) as caught:
        Inbox(LIMITS).put(b"\0\xff\0\0\0")
    assert caught.value.code is Code.TOO_LARGE
