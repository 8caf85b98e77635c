"""Echo of a 600-byte message through our gRPC servers beside grpc.aio, plain and over TLS 1.3, each on one core."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path

from benchmarks.echo_server import PATH
from benchmarks.foreign import call
from benchmarks.processes import cpu_s, has_h2load, load_h2, serve
from benchmarks.rows import Row
from nearcast.identity import CertificateAuthority, make_csr
from nearcast.transport.grpc import make_channel

MESSAGE = bytes(range(200)) * 3
KINDS = ("ngh2", "grpcio", "peer")
GUESS_RPS = {"ngh2": 30_000, "grpcio": 4_000, "peer": 4_000}
LIFETIME_S = 86_400.0


def run(*, quick: bool) -> list[Row]:
    """Requests per second at 4 connections x 16 streams, and the mean latency of one request at a time."""
    if not has_h2load():
        return [Row("echo.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, seconds = (3, 0.5) if quick else (5, 4.0)
    with tempfile.TemporaryDirectory() as folder:
        identity = make_identity(Path(folder))
        return measure("echo.", None, rounds, seconds) + measure("echo.tls_", identity, rounds, seconds)


def measure(prefix: str, identity: Path | None, rounds: int, seconds: float) -> list[Row]:
    """All kinds in turn, so that what disturbs one disturbs the others."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    latencies: dict[str, list[float]] = {kind: [] for kind in KINDS}
    costs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    is_tls = identity is not None
    for _ in range(rounds):
        for kind in KINDS:
            with serve("benchmarks.echo_server", kind, *([str(identity)] if identity else [])) as ready:
                address = ready["address"]
                check(address, identity)
                requests = int(GUESS_RPS[kind] * seconds)
                before_s = cpu_s(ready["pid"])
                burst = load_h2(address, PATH, MESSAGE, requests=requests, connections=4, streams=16, is_tls=is_tls)
                costs[kind].append((cpu_s(ready["pid"]) - before_s) / requests * 1e6)
                single = load_h2(
                    address, PATH, MESSAGE, requests=requests // 8, connections=1, streams=1, is_tls=is_tls
                )
                if burst.failed or single.failed:
                    raise RuntimeError(f"{kind}: {burst.failed + single.failed} requests failed")
                rates[kind].append(burst.requests_per_s)
                latencies[kind].append(single.mean_us)
    ratio = statistics.median(a / b for a, b in zip(rates["ngh2"], rates["peer"], strict=True))
    how = "TLS 1.3, ALPN h2" if is_tls else "plain"
    rows = [Row(f"{prefix}rps_vs_grpc_aio", ratio, "x", f"ngh2 + uvloop over grpc.aio + uvloop, {how}, 600 B, c4 m16")]
    for kind in KINDS:
        rows.append(Row(f"{prefix}{kind}_rps", statistics.median(rates[kind]), "1/s"))
        rows.append(Row(f"{prefix}{kind}_c1_mean_us", statistics.median(latencies[kind]), "us"))
        rows.append(Row(f"{prefix}{kind}_cpu_us", statistics.median(costs[kind]), "us", "server's CPU per request"))
    return rows


def make_identity(folder: Path) -> Path:
    """A node's key and certificate, and beside them the authority's."""
    authority = CertificateAuthority.create(folder / "ca")
    key, csr = make_csr("bench-node", "edge")
    place = folder / "node"
    place.mkdir()
    (place / "node.key").write_bytes(key)
    (place / "node.key").chmod(0o600)
    (place / "node.pem").write_bytes(authority.issue(csr, name="bench-node", role="edge", lifetime_s=LIFETIME_S))
    (place / "ca.pem").write_bytes(authority.certificate_pem)
    return place


def check(address: str, identity: Path | None) -> None:
    """A peer with wrong output is not a row."""
    # Over TLS grpcio insists on a DNS name, which a node's certificate does not have.
    tls = None if identity is None else call_tls(address, identity / "ca.pem")
    if (call(address, PATH, MESSAGE) if tls is None else asyncio.run(tls)) != MESSAGE:
        raise RuntimeError(f"{address} does not echo")


async def call_tls(address: str, ca: Path) -> bytes:
    channel = make_channel("ngh2", address, ca=ca)
    try:
        return b"".join((await channel.unary(PATH, (MESSAGE,))).body)
    finally:
        await channel.close()
