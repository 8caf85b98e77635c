"""What a connection costs that does nothing: memory of a server process, and what its looking after takes."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.foreign import call
from benchmarks.fuzz_mutations import INFER, infer_message
from benchmarks.rows import Row

GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"
SPARE_DESCRIPTORS = 200
QUIET_S = 2.0


def run(*, quick: bool) -> list[Row]:
    """Memory of an idle connection on the gRPC listener, the share of a core that all take, and a call beside them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(2_000 if quick else 8_000, hard // 4 - SPARE_DESCRIPTORS)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fuzz_child", "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    sockets: list[socket.socket] = []
    try:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        host, _, port = ready["h2"].rpartition(":")
        call(ready["h2"], INFER, infer_message())
        before = _rss_bytes(child.pid)
        for _ in range(count):
            one = socket.create_connection((host, int(port)))
            one.sendall(GREETING)
            sockets.append(one)
        time.sleep(0.5)
        held = _rss_bytes(child.pid) - before
        cpu_s = _cpu_s(child.pid)
        time.sleep(QUIET_S)
        share = (_cpu_s(child.pid) - cpu_s) / QUIET_S
        began = time.perf_counter()
        call(ready["h2"], INFER, infer_message())
        took_s = time.perf_counter() - began
    finally:
        for one in sockets:
            one.close()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return [
        Row("connections.idle", count, "1"),
        Row("connections.idle_kib", held / count / 1024, "KiB", "resident memory of the server per connection"),
        Row("connections.idle_cpu_percent", share * 100, "%", "of one core, all of them together"),
        Row("connections.call_beside_ms", took_s * 1e3, "ms", "a new client's first call, connecting included"),
    ]


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
