"""What one hop through the stand-alone router costs, full policy on, beside Envoy, HAProxy and a proxy of grpc.aio.

Two settings: plain text on both sides, and mutual TLS towards the node. In turn, in one run, with the same node and the
same load tool; every proxy on core 0, node and load tool on core 1. What survives crowded cores is `per_core`: requests
per second of the proxy's own processor time.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.foreign import call
from benchmarks.processes import LOAD_CPU, cpu_s, has_h2load, load_h2, serve
from benchmarks.router_node import MODEL, NODE
from benchmarks.router_peers import ENVOY, envoy, haproxy
from benchmarks.rows import Row
from nearcast.handler import Served
from nearcast.identity import CertificateAuthority, make_csr
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse

PATH = "/inference.GRPCInferenceService/ModelInfer"
SETTINGS = ("plain", "mtls")
SMALL, LARGE = "600B", "602kB"
SHAPES = {SMALL: (600,), LARGE: (1, 224, 224, 3)}
CROWDS = {SMALL: (4, 16), LARGE: (2, 4)}
"""Connections and streams of the throughput rows."""
ROUTER, DIRECT, SLOW = "router", "direct", "grpc_aio"
SLOW_SHARE = 5
"""A proxy of grpc.aio gets so many times fewer requests."""
READY_TIMEOUT_S = 20.0
LIFETIME_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured: rounds, and per round requests in a crowd and alone, by size."""

    rounds: int
    crowd: dict[str, int]
    alone: dict[str, int]


QUICK = Plan(rounds=2, crowd={SMALL: 6_000, LARGE: 160}, alone={SMALL: 600, LARGE: 50})
FULL = Plan(rounds=7, crowd={SMALL: 60_000, LARGE: 1_500}, alone={SMALL: 8_000, LARGE: 400})


@dataclass(slots=True)
class Seen:
    """What the rounds of one proxy and size showed."""

    rates: list[float] = field(default_factory=list)
    per_core: list[float] = field(default_factory=list)
    p50s_us: list[float] = field(default_factory=list)


def run(*, quick: bool) -> list[Row]:
    """Throughput and added latency of every proxy, in both settings."""
    if not has_h2load():
        return [Row("router.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    plan = QUICK if quick else FULL
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_identities(folder)
        with serve("benchmarks.router_node", str(folder / NODE), cpu=LOAD_CPU) as node:
            for setting in SETTINGS:
                with proxies(setting, node["grpc"], node["mesh"], folder) as started:
                    rows += measure_setting(setting, {DIRECT: (node["grpc"], node["pid"]), **started}, plan)
    return rows


@contextlib.contextmanager
def proxies(setting: str, plain: str, mesh: str, folder: Path) -> Iterator[dict[str, tuple[str, int]]]:
    """All proxies in front of the node: addresses and process numbers."""
    identity, target = (folder / "bench-router", mesh) if setting == "mtls" else (None, plain)
    with contextlib.ExitStack() as stack:
        if identity is None:
            router = stack.enter_context(serve("benchmarks.router_plain", target))
            found = {ROUTER: (router["address"], router["pid"])}
        else:
            config = folder / "router.toml"
            config.write_text(make_config(folder, mesh))
            router = stack.enter_context(serve("router", "--config", str(config)))
            found = {ROUTER: (router["grpc"], router["pid"])}
            relay = stack.enter_context(serve("benchmarks.relay", mesh, str(identity)))
            found["relay"] = (relay["address"], relay["pid"])
        if ENVOY.exists():
            peer = stack.enter_context(envoy(target, identity, folder))
            found["envoy"] = (peer["address"], peer["pid"])
        with contextlib.suppress(FileNotFoundError):
            peer = stack.enter_context(haproxy(target, identity, folder))
            found["haproxy"] = (peer["address"], peer["pid"])
        peer = stack.enter_context(serve("benchmarks.router_peers", target, *map(str, filter(None, [identity]))))
        found[SLOW] = (peer["address"], peer["pid"])
        yield found


def measure_setting(setting: str, proxies: dict[str, tuple[str, int]], plan: Plan) -> list[Row]:
    """The rows of one setting."""
    rows: list[Row] = []
    for size, shape in SHAPES.items():
        tensor = np.random.default_rng(3).integers(0, 255, shape, np.uint8)
        if size == LARGE:
            tensor = tensor.astype(np.float32)
        message = TensorRequest(model=MODEL, inputs={"x": tensor}).encode()
        seen = {name: Seen() for name in proxies}
        for address, _ in proxies.values():
            wait_until_routed(address, message, tensor)
        for _ in range(plan.rounds):
            for name, (address, pid) in proxies.items():
                measure_once(name, address, pid, size, message, plan, seen[name])
        rows += make_rows(f"router.{setting}_{size}", size, seen)
    return rows


def measure_once(name: str, address: str, pid: int, size: str, message: bytes, plan: Plan, seen: Seen) -> None:
    """One request at a time, then a crowd."""
    share = SLOW_SHARE if name == SLOW else 1
    connections, streams = CROWDS[size]
    alone = load_h2(address, PATH, message, requests=plan.alone[size] // share, connections=1, streams=1)
    requests = plan.crowd[size] // share
    before_s = cpu_s(pid)
    crowd = load_h2(address, PATH, message, requests=requests, connections=connections, streams=streams)
    used_s = max(cpu_s(pid) - before_s, 0.01)
    if alone.failed or crowd.failed:
        raise RuntimeError(f"{name}: {alone.failed + crowd.failed} requests failed")
    seen.p50s_us.append(alone.p50_us)
    seen.rates.append(crowd.requests_per_s)
    seen.per_core.append(requests / used_s)


def make_rows(prefix: str, size: str, seen: dict[str, Seen]) -> list[Row]:
    """Medians over the rounds; ratios and differences within a round."""
    rows = []
    connections, streams = CROWDS[size]
    if "envoy" in seen:
        ours, theirs = seen[ROUTER], seen["envoy"]
        for name, ratios in (
            ("rps_vs_envoy", zip(ours.rates, theirs.rates, strict=True)),
            ("per_core_vs_envoy", zip(ours.per_core, theirs.per_core, strict=True)),
        ):
            ratio = statistics.median(a / b for a, b in ratios)
            rows.append(Row(f"{prefix}_{name}", ratio, "x", f"c{connections} m{streams}"))
    for name, found in seen.items():
        if name == DIRECT:
            rows.append(Row(f"{prefix}_direct_p50_us", statistics.median(found.p50s_us), "us", "one at a time"))
            continue
        added = statistics.median(b - a for a, b in zip(seen[DIRECT].p50s_us, found.p50s_us, strict=True))
        rows += [
            Row(f"{prefix}_{name}_added_p50_us", added, "us", "one at a time, over direct and plain"),
            Row(f"{prefix}_{name}_rps", statistics.median(found.rates), "1/s", f"c{connections} m{streams}"),
            Row(f"{prefix}_{name}_per_core", statistics.median(found.per_core), "1/s", "of the proxy's own time"),
        ]
    return rows


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
    """The proxy has found its target, and the output is the input."""
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
        raise RuntimeError(f"the answer through {address} is not the node's")
