"""Children for benchmarks: servers pinned to one core, the load tool to another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
SERVER_CPU, LOAD_CPU = 0, min(1, (os.cpu_count() or 1) - 1)


@contextlib.contextmanager
def serve(module: str, *arguments: str, cpu: int | None = SERVER_CPU) -> Iterator[dict[str, Any]]:
    """Run `python -m module` until the block ends; yields the JSON of its first line of output, and its `pid`.

    Raises:
        RuntimeError: if the child ends before it is ready.
    """
    child = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        if cpu is not None:
            os.sched_setaffinity(child.pid, {cpu})
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} {' '.join(arguments)} ended with {child.wait()} before it was ready")
        yield {"pid": child.pid} | json.loads(line)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of h2load saw."""

    requests_per_s: float
    mean_us: float
    p50_us: float
    failed: int


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far, its system calls included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_h2load() -> bool:
    """Whether the load tool of nghttp2 is installed (Debian: `nghttp2-client`)."""
    return shutil.which("h2load") is not None


def load_h2(
    address: str,
    path: str,
    message: bytes,
    *,
    requests: int,
    connections: int,
    streams: int,
    headers: Mapping[str, str] | None = None,
    is_tls: bool = False,
) -> Load:
    """Send `requests` gRPC messages with h2load and read its summary.

    Raises:
        RuntimeError: if h2load fails or an answer has another HTTP status than 200.
    """
    with tempfile.NamedTemporaryFile() as body, tempfile.NamedTemporaryFile("r") as log:
        body.write(b"\0" + len(message).to_bytes(4, "big") + message)
        body.flush()
        command = [
            "taskset",
            "-c",
            str(LOAD_CPU),
            "h2load",
            f"-n{requests}",
            f"-c{connections}",
            f"-m{streams}",
            "-t1",
            "-d",
            body.name,
            f"--log-file={log.name}",
        ]
        for name, value in {"content-type": "application/grpc", "te": "trailers", **(headers or {})}.items():
            command += ["-H", f"{name}: {value}"]
        scheme = "https" if is_tls else "http"
        result = subprocess.run(
            [*command, f"{scheme}://{address}{path}"], capture_output=True, text=True, check=False, timeout=300
        )
        latencies = [int(line.split("\t")[2]) for line in log]
    out = result.stdout
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", out)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", out)
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+([\d.]+)(us|ms|s)", out)
    if result.returncode or rate is None or counts is None or mean is None or not latencies:
        raise RuntimeError(f"h2load failed: {out}{result.stderr}")
    scale = {"us": 1.0, "ms": 1e3, "s": 1e6}[mean[2]]
    failed = requests - int(counts[1])
    return Load(float(rate[1]), float(mean[1]) * scale, statistics.median(latencies), failed)
