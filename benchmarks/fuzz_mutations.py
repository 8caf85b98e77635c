"""Conversations that went well, and what a fuzzer makes of them. Pure: a seeded generator decides."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

import ngh2
import numpy as np

from nearcast.wire.request import TensorRequest

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
SERVICE = "/inference.GRPCInferenceService/"
PREFACE_SIZE_BYTES = 24
MUTATIONS_MAX = 4
PIECES_MAX = 3

Conversation: TypeAlias = Sequence[bytes]
"""The client's side, piece by piece: HTTP/2 frames (the preface is the first), or lines and bodies of HTTP/1.1."""


def infer_message(rng: random.Random | None = None) -> bytes:
    """A small inference request."""
    size = 16 if rng is None else rng.randrange(64)
    request = TensorRequest(
        model="echo",
        inputs={"x": np.arange(size, dtype=np.uint8), "t": np.array([b"text", b""], dtype=object)},
        parameters={"sequence_id": 7, "timeout": 1_000_000, "note": "n"},
        id="r-1",
    )
    return request.encode()


def record_http2() -> list[Conversation]:
    """Conversations of a real client: unary, compressed, streaming, cancelled, several at once, other methods."""
    return [_unary(), _unary(gzipped=True), _several(), _streaming(), _cancelled(), _questions(), _large(), _foreign()]


def _client() -> ngh2.Connection:
    h2 = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration())
    h2.initiate_connection({4: 1 << 20})
    return h2


def _open(h2: ngh2.Connection, path: str, *more: tuple[bytes, bytes]) -> int:
    head = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"x")]
    fields = [*head, (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"grpc-timeout", b"5S"), *more]
    return h2.send_request(fields)


def _framed(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


def _frames(h2: ngh2.Connection) -> Conversation:
    """What the client would send, with its acknowledgement of the server's SETTINGS behind its own."""
    data = h2.data_to_send()
    pieces = [data[:PREFACE_SIZE_BYTES]]
    position = PREFACE_SIZE_BYTES
    while position < len(data):
        end = position + 9 + int.from_bytes(data[position : position + 3], "big")
        pieces.append(data[position:end])
        position = end
    pieces.insert(2, b"\0\0\0\4\1\0\0\0\0")
    return pieces


def _unary(*, gzipped: bool = False) -> Conversation:
    h2 = _client()
    message = infer_message()
    if gzipped:
        stream_id = _open(h2, INFER, (b"grpc-encoding", b"gzip"))
        h2.send_data(stream_id, _framed(gzip.compress(message), 1), end_stream=True)
    else:
        h2.send_data(_open(h2, INFER, (b"nc-deadline-ms", b"100")), _framed(message), end_stream=True)
    return _frames(h2)


def _several() -> Conversation:
    h2 = _client()
    ids = [_open(h2, INFER, (b"traceparent", b"00-" + b"a" * 32)) for _ in range(5)]
    message = _framed(infer_message())
    for stream_id in ids:
        h2.send_data(stream_id, message[:20])
    for stream_id in ids:
        h2.send_data(stream_id, message[20:], end_stream=True)
    return _frames(h2)


def _streaming() -> Conversation:
    h2 = _client()
    stream_id = _open(h2, STREAM)
    for _ in range(6):
        h2.send_data(stream_id, _framed(infer_message()))
    h2.ping(b"12345678")
    h2.end_stream(stream_id)
    return _frames(h2)


def _cancelled() -> Conversation:
    h2 = _client()
    stream_id = _open(h2, STREAM)
    h2.send_data(stream_id, _framed(infer_message())[:30])
    pieces = list(_frames(h2))
    h2.reset_stream(stream_id, 8)
    pieces.append(h2.data_to_send())
    return pieces


def _questions() -> Conversation:
    h2 = _client()
    for name in ("ServerLive", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "NoSuchMethod"):
        h2.send_data(_open(h2, SERVICE + name), _framed(b"\x0a\x04echo"), end_stream=True)
    return _frames(h2)


def _foreign() -> Conversation:
    """Requests that are no gRPC, given up before they are refused."""
    h2 = _client()
    head = [(b":scheme", b"http"), (b":path", b"/"), (b":authority", b"x")]
    ids = [h2.send_request([(b":method", method), *head], end_stream=False) for method in (b"GET", b"POST", b"HEAD")]
    pieces = list(_frames(h2))
    for stream_id in ids:
        h2.reset_stream(stream_id, 8)
    resets = h2.data_to_send()
    return [*pieces, resets]


def _large() -> Conversation:
    h2 = _client()
    request = TensorRequest(model="echo", inputs={"x": np.zeros(40_000, dtype=np.uint8)})
    h2.send_data(_open(h2, INFER), _framed(request.encode()), end_stream=True)
    return _frames(h2)


def record_rest() -> list[Conversation]:
    """Requests over HTTP/1.1: JSON, binary data, chunked, compressed, pipelined questions.

    The last two come again with the same head, which a server remembers.
    """
    infer = b"POST /v2/models/echo/infer HTTP/1.1\r\n"
    json = b'{"id":"r","inputs":[{"name":"x","datatype":"UINT8","shape":[2,2],"data":[[1,2],[3,4]]}],"outputs":[]}'
    binary = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}]}'
    zipped = gzip.compress(json)
    get = b"GET /v2/models/echo HTTP/1.1\r\n"
    host = b"Host: x\r\n"
    head = infer + host + b"Content-Length: %d\r\n"
    tensor = [head % (len(binary) + 8) + b"Inference-Header-Content-Length: %d\r\n\r\n" % len(binary), binary, bytes(8)]
    return [
        [infer, host, b"Content-Length: %d\r\n" % len(json), b"nc-deadline-ms: 50\r\n", b"\r\n", json],
        [
            infer,
            host,
            b"Inference-Header-Content-Length: %d\r\n" % len(binary),
            b"Content-Length: %d\r\n" % (len(binary) + 8),
            b"\r\n",
            binary,
            bytes(8),
        ],
        [
            infer,
            host,
            b"Transfer-Encoding: chunked\r\n",
            b"\r\n",
            b"14\r\n",
            json[:20],
            b"\r\n",
            b"%x\r\n" % (len(json) - 20),
            json[20:],
            b"\r\n",
            b"0\r\n",
            b"\r\n",
        ],
        [infer, host, b"Content-Encoding: gzip\r\n", b"Content-Length: %d\r\n" % len(zipped), b"\r\n", zipped],
        [get, host, b"\r\n", b"GET /v2/health/ready HTTP/1.1\r\n", host, b"\r\n", get, host, b"\r\n"],
        [b"POST /v2/repository/index HTTP/1.1\r\n", host, b"Content-Length: 2\r\n", b"\r\n", b"{}"],
        [*tensor, *tensor],
        [head % len(json) + b"\r\n", json] * 2,
    ]


