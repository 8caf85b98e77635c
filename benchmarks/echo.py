"""Echo of a 600-byte message through our gRPC servers beside grpc.aio, each on one core."""

from __future__ import annotations

import statistics

from benchmarks.echo_server import PATH
from benchmarks.foreign import call
from benchmarks.processes import has_h2load, load_h2, serve
from benchmarks.rows import Row

MESSAGE = bytes(range(200)) * 3
KINDS = ("ngh2", "grpcio", "peer")


def run(*, quick: bool) -> list[Row]:
    """Requests per second at 4 connections x 16 streams, and the mean latency of one request at a time."""
    if not has_h2load():
        return [Row("echo.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, seconds = (3, 1.0) if quick else (5, 4.0)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    latencies: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            with serve("benchmarks.echo_server", kind) as ready:
                check(ready["address"])
                guess = 30_000 if kind == "ngh2" else 4_000
                burst = load_h2(
                    ready["address"], PATH, MESSAGE, requests=int(guess * seconds), connections=4, streams=16
                )
                single = load_h2(
                    ready["address"], PATH, MESSAGE, requests=int(guess / 8 * seconds), connections=1, streams=1
                )
                if burst.failed or single.failed:
                    raise RuntimeError(f"{kind}: {burst.failed + single.failed} requests failed")
                rates[kind].append(burst.requests_per_s)
                latencies[kind].append(single.mean_us)
    ratio = statistics.median(a / b for a, b in zip(rates["ngh2"], rates["peer"], strict=True))
    rows = [Row("echo.rps_vs_grpc_aio", ratio, "x", "ngh2 + uvloop over plain grpc.aio + uvloop, 600 B, c4 m16")]
    for kind in KINDS:
        rows.append(Row(f"echo.{kind}_rps", statistics.median(rates[kind]), "1/s"))
        rows.append(Row(f"echo.{kind}_c1_mean_us", statistics.median(latencies[kind]), "us"))
    return rows


def check(address: str) -> None:
    """A peer with wrong output is not a row."""
    if call(address, PATH, MESSAGE) != MESSAGE:
        raise RuntimeError(f"{address} does not echo")
