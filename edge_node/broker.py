"""A broker for this node: Mosquitto where it is installed, else the embedded one for a demo on this machine.

It runs as a child of the node, unprivileged, with a configuration of ours, on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from nearcast.errors import Code, MeshError
from nearcast.runtime import is_loopback
from nearcast.telemetry import get_logger
from router.child import tied_to_parent

Kind: TypeAlias = Literal["mosquitto", "iotcore"]
INSTALL_HINT = (
    "No MQTT broker is installed; run `apt-get install mosquitto`, or `pip install 'nearcast[embedded-broker]'` for a "
    "demo, or name a running one with mqtt.broker."
)
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin")
_log = get_logger("nearcast.broker")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """Bounds of the generated broker configuration and of its start.

    `packet_bytes_max` leaves room around the largest payload that the worker takes, so that a request that is a little
    too large gets the answer 413 and not a cut connection.
    """

    packet_bytes_max: int = 9 * 1024 * 1024
    inflight_messages_max: int = 100
    queued_messages_max: int = 100_000
    queued_bytes_max: int = 256 * 1024 * 1024
    autosave_interval_s: int = 5
    client_expiration: str = "7d"
    start_timeout_s: float = 5.0
    start_attempts_max: int = 5
    stop_timeout_s: float = 3.0


class Broker:
    """A running broker child. Made by `start`."""

    def __init__(self, kind: Kind, host: str, port: int, folder: Path, limits: BrokerLimits) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self._folder = folder
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(
        cls,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        kind: Kind | None = None,
        limits: BrokerLimits | None = None,
    ) -> Broker:
        """Start a broker and wait until it accepts connections.

        Args:
            folder: for its configuration, its log and what it persists.
            host: a loopback address. Anonymous devices are for this machine only.
            port: 0 = a free one.
            kind: which one; None = Mosquitto if it is installed, else the embedded one.
            limits: bounds.

        Raises:
            MeshError: INVALID_REQUEST for an address that others can reach, UNSUPPORTED if no broker is installed,
                UNAVAILABLE if it does not start.
        """
        if not is_loopback(host):
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The node's own broker takes devices without a password and listens on loopback only, not on {host}; "
                "run a broker with certificates there and name it with mqtt.broker.",
            )
        limits = limits or BrokerLimits()
        chosen = kind or find_broker()
        folder.mkdir(parents=True, exist_ok=True)
        problem = ""
        for _ in range(limits.start_attempts_max if port == 0 else 1):
            broker = cls(chosen, host, port or _free_port(host), folder, limits)
            problem = await broker.launch()
            if not problem:
                return broker
        raise MeshError(Code.UNAVAILABLE, f"The MQTT broker did not start: {problem}")

    @property
    def url(self) -> str:
        """`mqtt://host:port`."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the child; 0 if it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def launch(self) -> str:
        """Start the child on the same port, or start it again. Returns "" once it is ready, else what went wrong."""
        if not _is_free(self.host, self.port):
            return f"{self.host}:{self.port} is in use."
        command = self._mosquitto() if self.kind == "mosquitto" else self._iotcore()
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        deadline = asyncio.get_running_loop().time() + self._limits.start_timeout_s
        while asyncio.get_running_loop().time() < deadline:
            if self._process.returncode is not None:
                return f"it ended with {self._process.returncode}: {self._last_words()}"
            if await self._listens():
                _log.info("broker ready", kind=self.kind, url=self.url)
                return ""
            await asyncio.sleep(0.01)
        await self.stop()
        return f"it did not listen on {self.host}:{self.port} within {self._limits.start_timeout_s} s"

    async def wait(self) -> int:
        """Return the child's exit code when it ends."""
        assert self._process is not None
        return await self._process.wait()

    async def kill(self) -> None:
        """End the child without warning, as a crash would."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Let the child save and end."""
        await self._end(signal.SIGTERM)

    @property
    def _log_path(self) -> Path:
        return self._folder / "broker.log"

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            async with asyncio.timeout(self._limits.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1][-200:] if lines else "it said nothing"

    def _mosquitto(self) -> list[str]:
        binary = _mosquitto_path()
        assert binary is not None
        store = self._folder / "store"
        store.mkdir(exist_ok=True)
        path = self._folder / "mosquitto.conf"
        path.write_text(mosquitto_config(self.host, self.port, store, self._limits))
        return tied_to_parent([binary, "-c", str(path)])

    def _iotcore(self) -> list[str]:
        return [sys.executable, "-m", "edge_node.embedded_broker", self.host, str(self.port)]


def find_broker() -> Kind:
    """Which broker this machine can run.

    Raises:
        MeshError: UNSUPPORTED with a line that says what to install.
    """
    if _mosquitto_path() is not None:
        return "mosquitto"
    if importlib.util.find_spec("iotcore") is not None:
        return "iotcore"
    raise MeshError(Code.UNSUPPORTED, INSTALL_HINT)


def mosquitto_config(host: str, port: int, store: Path, limits: BrokerLimits) -> str:
    """Configuration of a broker for anonymous devices on this machine."""
    lines = [
        "per_listener_settings false",
        f"listener {port} {host}",
        "allow_anonymous true",
        "set_tcp_nodelay true",  # without it every QoS 1 answer waits 40 ms for a delayed ACK
        f"max_packet_size {limits.packet_bytes_max}",
        f"max_inflight_messages {limits.inflight_messages_max}",
        f"max_queued_messages {limits.queued_messages_max}",
        f"max_queued_bytes {limits.queued_bytes_max}",
        "persistence true",
        f"persistence_location {store}/",
        f"autosave_interval {limits.autosave_interval_s}",
        f"persistent_client_expiration {limits.client_expiration}",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
    ]
    if os.geteuid() == 0:
        # As root it would drop to a user of its own, who cannot write our folder.
        lines.append(f"user {getpass.getuser()}")
    return "\n".join(lines) + "\n"


def _mosquitto_path() -> str | None:
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS])
    return shutil.which("mosquitto", path=folders)


def _is_free(host: str, port: int) -> bool:
    """Whether the port can be bound: otherwise whoever holds it would be taken for our child."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
