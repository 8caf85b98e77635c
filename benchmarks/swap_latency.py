"""What those who ask notice of a swap: p99 from the start of a load to the end of the drain, beside quiet windows.

A real edge node answers at half of the rate that it could. Its pointers change between quiet windows: in half of the
swaps the model that is asked gets another release, in the other half another model comes in and the one before goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.processes import LOAD_CPU, SERVER_CPU, load_h2
from benchmarks.rows import Row
from benchmarks.silero_size import NAME, fill_store, make_inputs
from nearcast.serving.control import ControlRequest, ask
from nearcast.store import Pointer, Store
from nearcast.store.manifest import MANIFEST_FILE
from nearcast.wire.request import TensorRequest

PATH = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS, STREAMS = 4, 8
CLIENTS = 40
"""Of the steady load. h2load sends the requests of each in beats: many that began apart make an even flow."""
LOAD_SHARE = 0.5
MARGIN_S = 0.02
"""After the answer of the control socket: what was replaced is closed, its memory given back."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Seen:
    """Latencies in milliseconds of the requests that began in a window, and how many were not answered well."""

    quiet_ms: list[float]
    swap_ms: list[float]
    other_ms: list[float]
    failed: int
    rate_per_s: float


def run(*, quick: bool) -> list[Row]:
    """Rows of the swap benchmark that speak about latency."""
    swaps, window_s = (6, 0.7) if quick else (20, 2.0)
    with tempfile.TemporaryDirectory() as folder, serve_node(Path(folder)) as (node, store):
        seen = measure(node, store, swaps, window_s)
    steady = p99(seen.quiet_ms)
    both = [*seen.swap_ms, *seen.other_ms]
    note = (
        f"{len(both)} requests in {swaps} swaps, {p99(both):.2f} ms; {len(seen.quiet_ms)} quiet ones, {steady:.2f} ms"
    )
    return [
        Row("swap.p99_vs_steady", p99(both) / steady, "x", note),
        Row("swap.p99_vs_steady_same_model", p99(seen.swap_ms) / steady, "x", "another release of the model asked for"),
        Row("swap.p99_vs_steady_other_model", p99(seen.other_ms) / steady, "x", "another model comes in, one goes"),
        Row("swap.p99_failed", seen.failed, "1", f"at {seen.rate_per_s:.0f} requests/s, half of what the node can"),
    ]


def p99(values: list[float]) -> float:
    """Of latencies; 0 without any."""
    return float(np.quantile(values, 0.99)) if values else 0.0


@dataclass(frozen=True, slots=True)
class Node:
    """Where the node answers, and its process."""

    grpc: str
    http: str
    control: Path
    pid: int


@contextlib.contextmanager
def serve_node(folder: Path) -> Iterator[tuple[Node, Store]]:
    """A node on one core, with two models as two releases each. The other is the load tool's: it is not what loads
    that keeps it waiting.
    """
    data = folder / "node"
    made, _ = fill_store(folder)
    store = Store(data / "models")
    for name, release in ((NAME, 1), (NAME, 2), (OTHER, 1), (OTHER, 2)):
        copy_version(made, store, name, release)
    store.write_pointer(NAME, Pointer(stable=1))
    store.write_pointer(OTHER, Pointer(stable=1))
    with start_node(data) as node:
        for thread in Path(f"/proc/{node.pid}/task").iterdir():  # those to come inherit it
            os.sched_setaffinity(int(thread.name), {SERVER_CPU})
        yield node, store


