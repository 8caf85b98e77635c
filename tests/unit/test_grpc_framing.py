"""gRPC's message framing and header fields, without sockets."""

from __future__ import annotations

import contextlib
import gzip
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.transport.ngh2_framing import MessageReader, frame, whole_message
from nearcast.transport.ngh2_headers import (
    RequestHead,
    read_request,
    read_trailers,
    request_prefix,
    write_error,
    write_request,
    write_trailers,
)
from nearcast.transport.seam import CallError


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(min_value=0), max_size=12))
def test_any_cutting_gives_the_same_messages(messages: list[bytes], places: list[int]) -> None:
    data = b"".join(piece for message in messages for piece in frame((message,)))
    reader = MessageReader(300)
    found = [message for part in cut(data, places) for message in reader.feed(part)]
    assert found == messages
    assert not reader.is_partial


@given(st.lists(st.binary(max_size=50), max_size=4))
def test_pieces_are_framed_as_one_message(pieces: list[bytes]) -> None:
    data = b"".join(frame(pieces))
    assert data[0] == 0
    assert int.from_bytes(data[1:5], "big") == len(data) - 5
    assert whole_message(data) == b"".join(pieces)


def test_large_pieces_are_passed_on_uncopied() -> None:
    tensor = bytes(1 << 20)
    assert frame((b"head", tensor))[-1] is tensor


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"\0\0\0\0\2a", b"\0\0\0\0\1ab", b"\1\0\0\0\1a"])
def test_anything_but_one_plain_message_takes_the_long_way(data: bytes) -> None:
    assert whole_message(data) is None


def refuse(reader: MessageReader, data: bytes) -> MeshError:
    with pytest.raises(MeshError) as caught:
        reader.feed(data)
    return caught.value


def test_a_large_message_is_refused_by_its_prefix_alone() -> None:
    error = refuse(MessageReader(1000), b"\0\0\0\x03\xe9")
    assert error.code is Code.TOO_LARGE
    assert "1001" in error.message
    assert "1000" in error.message
    assert MessageReader(1000).feed(b"\0\0\0\x03\xe8" + bytes(1000)) == [bytes(1000)]


def compressed(message: bytes) -> bytes:
    data = gzip.compress(message)
    return b"\1" + len(data).to_bytes(4, "big") + data


def test_gzip_is_understood_where_it_was_announced() -> None:
    assert MessageReader(1000, "gzip").feed(compressed(b"abc") + b"\0\0\0\0\1x") == [b"abc", b"x"]
    assert refuse(MessageReader(1000), compressed(b"abc")).code is Code.UNSUPPORTED
    assert refuse(MessageReader(1000, "snappy"), compressed(b"abc")).code is Code.UNSUPPORTED


def test_a_gzip_bomb_is_stopped_at_the_limit() -> None:
    bomb = compressed(bytes(20 << 20))
    assert len(bomb) < 30_000
    assert refuse(MessageReader(1 << 20, "gzip"), bomb).code is Code.TOO_LARGE


@pytest.mark.parametrize("tail", [-1, 1])
def test_damaged_gzip_is_refused(tail: int) -> None:
    whole = gzip.compress(b"abc")
    data = whole[:-1] if tail < 0 else whole + b"x"
    assert refuse(MessageReader(1000, "gzip"), b"\1" + len(data).to_bytes(4, "big") + data).code is Code.INVALID_REQUEST
    assert refuse(MessageReader(1000, "gzip"), b"\1\0\0\0\4abcd").code is Code.INVALID_REQUEST
    assert refuse(MessageReader(1000), b"\7\0\0\0\0").code is Code.INVALID_REQUEST


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_mesh_errors(data: bytes) -> None:
    with contextlib.suppress(MeshError):
        MessageReader(100, "gzip").feed(data)


def head_of(*fields: tuple[bytes, bytes]) -> RequestHead:
    base = [(b":method", b"POST"), (b":path", b"/a/b"), (b"content-type", b"application/grpc+proto")]
    return read_request([*base, *fields], size_bytes_max=2000, count_max=20)


def test_request_fields_are_told_apart() -> None:
    head = head_of(
        (b"grpc-timeout", b"250m"),
        (b"grpc-encoding", b"gzip"),
        (b"x", b"1"),
        (b"x", b"2"),
        (b"b-bin", b"AAA"),
        (b"te", b"t"),
    )
    assert (head.path, head.timeout_s, head.encoding, head.is_grpc, head.problem) == ("/a/b", 0.25, "gzip", True, None)
    assert head.metadata == {"x": "1,2", "b-bin": "AAA"}


def test_bad_request_fields_are_refused() -> None:
    assert head_of((b"grpc-timeout", b"soon")).problem is not None
    assert head_of((b"x", b"y" * 2000)).problem is not None
    assert head_of(*[(b"x", b"")] * 20).problem is not None
    assert not read_request([(b":method", b"GET"), (b":path", b"/")], size_bytes_max=99, count_max=9).is_grpc
    plain = [(b":method", b"POST"), (b"content-type", b"application/json")]
    assert not read_request(plain, size_bytes_max=999, count_max=9).is_grpc
    web = [(b":method", b"POST"), (b"content-type", b"application/grpc-web")]
    assert not read_request(web, size_bytes_max=999, count_max=9).is_grpc


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_any_field_can_be_read(name: bytes, value: bytes) -> None:
    if name:
        head_of((name, value))
        read_trailers([(name, value)])


def test_request_fields_that_cannot_travel_are_refused() -> None:
    prefix = request_prefix("/a/b", authority="h:1", is_tls=False)
    assert (b"a", b"b") in write_request(prefix, [("a", "b")], 1.5)
    assert dict(write_request(prefix, (), 1.5))[b"grpc-timeout"] == b"1500000u"
    for name, value in [("a", "line\nfeed"), ("a", "ü"), ("A", "b"), ("grpc-status", "0"), (":path", "/"), ("", "x")]:
        with pytest.raises(MeshError):
            write_request(prefix, [(name, value)], 1.0)


def test_trailers_that_cannot_travel_are_left_out() -> None:
    fields = write_trailers([("a", "x\r\ny"), ("b", "1"), ("grpc-status", "9"), ("c", "y" * 500)], size_bytes_max=300)
    assert list(fields) == [(b"grpc-status", b"0"), (b"b", b"1")]


def test_an_error_passes_through_a_forwarding_node() -> None:
    error = CallError(Code.OVERLOADED, "full", retry_after_ms=50)
    error.trailers = (("nc-code", "STALE"), ("nc-served-by", "n1"))
    fields = dict(write_error(error, is_first=True, size_bytes_max=4000))
    assert fields[b":status"] == b"200"
    assert (fields[b"grpc-status"], fields[b"nc-code"], fields[b"nc-served-by"]) == (b"8", b"OVERLOADED", b"n1")
    assert b":status" not in dict(write_error(error, is_first=False, size_bytes_max=4000))
