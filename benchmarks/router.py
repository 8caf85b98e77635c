"""What one hop through the stand-alone router adds: the real process, full policy, mutual TLS to the node behind it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.foreign import call
from benchmarks.processes import has_h2load, load_h2, serve
from benchmarks.router_node import MODEL, NODE
from benchmarks.rows import Row
from nearcast.handler import Served
from nearcast.identity import CertificateAuthority, make_csr
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse

PATH = "/inference.GRPCInferenceService/ModelInfer"
SIZE_BYTES = 600
READY_TIMEOUT_S = 20.0
LIFETIME_S = 86_400.0
_PLACES = "node and router on one core, the load tool on another"


def run(*, quick: bool) -> list[Row]:
    """p50 of one request at a time, direct and through the router, in turn; and the router's throughput."""
    if not has_h2load():
        return [Row("router.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, requests = (3, 4_000) if quick else (7, 20_000)
    tensor = (np.arange(SIZE_BYTES) % 251).astype(np.uint8)
    message = TensorRequest(model=MODEL, inputs={"x": tensor}).encode()
    direct, routed, relayed, rates = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_identities(folder)
        with serve("benchmarks.router_node", str(folder / NODE)) as node:
            config = folder / "router.toml"
            config.write_text(make_config(folder, node["mesh"]))
            with (
                serve("router", "--config", str(config)) as router,
                serve("benchmarks.relay", node["mesh"], str(folder / "bench-router")) as relay,
            ):
                wait_until_routed(router["grpc"], message, tensor)
                for _ in range(rounds):
                    direct.append(measure_p50_us(node["grpc"], message, requests))
                    routed.append(measure_p50_us(router["grpc"], message, requests))
                    relayed.append(measure_p50_us(relay["address"], message, requests))
                    load = load_h2(router["grpc"], PATH, message, requests=requests * 3, connections=4, streams=16)
                    rates.append(load.requests_per_s)
    added = statistics.median(after - before for before, after in zip(direct, routed, strict=True))
    return [
        Row("router.hop_p50_added_us", added, "us", f"600 B, one at a time, mTLS behind the router; {_PLACES}"),
        Row(
            "router.relay_p50_added_us",
            statistics.median(after - before for before, after in zip(direct, relayed, strict=True)),
            "us",
            "the floor: the same hop and TLS in Python, parsing nothing",
        ),
        Row("router.direct_p50_us", statistics.median(direct), "us", _PLACES),
        Row("router.routed_p50_us", statistics.median(routed), "us", _PLACES),
        Row("router.rps", statistics.median(rates), "1/s", f"c4 m16; {_PLACES}"),
    ]


def make_identities(folder: Path) -> None:
    """A mesh CA and two identities, as enrolment would give them."""
    authority = CertificateAuthority.create(folder / "ca")
    for name, role in ((NODE, "edge"), ("bench-router", "router")):
        key, csr = make_csr(name, role)
        place = folder / name
        place.mkdir()
        (place / "node.key").write_bytes(key)
        (place / "node.key").chmod(0o600)
        (place / "node.pem").write_bytes(authority.issue(csr, name=name, role=role, lifetime_s=LIFETIME_S))
        (place / "ca.pem").write_bytes(authority.certificate_pem)


def make_config(folder: Path, mesh: str) -> str:
    """A router with one fixed target and no control process."""
    return f"""
name = "bench-router"
data_dir = "{folder / "router-data"}"
identity = "{folder / "bench-router"}"
listen = {{ grpc = "127.0.0.1:0", http = "127.0.0.1:0", metrics = "127.0.0.1:0", mesh = "127.0.0.1:0" }}
agent = {{ enabled = false }}

[[targets]]
name = "{NODE}"
address = "{mesh}"
"""


def wait_until_routed(address: str, message: bytes, tensor: np.ndarray) -> None:
    """The router has found its target, and the output is the input."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            reply = call(address, PATH, message)
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    if not np.array_equal(WireResponse(reply, Served()).decode()["y"], tensor):
        raise RuntimeError("the router's answer is not the node's")


def measure_p50_us(address: str, message: bytes, requests: int) -> float:
    """Median latency of one request at a time."""
    load = load_h2(address, PATH, message, requests=requests, connections=1, streams=1)
    if load.failed:
        raise RuntimeError(f"{load.failed} requests failed")
    return load.p50_us
