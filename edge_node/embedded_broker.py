"""The broker of the `iotcore` wheel (rumqttd) as a child process, for a demo on one machine.

It ignores client certificates and knows no access rules, so it listens on loopback and on nothing else. It ends when
its stdin closes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from nearcast.runtime import ExitCode, format_address, is_loopback

NODELAY_INTERVAL_S = 0.1
CONNECTIONS_MAX = 1024
PACKET_BYTES_MAX = 9 * 1024 * 1024
"""A little more than the largest payload that the worker takes."""

_CONFIG = """
id = 0
[router]
id = 0
max_connections = {connections}
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5-1"
listen = "{listen}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {packet}
max_inflight_count = 100
dynamic_filters = true
"""


def main(arguments: list[str]) -> int:
    """Run until the parent goes away. Arguments: host, port."""
    host, port = arguments[0], int(arguments[1])
    if not is_loopback(host):
        sys.stderr.write(f"the embedded broker has no access control and listens on loopback only, not on {host}\n")
        return ExitCode.CONFIG
    from iotcore import Broker

    address = format_address("127.0.0.1" if host == "localhost" else host, port)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_disable_nagle, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="nearcast-broker-") as folder:
        path = Path(folder) / "rumqttd.toml"
        path.write_text(_CONFIG.format(connections=CONNECTIONS_MAX, listen=address, packet=PACKET_BYTES_MAX))
        Broker(config_path=str(path)).run_forever()
    return ExitCode.OK


def _end_with_parent() -> None:
    """The parent holds our stdin open; when it is gone, so are we."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _disable_nagle() -> None:
    """Rumqttd leaves Nagle on, which costs 40 ms an answer; its sockets are ours to set, being in our process."""
    seen: dict[str, str] = {}
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return
    while True:
        found: dict[str, str] = {}
        for entry in folder.iterdir():
            try:
                found[entry.name] = target = str(entry.readlink())
            except OSError:
                continue
            if target.startswith("socket:") and seen.get(entry.name) != target:
                _set_nodelay(int(entry.name))
        seen = found
        time.sleep(NODELAY_INTERVAL_S)


def _set_nodelay(descriptor: int) -> None:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        return  # closed meanwhile


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
