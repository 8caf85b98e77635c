"""What an agent costs while nothing happens: memory, processor time, bytes on the wire, beside a real sync process.

Two agent processes that have installed a model idle side by side: one as a node runs it (polls, hint, reports), and one
that only polls, through a relay that counts bytes. The counted bytes are those of TLS, handshakes included.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.footprint import read_memory_bytes
from benchmarks.processes import START_TIMEOUT_S
from benchmarks.rows import Row
from benchmarks.swap import MODEL, Releases
from model_sync.agent.status import read_status
from model_sync.publisher.control_client import connect
from model_sync.publisher.keys import init_keys
from model_sync.publisher.push import push
from nearcast.identity import join

POLL_S = 60.0
QUICK_POLL_S = 4.0
"""Of the agent whose bytes are counted, in a quick run: 60 s would leave nothing to count."""
SETTLE_S = 2.0
PIECE_SIZE_BYTES = 64 * 1024


class Relay:
    """Copies bytes between clients and one server, and counts them in both directions."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or 443))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.carried_bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more clients."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._server) as server:
            other = {client: server, server: client}
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    piece = ready.recv(PIECE_SIZE_BYTES)
                    if not piece:
                        return
                    self.carried_bytes += len(piece)
                    other[ready].sendall(piece)


@contextlib.contextmanager
def ready_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`python -m ARGUMENTS` and its ready line, until the block ends."""
    child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if not select.select([child.stdout], [], [], START_TIMEOUT_S)[0]:
            raise RuntimeError(f"{arguments[0]} was not ready within {START_TIMEOUT_S:g} s")
        yield child, json.loads(child.stdout.readline())
    finally:
        child.terminate()
        child.wait(START_TIMEOUT_S)
        if child.stdout is not None:
            child.stdout.close()


@dataclass(frozen=True, slots=True)
class Idle:
    """What one agent took in the time that it was watched."""

    rss_bytes: int
    cpu_share: float
    polls: int


def run(*, quick: bool) -> list[Row]:
    """Watch two idle agents: 30 s, or five minutes."""
    watched_s, polls_s = (30.0, QUICK_POLL_S) if quick else (300.0, POLL_S)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = folder / "home"
        init_keys(home)
        with ready_process("nearcast", "sync", "--home", str(home / "sync"), "--set=telemetry.level=error") as (
            _,
            sync,
        ):
            releases = Releases(folder)
            publish(home, releases, 1)
            relay = Relay(sync["control"])
            whole = node_settings(home, folder, "edge-1", f"control={sync['control']}", f"poll_s={POLL_S}")
            bare = node_settings(home, folder, "edge-2", f"repository={relay.url}/repository", f"poll_s={polls_s}")
            with ready_process("model_sync.agent", *whole) as (one, _), ready_process("model_sync.agent", *bare):
                for node in ("edge-1", "edge-2"):
                    until_installed(folder / node / "models", 1)
                time.sleep(SETTLE_S)
                before = relay.carried_bytes
                idle = watch(one.pid, folder / "edge-2" / "models", watched_s)
                carried = relay.carried_bytes - before
                first_bytes = received_bytes(folder / "edge-1" / "models")
                saved = publish(home, releases, 2)
                until_installed(folder / "edge-1" / "models", 2)
                second_bytes = received_bytes(folder / "edge-1" / "models") - first_bytes
                if saved <= 0 or second_bytes > first_bytes / 2:
                    raise RuntimeError(f"the second release came without its delta: {second_bytes} bytes")
                time.sleep(SETTLE_S)
                patched_bytes = read_memory_bytes(one.pid)
            relay.close()
    return [
        Row("agent_idle.rss_mb", idle.rss_bytes / 1e6, "MB", "greatest seen; polls of 60 s, hint and reports on"),
        Row(
            "agent_idle.rss_after_delta_mb",
            patched_bytes / 1e6,
            "MB",
            f"after a delta of {second_bytes} bytes",
        ),
        Row("agent_idle.cpu_percent", idle.cpu_share * 100, "%", f"over {watched_s:g} s"),
        Row("agent_idle.bytes_per_poll", carried / max(1, idle.polls), "B", f"{idle.polls} polls over TLS, both ways"),
    ]


def publish(home: Path, releases: Releases, release: int) -> int:
    """One small release as stable; returns what a delta to it from the one before saves."""
    with connect(home) as client:
        pushed = push(releases.make(release), client, home / "operator", channel="stable")
    return sum(way.file_size_bytes - way.size_bytes for way in pushed.deltas if way.base_release is not None)


def node_settings(home: Path, folder: Path, node: str, *settings: str) -> list[str]:
    """Let a node join; returns the arguments of its agent."""
    identity = folder / node / "identity"
    with connect(home) as client:
        token = client.call("POST", "/v1/invites", {"name": node, "role": "edge", "ttl_s": 60.0})["token"]
    join(str(token), identity)
    given = [*settings, f"node={node}", f"identity={identity}", f"store={folder / node / 'models'}", "probation_s=0.5"]
    return [part for setting in (*given, "log_level=error") for part in ("--set", setting)]


def until_installed(store: Path, release: int) -> None:
    """Wait for a release to be stable.

    Raises:
        RuntimeError: if it does not come.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        status = read_status(store)
        model = status.models.get(MODEL) if status is not None else None
        if model is not None and model.state == "IDLE" and model.stable == release:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"release {release} was not installed within {START_TIMEOUT_S:g} s: {status}")
        time.sleep(0.1)


def received_bytes(store: Path) -> int:
    """What an agent has downloaded of the model since it was started."""
    status = read_status(store)
    return status.models[MODEL].received_bytes if status is not None else 0


def watch(pid: int, polled: Path, seconds: float) -> Idle:
    """Memory and processor time of one process; polls of the agent of the store `polled`."""
    began, cpu_s, rss, polls = time.monotonic(), read_run_s(pid), 0, set()
    first = read_status(polled)
    while time.monotonic() - began < seconds:
        rss = max(rss, read_memory_bytes(pid))
        status = read_status(polled)
        if status is not None:
            polls.add(status.checked_at)
        time.sleep(0.1)
    used_s = read_run_s(pid) - cpu_s
    known = {first.checked_at} if first is not None else set()
    return Idle(rss_bytes=rss, cpu_share=used_s / (time.monotonic() - began), polls=len(polls - known))


def read_run_s(pid: int) -> float:
    """Seconds that the threads of a process have run, to the nanosecond: the ticks of `stat` are too coarse here."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
