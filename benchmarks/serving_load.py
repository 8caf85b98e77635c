"""One load tool for every server and both transports: h2load, on a core of its own."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.processes import LOAD_CPU

STREAMS = {1: (1, 1), 16: (4, 4), 64: (4, 16)}
"""Requests in flight as connections and streams of gRPC; REST has one request on each connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent over and over, and how many bytes of data a right answer has at least."""

    url: str
    body: bytes
    headers: Mapping[str, str]
    http1: bool
    answer_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the load tool saw, and what all processes of the server used meanwhile."""

    requests_per_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    cpu_us: float
    rss_mb: float
    requests: int


def load(request: Request, *, concurrency: int, seconds: float, pid: int) -> Load:
    """Keep `concurrency` requests in flight for about `seconds`, after a tenth of it that warms up and is not counted.

    Raises:
        RuntimeError: if h2load fails, an answer is another than 200, or the answers are too short to be right.
    """
    warm = _run(request, concurrency=concurrency, requests=concurrency)
    warm = _run(request, concurrency=concurrency, requests=max(concurrency, int(warm.rate * seconds / 10)))
    before = tree_cpu_s(pid)
    seen = _run(request, concurrency=concurrency, requests=max(2 * concurrency, int(warm.rate * seconds)))
    used_s = tree_cpu_s(pid) - before
    return Load(
        requests_per_s=seen.rate,
        mean_us=float(seen.elapsed_us.mean()),
        p50_us=float(np.percentile(seen.elapsed_us, 50)),
        p99_us=float(np.percentile(seen.elapsed_us, 99)),
        cpu_us=used_s * 1e6 / len(seen.elapsed_us),
        rss_mb=tree_memory_mb(pid),
        requests=len(seen.elapsed_us),
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    rate: float
    elapsed_us: np.ndarray


def _run(request: Request, *, concurrency: int, requests: int) -> _Seen:
    connections, streams = (concurrency, 1) if request.http1 else STREAMS[concurrency]
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(request.body)
        command = ["taskset", "-c", str(LOAD_CPU), "h2load", f"-n{requests}", f"-c{connections}", f"-m{streams}"]
        command += ["-t1", "-d", str(body), f"--log-file={log}", *(["--h1"] if request.http1 else [])]
        for name, value in request.headers.items():
            command += ["-H", f"{name}: {value}"]
        result = subprocess.run([*command, request.url], capture_output=True, text=True, check=False, timeout=300)
        lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", result.stdout)
    data = re.search(r"traffic:.*\((\d+)\) data", result.stdout)
    if result.returncode or rate is None or data is None:
        raise RuntimeError(f"h2load failed: {result.stdout}{result.stderr}")
    if len(lines) < requests or any(status != "200" for _, status, _ in lines):
        summary = re.findall(r"^(?:requests|status codes):.*$", result.stdout, re.MULTILINE)
        raise RuntimeError(f"{request.url}: some requests failed: {summary}")
    if int(data[1]) < 0.99 * requests * request.answer_bytes:
        size = int(data[1]) / requests
        raise RuntimeError(f"{request.url}: {size:.0f} bytes an answer, {request.answer_bytes} were expected")
    return _Seen(float(rate[1]), np.array([int(entry[2]) for entry in lines], dtype=np.float64))


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def tree_cpu_s(pid: int) -> float:
    """Processor time of a process and its descendants."""
    ticks = 0
    for each in tree(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100.0


def tree_memory_mb(pid: int) -> float:
    """Memory of a process and its descendants; pages that several share count once."""
    total_kb = 0
    for each in tree(pid):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text(), re.MULTILINE)
        total_kb += int(found[1]) if found else 0
    return total_kb / 1024


def as_json(load: Load) -> dict[str, float]:
    """For the file of raw results."""
    found: dict[str, float] = json.loads(json.dumps({name: getattr(load, name) for name in Load.__dataclass_fields__}))
    return found