def mutate(conversation: Conversation, others: Sequence[Conversation], rng: random.Random) -> list[bytes]:
    """One to four changes, of frames and of bytes; then the whole in one to three reads."""
    pieces = list(conversation)
    for _ in range(rng.randint(1, MUTATIONS_MAX)):
        rng.choice(_MUTATIONS)(pieces, others, rng)
        if not pieces:
            pieces.append(rng.randbytes(9))
    data = b"".join(pieces)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(PIECES_MAX)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


_Mutation: TypeAlias = Callable[[list[bytes], Sequence[Conversation], random.Random], None]


def _flip_bit(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    if pieces[at]:
        changed = bytearray(pieces[at])
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        pieces[at] = bytes(changed)


def _set_byte(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    if pieces[at]:
        changed = bytearray(pieces[at])
        # The first bytes are a frame's header: its length, type, flags and stream.
        changed[rng.randrange(min(len(changed), rng.choice((9, 32, 1 << 20))))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        pieces[at] = bytes(changed)


def _drop(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    del pieces[rng.randrange(len(pieces))]


def _repeat(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    pieces[at:at] = [pieces[at]] * rng.choice((1, 1, 2, 50))


def _swap(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    a, b = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    pieces[a], pieces[b] = pieces[b], pieces[a]


def _truncate(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    pieces[at] = pieces[at][: rng.randrange(len(pieces[at]) + 1)]
    if rng.random() < 0.5:
        del pieces[at + 1 :]


def _grow(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    where = rng.randrange(len(pieces[at]) + 1)
    pieces[at] = pieces[at][:where] + rng.randbytes(rng.choice((1, 4, 100))) + pieces[at][where:]


def _splice(pieces: list[bytes], others: Sequence[Conversation], rng: random.Random) -> None:
    other = rng.choice(others)
    at, start = rng.randrange(len(pieces) + 1), rng.randrange(len(other))
    pieces[at:at] = other[start : start + rng.randint(1, 4)]


def _restream(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    at = rng.randrange(len(pieces))
    if len(pieces[at]) >= 9:
        stream_id = rng.choice((0, 1, 2, 3, 5, 7, 1001, (1 << 31) - 1))
        pieces[at] = pieces[at][:5] + stream_id.to_bytes(4, "big") + pieces[at][9:]


def _insert_frame(pieces: list[bytes], _: Sequence[Conversation], rng: random.Random) -> None:
    payload = rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 40)))
    head = len(payload).to_bytes(3, "big") + bytes((rng.choice((*range(11), 16, 255)), rng.randrange(256)))
    stream_id = rng.choice((0, 0, 1, 1, 3, 5)).to_bytes(4, "big")
    pieces.insert(rng.randrange(len(pieces) + 1), head + stream_id + payload)


_MUTATIONS: tuple[_Mutation, ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_byte,
    _drop,
    _repeat,
    _swap,
    _truncate,
    _grow,
    _splice,
    _restream,
    _insert_frame,
)
