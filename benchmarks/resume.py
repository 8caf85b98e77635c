"""What an interrupted download costs: the connection cut, and the process killed, at every per cent of a file.

A real HTTP server gives the first part and then closes the connection, or falls silent until the downloading process is
killed with SIGKILL; then the agent's own download goes on. Counted are the bytes that the server sent twice.
"""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import random
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from model_sync.agent.install.fetch import Download, Patience, Remote
from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors, SharedHealth
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES

SIZE_BYTES = 10_000_019
QUICK_SIZE_BYTES = 4_000_037
PIECE_SIZE_BYTES = 64 * 1024
TIMEOUT_S = 20.0
TRIES = 3


class CuttingServer:
    """Serves one blob with ranges. `cut_at`: where the first answer ends; `silent`: it ends by saying no more."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.cut_at = 0
        self.silent = False
        self.spans: list[tuple[int, int]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                return

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                return

        self._released = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def begin(self, cut_at: int, *, silent: bool) -> None:
        """Forget what was sent, and cut the next answer there."""
        self.cut_at, self.silent, self.spans = cut_at, silent, []
        self._released.clear()

    def release(self) -> None:
        """End a silence."""
        self._released.set()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        first, _, last = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(first or 0), int(last) + 1 if last else len(self.data)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(end - start))
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        handler.end_headers()
        stop = self.cut_at if not self.spans else end
        self.spans.append((start, stop))
        with suppress(OSError):
            for at in range(start, stop, PIECE_SIZE_BYTES):
                handler.wfile.write(self.data[at : min(at + PIECE_SIZE_BYTES, stop)])
        if stop < end:
            if self.silent:
                self._released.wait(TIMEOUT_S)
            handler.close_connection = True

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def fetch(url: str, remote: Remote, path: Path) -> None:
    """One download as the agent does it; after a cut without a whole chunk it is tried again, as from HOLD."""
    source = HttpSource(url, tls=None, connect_timeout_s=5.0)
    mirrors = Mirrors([source], SharedHealth(1))
    meter = Meter(path.with_suffix(".spent"), SYSTEM_CLOCK, bytes_per_s_max=0.0, bytes_per_day_max=0)
    patience = Patience(chunk_timeout_s=TIMEOUT_S)
    for _ in range(TRIES):
        with suppress(MeshError):
            Download(remote, path, mirrors, pace=meter, patience=patience, stop=threading.Event()).run()
            break
    source.close()


def run(*, quick: bool) -> list[Row]:
    """The worst of 99 cuts, and of as many kills (9 with `quick`)."""
    size = QUICK_SIZE_BYTES if quick else SIZE_BYTES
    data = random.Random(7).randbytes(size)
    chunks = tuple(
        hashlib.sha256(data[at : at + CHUNK_SIZE_BYTES]).hexdigest() for at in range(0, size, CHUNK_SIZE_BYTES)
    )
    remote = Remote(path="blob", size_bytes=size, sha256=hashlib.sha256(data).hexdigest(), chunks=chunks)
    server = CuttingServer(data)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cut = [_cut(server, remote, Path(folder) / "cut", percent) for percent in range(1, 100)]
            kills = range(5, 100, 10) if quick else range(1, 100)
            killed = [_kill(server, remote, Path(folder) / "killed", percent) for percent in kills]
    finally:
        server.close()
    note = f"{size} B; {sum(cut) / len(cut):.0f} B on the mean"
    return [
        Row("resume.refetched_bytes_max", float(max(cut)), "B", note),
        Row("resume.refetched_after_kill_bytes_max", float(max(killed)), "B", f"{len(killed)} SIGKILLs"),
        Row("resume.cuts", float(len(cut)), "cuts"),
    ]


def _cut(server: CuttingServer, remote: Remote, path: Path, percent: int) -> int:
    server.begin(remote.size_bytes * percent // 100, silent=False)
    fetch(server.url, remote, path)
    return _refetched(server, remote, path)


def _kill(server: CuttingServer, remote: Remote, path: Path, percent: int) -> int:
    cut_at = remote.size_bytes * percent // 100
    server.begin(cut_at, silent=True)
    child = multiprocessing.get_context("spawn").Process(target=fetch, args=(server.url, remote, path))
    child.start()
    whole, deadline = cut_at // CHUNK_SIZE_BYTES * CHUNK_SIZE_BYTES, time.monotonic() + TIMEOUT_S
    while not server.spans or (path.stat().st_size if path.exists() else 0) < whole:
        if time.monotonic() > deadline:
            raise RuntimeError("The download did not come as far as the server let it.")
        time.sleep(0.002)
    child.kill()
    child.join()
    server.release()
    fetch(server.url, remote, path)
    return _refetched(server, remote, path)


def _refetched(server: CuttingServer, remote: Remote, path: Path) -> int:
    """Bytes sent twice per connection beyond the first; the file must be whole, and is removed."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != remote.sha256:
        raise RuntimeError("The resumed file is not the one that the server has.")
    path.unlink()
    twice = sum(stop - start for start, stop in server.spans) - remote.size_bytes
    return twice // max(1, len(server.spans) - 1)
