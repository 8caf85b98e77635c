"""A broker for this node: Mosquitto where it is installed, else the embedded one for a demo on this machine.

It runs as a child of the node, unprivileged, with a configuration of ours; without certificates on loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Literal, TypeAlias

from edge_node.broker.configuration import BrokerLimits, TlsListener, mosquitto_config
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


class Broker:
    """A running broker child. Made by `start`."""

    def __init__(
        self, kind: Kind, host: str, port: int, folder: Path, limits: BrokerLimits, tls: TlsListener | None = None
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self._folder = folder
        self._limits = limits
        self._tls = tls
        self._process: asyncio.subprocess.Process | None = None
        self._restarting = asyncio.Lock()

    @classmethod
    async def start(
        cls,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        kind: Kind | None = None,
        tls: TlsListener | None = None,
        limits: BrokerLimits | None = None,
    ) -> Broker:
        """Start a broker and wait until it accepts connections.

        Args:
            folder: for its configuration, its log and what it persists.
            host: where to listen; without `tls` a loopback address: anonymous devices are for this machine only.
            port: 0 = a free one.
            kind: which one; None = Mosquitto if it is installed, else the embedded one.
            tls: take nobody without a certificate. Only Mosquitto can.
            limits: bounds.

        Raises:
            MeshError: INVALID_REQUEST for an address that others can reach, UNSUPPORTED if no broker is installed that
                can do this, UNAVAILABLE if it does not start.
        """
        if tls is None and not is_loopback(host):
            raise MeshError(
                Code.INVALID_REQUEST,
                f"The node's own broker takes devices without a password and listens on loopback only, not on {host}; "
                "name a running one with mqtt.broker, or give the tenant one of its own with mqtt.tenant_brokers.",
            )
        limits = limits or BrokerLimits()
        chosen = kind or find_broker()
        if tls is not None and chosen != "mosquitto":
            raise MeshError(Code.UNSUPPORTED, "Only Mosquitto can check certificates; run `apt-get install mosquitto`.")
        folder.mkdir(parents=True, exist_ok=True)
        problem = ""
        for _ in range(limits.start_attempts_max if port == 0 else 1):
            broker = cls(chosen, host, port or _free_port(host), folder, limits, tls)
            problem = await broker.launch()
            if not problem:
                return broker
        raise MeshError(Code.UNAVAILABLE, f"The MQTT broker did not start: {problem}")

    @property
    def url(self) -> str:
        """`mqtt://host:port`, or `mqtts://host:port`."""
        return f"{'mqtt' if self._tls is None else 'mqtts'}://{self.host}:{self.port}"

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
        """Return the child's exit code when it ends; a restart is no end."""
        while True:
            ended = self._process
            assert ended is not None
            code = await ended.wait()
            async with self._restarting:
                if self._process is ended:
                    return code

    async def restart(self) -> str:
        """Let the child save and end, and start it again at once; its sessions go on. Returns as `launch` does."""
        async with self._restarting:
            await self._end(signal.SIGTERM, self._limits.save_timeout_s)
            return await self.launch()

    def trim_log(self) -> None:
        """Empty the log if it is too long: whoever reaches the port can have a line written."""
        if self._log_path.stat().st_size > self._limits.log_bytes_max:
            os.truncate(self._log_path, 0)  # the child appends

    async def kill(self) -> None:
        """End the child without warning, as a crash would."""
        await self._end(signal.SIGKILL, self._limits.stop_timeout_s)

    async def stop(self) -> None:
        """Let the child save and end."""
        await self._end(signal.SIGTERM, self._limits.stop_timeout_s)

    @property
    def _log_path(self) -> Path:
        return self._folder / "broker.log"

    async def _end(self, number: signal.Signals, timeout_s: float) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            async with asyncio.timeout(timeout_s):
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
        binary = mosquitto_path()
        assert binary is not None
        store = self._folder / "store"
        store.mkdir(exist_ok=True)
        path = self._folder / "mosquitto.conf"
        path.write_text(mosquitto_config(self.host, self.port, store, self._limits, self._tls))
        return tied_to_parent([binary, "-c", str(path)])

    def _iotcore(self) -> list[str]:
        return [sys.executable, "-m", "edge_node.embedded_broker", self.host, str(self.port)]


def find_broker() -> Kind:
    """Which broker this machine can run.

    Raises:
        MeshError: UNSUPPORTED with a line that says what to install.
    """
    if mosquitto_path() is not None:
        return "mosquitto"
    if importlib.util.find_spec("iotcore") is not None:
        return "iotcore"
    raise MeshError(Code.UNSUPPORTED, INSTALL_HINT)


def mosquitto_path() -> str | None:
    """Where Mosquitto is; None if it is not installed."""
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
