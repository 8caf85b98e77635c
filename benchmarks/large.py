"""Messages of 602 kB (224x224x3 float32) and 6 MB: echoed by our server and by grpc.aio, as bytes and as tensors."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import numpy as np

from benchmarks.copies import count_copies
from benchmarks.echo_server import INFER_PATH, PATH
from benchmarks.foreign import call
from benchmarks.processes import cpu_s, has_h2load, load_h2, serve
from benchmarks.router_node import MODEL
from benchmarks.rows import Row
from nearcast.handler import Served
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse

SIZES = {"602kB": (1, 224, 224, 3), "6MB": (10, 224, 224, 3)}
KINDS = ("ngh2", "peer")
BYTES_PER_ROUND = 1_500_000_000
CONNECTIONS, STREAMS = 2, 4


@dataclass(slots=True)
class Seen:
    """What the rounds of one server and message showed."""

    rates: list[float] = field(default_factory=list)
    costs_us: list[float] = field(default_factory=list)


def run(*, quick: bool) -> list[Row]:
    """Requests per second at 2 connections x 4 streams; our share of grpc.aio's in the same round."""
    rows = count_copies()
    if not has_h2load():
        return [*rows, Row("large.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, size_bytes = (3, BYTES_PER_ROUND // 10) if quick else (5, BYTES_PER_ROUND)
    for label, shape in SIZES.items():
        for way, path in (("raw", PATH), ("tensors", INFER_PATH)):
            message = make_message(shape, path)
            seen = {kind: Seen() for kind in KINDS}
            for _ in range(rounds):
                for kind in KINDS:
                    measure(kind, path, message, requests=max(16, size_bytes // len(message)), seen=seen[kind])
            pairs = zip(seen["ngh2"].rates, seen["peer"].rates, strict=True)
            note = f"echo as {way} over grpc.aio + uvloop, c{CONNECTIONS} m{STREAMS}"
            rows.append(Row(f"large.{way}_{label}_vs_grpc_aio", statistics.median(a / b for a, b in pairs), "x", note))
            for kind in KINDS:
                rows.append(Row(f"large.{way}_{label}_{kind}_rps", statistics.median(seen[kind].rates), "1/s"))
                rows.append(Row(f"large.{way}_{label}_{kind}_cpu_us", statistics.median(seen[kind].costs_us), "us"))
    return rows


def make_message(shape: tuple[int, ...], path: str) -> bytes:
    """A request with one picture, or ten; as mere bytes it is the same message."""
    tensor = np.random.default_rng(3).standard_normal(shape, dtype=np.float32)
    return TensorRequest(model=MODEL, inputs={"x": tensor}).encode()


def measure(kind: str, path: str, message: bytes, *, requests: int, seen: Seen) -> None:
    """One server, checked, warmed and loaded."""
    with serve("benchmarks.echo_server", kind) as ready:
        check(ready["address"], path, message)
        load_h2(ready["address"], path, message, requests=16, connections=CONNECTIONS, streams=STREAMS)
        before_s = cpu_s(ready["pid"])
        load = load_h2(ready["address"], path, message, requests=requests, connections=CONNECTIONS, streams=STREAMS)
        seen.costs_us.append((cpu_s(ready["pid"]) - before_s) / requests * 1e6)
    if load.failed:
        raise RuntimeError(f"{kind}: {load.failed} requests failed")
    seen.rates.append(load.requests_per_s)


def check(address: str, path: str, message: bytes) -> None:
    """A peer with wrong output is not a row."""
    reply = call(address, path, message)
    if path == PATH:
        is_equal = reply == message
    else:
        sent = WireResponse(reply, Served()).decode()["y"]
        is_equal = sent.tobytes() in message
    if not is_equal:
        raise RuntimeError(f"{address} does not echo")