@contextlib.contextmanager
def start_node(data: Path) -> Iterator[Node]:
    """A real edge node that stands alone, without a broker, from its start until it is ready."""
    settings = {
        "data_dir": data,
        "listen.grpc": "127.0.0.1:0",
        "listen.http": "127.0.0.1:0",
        "listen.metrics": "127.0.0.1:0",
        "mqtt.broker": "",
    }
    command = [sys.executable, "-m", "nearcast", "edge"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        addresses = json.loads(child.stdout.readline())
        yield Node(grpc=addresses["grpc"], http=addresses["http"], control=data / "host.sock", pid=child.pid)
    finally:
        child.terminate()
        child.wait(20)


def copy_version(made: Store, store: Store, name: str, release: int) -> None:
    """The benchmark's model under another name and number."""
    manifest = msgspec.structs.replace(made.manifest(NAME, 1), name=name, release=release, semver=f"1.0.{release}")
    staged = store.stage_folder(name, release)
    shutil.copytree(made.folder(NAME, 1), staged, dirs_exist_ok=True)
    path = staged / MANIFEST_FILE
    path.chmod(0o600)
    path.write_bytes(manifest.encode())
    store.commit(name, release, staged)


def measure(node: Node, store: Store, swaps: int, window_s: float) -> Seen:
    """Load the node, swap between quiet windows, and sort what was asked by the window in which it began."""
    message = TensorRequest(model=NAME, inputs=make_inputs()).encode()
    load_h2(node.grpc, PATH, message, requests=1000, connections=CONNECTIONS, streams=1)
    best = load_h2(node.grpc, PATH, message, requests=3000, connections=CONNECTIONS, streams=STREAMS)
    rate_per_s = LOAD_SHARE * best.requests_per_s
    before = failures(node)
    # Time for the swaps themselves, and for the load tool to begin.
    requests = CLIENTS * int(rate_per_s * (swaps * (window_s + 0.4) + 2.0) / CLIENTS)
    with load_steadily(node.grpc, message, rate_per_s, requests) as finish:
        time.sleep(1.0)
        windows = [swap(node, store, turn, window_s) for turn in range(swaps)]
        began, took_ms, refused = finish()
    inside = {kind: np.zeros(len(began), bool) for kind in ("quiet", NAME, OTHER)}
    for kind, since, until in [window for pair in windows for window in pair]:
        inside[kind] |= (began >= since) & (began <= until)
    return Seen(
        quiet_ms=took_ms[inside["quiet"]].tolist(),
        swap_ms=took_ms[inside[NAME]].tolist(),
        other_ms=took_ms[inside[OTHER]].tolist(),
        failed=refused + failures(node) - before,
        rate_per_s=rate_per_s,
    )


def swap(node: Node, store: Store, turn: int, window_s: float) -> tuple[tuple[str, float, float], ...]:
    """One quiet window and one swap; wall times in seconds."""
    quiet = time.time()
    time.sleep(window_s)
    name, release = (NAME, OTHER)[turn % 2], 2 - turn // 2 % 2
    store.write_pointer(name, Pointer(stable=release))
    since = time.time()
    versions = ask(node.control, ControlRequest(op="refresh", model=name))["versions"]
    assert any(version["release"] == release and version["state"] == "hot" for version in versions), versions
    while len(versions) > 1:
        versions = ask(node.control, ControlRequest(op="stats", model=name))["versions"]
    until = time.time() + MARGIN_S
    time.sleep(4 * MARGIN_S)
    return ("quiet", quiet, since - 0.001), (name, since, until)


def failures(node: Node) -> int:
    """Requests that the node did not answer."""
    models = ask(node.control, ControlRequest(op="models"))["models"]
    return sum(sum(version["codes"].values()) for model in models for version in model["versions"])


@contextlib.contextmanager
def load_steadily(
    address: str, message: bytes, rate_per_s: float, requests: int
) -> Iterator[Callable[[], tuple[Any, Any, int]]]:
    """h2load at a fixed rate; the function waits for its end: when each request began, how long it took, failures."""
    with tempfile.NamedTemporaryFile() as body, tempfile.NamedTemporaryFile("r") as log:
        body.write(b"\0" + len(message).to_bytes(4, "big") + message)
        body.flush()
        command = ["taskset", "-c", str(LOAD_CPU), "h2load", f"-n{requests}", f"-c{CLIENTS}", f"-m{STREAMS}", "-t1"]
        command += ["-r1", "--rate-period=1ms", f"--rps={rate_per_s / CLIENTS:.2f}"]
        command += ["-d", body.name, f"--log-file={log.name}", "-H", "content-type: application/grpc"]
        command += ["-H", "te: trailers", f"http://{address}{PATH}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def finish() -> tuple[Any, Any, int]:
            said, _ = child.communicate(timeout=300)
            counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", said)
            if child.returncode or counts is None:
                raise RuntimeError(f"h2load failed: {said}")
            table = np.loadtxt(log.name, dtype=np.int64, ndmin=2)
            return table[:, 0] / 1e6, table[:, 2] / 1e3, requests - int(counts[1])

        try:
            yield finish
        finally:
            child.kill()
            child.wait()
