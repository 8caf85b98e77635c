"""Copies of a 6 MB request and its answer, stage by stage, in one process and without a socket.

A stage's copies are the bytes that it has newly allocated, all results kept alive, per byte of the message; its time is
compared with that of one plain copy of the message. Allocations inside libnghttp2 are not seen, only their time.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import ngh2
import numpy as np

from benchmarks.rows import Row
from nearcast.transport.ngh2_connection import PULL_SIZE_BYTES
from nearcast.transport.ngh2_framing import MessageReader, frame
from nearcast.wire.request import PiecedRequest, TensorRequest, WireRequest
from nearcast.wire.response import TensorResponse

SHAPE = (10, 224, 224, 3)
WINDOW_BYTES = 1 << 24
MESSAGE_SIZE_BYTES_MAX = 64 * 1024 * 1024
FRAME_SIZE_BYTES = 16 * 1024
ROUNDS = 7
FIELDS = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"x")]
# The last letters move the tensor by a byte each: one of four names puts float32 where a processor can read it.
MODELS = ("echo", "echoe", "echoec", "echoech")


Stage: TypeAlias = Callable[[], object]


def count_copies() -> list[Row]:
    """Copies and times of every stage."""
    tensor = np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)
    bodies = [TensorRequest(model=model, inputs={"x": tensor}).encode() for model in MODELS]
    aligned, moved = (next(body for body in bodies if _is_view(body) is wanted) for wanted in (True, False))
    # What a server has of it: the prefix is gone. That its layout is known it learns here.
    WireRequest(moved).decode()
    pieces = [moved[at : at + FRAME_SIZE_BYTES] for at in range(0, len(moved), FRAME_SIZE_BYTES)]
    answer = TensorResponse(model="echo", version="1", outputs={"y": tensor}).encode_pieces()
    chunks = cast("list[bytes]", _receiving(frame((aligned,)))())
    stages: dict[str, Callable[[], Stage]] = {
        "http2_in": lambda: _receiving(frame((aligned,))),
        "assemble": lambda: lambda: _assemble(chunks),
        "peek": lambda: lambda: WireRequest(moved),
        "decode_aligned": lambda: lambda: WireRequest(aligned).decode(),
        "decode_unaligned": lambda: lambda: WireRequest(moved).decode(),
        "decode_pieces": lambda: lambda: PiecedRequest(pieces).decode(),
        "encode": lambda: TensorResponse(model="echo", version="1", outputs={"y": tensor}).encode_pieces,
        "forward": lambda: lambda: frame(WireRequest(moved).encode_pieces()),
        "http2_out": lambda: _sending(frame(answer)),
    }
    copy_ms = _best_ms(lambda: lambda: bytearray(aligned))
    rows = [Row("large.copy_ms", copy_ms, "ms", "one plain copy of the 6 MB message")]
    for name, prepare in stages.items():
        rows.append(Row(f"large.{name}_copies", _held_bytes(prepare()) / len(aligned), "x", "held per message byte"))
        rows.append(Row(f"large.{name}_ms", _best_ms(prepare), "ms"))
    return rows


def _is_view(body: bytes) -> bool:
    return np.shares_memory(WireRequest(body).decode()["x"], np.frombuffer(body, np.uint8))


def _connect() -> tuple[ngh2.Connection, ngh2.Connection]:
    """Client and server that have greeted each other, their windows larger than the message."""
    client = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration(auto_window_update=False))
    server = ngh2.Connection(ngh2.Role.SERVER, ngh2.Configuration(auto_window_update=False))
    for connection in (client, server):
        connection.initiate_connection({4: WINDOW_BYTES})
        connection.set_local_window_size(WINDOW_BYTES)
    for _ in range(2):
        server.receive_data(client.data_to_send())
        client.receive_data(server.data_to_send())
    return client, server


def _pull(connection: ngh2.Connection) -> list[bytes]:
    pieces = []
    while piece := connection.data_to_send(PULL_SIZE_BYTES):
        pieces.append(piece)
    return pieces


def _receiving(pieces: Sequence[bytes]) -> Stage:
    """What a server does with a request that comes in reads of 256 KiB."""
    client, server = _connect()
    stream = client.send_request(FIELDS)
    for piece in pieces:
        client.send_data(stream, piece)
    reads = _pull(client)

    def receive() -> list[bytes]:
        chunks = []
        for read in reads:
            server.receive_data(read)
            chunks += [event.data for event in server.events() if isinstance(event, ngh2.DataReceived)]
        return chunks

    return receive


def _sending(pieces: Sequence[bytes]) -> Stage:
    """What a server does with an answer until the socket has it."""
    client, server = _connect()
    stream = client.send_request(FIELDS, end_stream=True)
    server.receive_data(client.data_to_send())

    def send() -> list[bytes]:
        server.send_response(stream, [(b":status", b"200")])
        for piece in pieces:
            server.send_data(stream, piece)
        return _pull(server)

    return send


def _assemble(chunks: list[bytes]) -> bytes:
    reader = MessageReader(MESSAGE_SIZE_BYTES_MAX)
    return next(message for chunk in chunks for message in reader.feed(chunk))


def _held_bytes(stage: Stage) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = stage()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del kept
    return held


def _best_ms(prepare: Callable[[], Stage]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        stage = prepare()
        began = time.perf_counter()
        stage()
        best = min(best, time.perf_counter() - began)
    return best * 1e3
