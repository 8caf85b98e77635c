"""A whole mesh on this machine as one tree of child processes. `nearcast up` and `nearcast demo` run on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec

from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from edge_node.broker import Broker

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
INVITE_TTL_S = 600.0
LOG_TAIL_BYTES = 400
LINE_SIZE_BYTES_MAX = 64 * 1024
_LISTENERS = ("grpc", "http", "metrics", "mesh")
Count = Annotated[int, msgspec.Meta(ge=0, le=16)]


class MeshConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mesh on one machine.

    Attributes:
        data_dir: keys, models, inboxes and logs of all processes.
        edges, cloud, router: how many of each.
        broker: whether the first edge node gets an MQTT broker and answers devices.
        first_ports: give the first edge node the usual ports 8000 to 8002; all others get free ones.
        edge_settings, cloud_settings, router_settings: `section.key=value` for every process of the kind.
    """

    data_dir: str = ".nearcast/mesh"
    edges: Count = 2
    cloud: Count = 1
    router: Count = 1
    broker: bool = True
    first_ports: bool = True
    edge_settings: tuple[str, ...] = ()
    cloud_settings: tuple[str, ...] = ()
    router_settings: tuple[str, ...] = ()


@dataclass(slots=True)
class Process:
    """One child: `nearcast ARGUMENTS`, its log, and where it listens once it is ready."""

    name: str
    arguments: list[str]
    log: Path
    addresses: dict[str, str] = field(default_factory=dict)
    child: asyncio.subprocess.Process | None = None
    _drain: asyncio.Task[None] | None = None

    async def start(self, *extra: str, line: str = "") -> None:
        """Start it, give it a line on standard input if there is one, and wait for its ready line.

        Raises:
            MeshError: UNAVAILABLE with the end of its log if it ends or stays silent.
        """
        from router.child import tied_to_parent

        command = tied_to_parent([sys.executable, "-m", "nearcast", *self.arguments, *extra])
        with self.log.open("ab") as log:
            self.child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE if line else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                limit=LINE_SIZE_BYTES_MAX,
            )
        if self.child.stdin is not None:
            self.child.stdin.write(line.encode() + b"\n")
            self.child.stdin.close()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                self.addresses = await self._ready()
        except TimeoutError as error:
            raise MeshError(
                Code.UNAVAILABLE, f"{self.name} was not ready within {READY_TIMEOUT_S:g} s; see {self.log}."
            ) from error
        self._drain = asyncio.get_running_loop().create_task(self._discard_output())

    @property
    def running(self) -> bool:
        """Whether the child lives."""
        return self.child is not None and self.child.returncode is None

    def send(self, number: int) -> None:
        """Signal it and what it started in its group; nothing happens if it has ended."""
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)

    async def end(self) -> None:
        """Wait for its end; after the timeout, kill it."""
        if self.child is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.child.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.child.wait()
        if self._drain is not None:
            await self._drain
            self._drain = None

    async def _ready(self) -> dict[str, str]:
        assert self.child is not None
        assert self.child.stdout is not None
        while line := await self.child.stdout.readline():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "ready" in found:
                    return {name: str(value) for name, value in found.items() if name != "ready"}
        code = await self.child.wait()
        raise MeshError(Code.UNAVAILABLE, f"{self.name} ended with {code} before it was ready: {self._last_words()}")

    def _last_words(self) -> str:
        text = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return text.splitlines()[-1].removeprefix("nearcast: ") if text else "its log is empty."

    async def _discard_output(self) -> None:
        assert self.child is not None
        assert self.child.stdout is not None
        while await self.child.stdout.read(LINE_SIZE_BYTES_MAX):
            pass


class Mesh:
    """A running mesh. Names: `sync`, `broker`, `cloud-1`…, `edge-1`…, `router-1`….

    Attributes:
        addresses: where each process listens, by name and kind: `addresses["edge-1"]["grpc"]` is `host:port`.
        operator_home: what `NEARCAST_HOME` must be for operator commands.
        logs: folder with one log per process.
    """

    def __init__(self, config: MeshConfig) -> None:
        self.config = config
        self.data_dir = Path(config.data_dir).absolute()
        self.operator_home = self.data_dir / "home"
        self.logs = self.data_dir / "logs"
        self._processes: dict[str, Process] = {}
        self._broker: Broker | None = None

    @classmethod
    async def start(
        cls, data_dir: Path, *, edges: int = 2, cloud: int = 1, router: int = 1, config: MeshConfig | None = None
    ) -> Self:
        """Start a mesh in `data_dir`, with new keys or those of an earlier start, and wait until all of it is ready.

        `config` replaces the counts and everything else but the folder.

        Raises:
            MeshError: UNAVAILABLE naming the process that did not come up, and its log. Nothing is left running then.
        """
        wanted = config or MeshConfig(edges=edges, cloud=cloud, router=router, first_ports=False)
        mesh = cls(msgspec.structs.replace(wanted, data_dir=str(data_dir)))
        try:
            await mesh._come_up()  # its own constructor
        except BaseException:
            await mesh.stop()
            raise
        return mesh

    @property
    def addresses(self) -> dict[str, dict[str, str]]:
        """Where each process listens, by name and kind."""
        out = {name: process.addresses for name, process in self._processes.items()}
        return out if self._broker is None else {"broker": {"mqtt": _place(self._broker.url)}, **out}

    def pid(self, name: str) -> int:
        """Process id of a child.

        Raises:
            MeshError: INVALID_REQUEST if there is no such process.
        """
        if name == "broker" and self._broker is not None:
            return self._broker.pid
        child = self._process(name).child
        return 0 if child is None else child.pid

    def is_running(self, name: str) -> bool:
        """Whether a process lives."""
        if name == "broker" and self._broker is not None:
            return self._broker.pid != 0
        return self._process(name).running

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process.

        Raises:
            MeshError: INVALID_REQUEST if there is no such process.
        """
        if name == "broker" and self._broker is not None:
            os.kill(self._broker.pid, number)
        else:
            self._process(name).send(number)

    async def restart(self, name: str) -> None:
        """Start a process again that has ended, with its data and on its former addresses.

        Raises:
            MeshError: UNAVAILABLE if it does not come up.
        """
        if name == "broker" and self._broker is not None:
            await self._broker.wait()
            if problem := await self._broker.launch():
                raise MeshError(Code.UNAVAILABLE, f"The broker did not start: {problem}")
            return
        process = self._process(name)
        await process.end()
        places = [("listen." + kind, process.addresses[kind]) for kind in _LISTENERS if kind in process.addresses]
        await process.start(*_settings([f"{key}={address}" for key, address in places]))

    async def wait(self) -> str:
        """Return the name of the first process that ends by itself."""
        names = list(self._processes)
        tasks = [asyncio.ensure_future(_ended(self._processes[name])) for name in names]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(name for name, task in zip(names, tasks, strict=True) if task.done())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """End all processes: nodes first, so that they can say goodbye, then the broker and the controller."""
        nodes = [process for name, process in self._processes.items() if name != "sync"]
        for process in nodes:
            process.send(signal.SIGTERM)
        await asyncio.gather(*(process.end() for process in nodes))
        if self._broker is not None:
            await self._broker.stop()
        if "sync" in self._processes:
            self._processes["sync"].send(signal.SIGTERM)
            await self._processes["sync"].end()

    async def _come_up(self) -> None:
        config = self.config
        self.logs.mkdir(parents=True, exist_ok=True)
        if not (self.operator_home / "operator").exists():
            from model_sync.publisher.keys import init_keys

            await asyncio.to_thread(init_keys, self.operator_home, "core")
        await self._add("sync", ["sync", "--home", str(self.operator_home / "sync")]).start()
        if config.broker and config.edges:
            from edge_node.broker import Broker

            self._broker = await Broker.start(self.data_dir / "broker")
        kinds = (("cloud", config.cloud), ("edge", config.edges), ("router", config.router))
        names = [(kind, f"{kind}-{number}") for kind, count in kinds for number in range(1, count + 1)]
        tokens = await asyncio.to_thread(self._invite, names)
        settings = {"cloud": config.cloud_settings, "edge": config.edge_settings, "router": config.router_settings}
        starts = []
        for kind, name in names:
            node = self._add(name, [kind, *_settings([*self._node_settings(name), *settings[kind]])])
            # Not as an argument: everyone on this machine can see those.
            starts.append(node.start("--join", "-", line=tokens[name]) if name in tokens else node.start())
        await _all(starts)

    def _node_settings(self, name: str) -> list[str]:
        out = [f"name={name}", f"data_dir={self.data_dir / name}"]
        if not (self.config.first_ports and name == "edge-1"):
            out += [f"listen.{kind}=127.0.0.1:0" for kind in _LISTENERS]
        if name == "edge-1" and self._broker is not None:
            out.append(f"mqtt.broker={self._broker.url}")
        return out

    def _invite(self, names: Sequence[tuple[str, str]]) -> dict[str, str]:
        """A token for each node that has not joined yet. Blocks."""
        from model_sync.publisher.control_client import connect

        out = {}
        with connect(self.operator_home, self._processes["sync"].addresses["control"]) as client:
            for role, name in names:
                if not (self.data_dir / name / "identity" / "node.pem").exists():
                    body = {"name": name, "role": role, "ttl_s": INVITE_TTL_S}
                    out[name] = str(client.call("POST", "/v1/invites", body)["token"])
        return out

    def _add(self, name: str, arguments: list[str]) -> Process:
        process = self._processes[name] = Process(name, arguments, self.logs / f"{name}.log")
        return process

    def _process(self, name: str) -> Process:
        try:
            return self._processes[name]
        except KeyError:
            known = ", ".join(self.addresses)
            raise MeshError(Code.INVALID_REQUEST, f"There is no process {name!r}; there are {known}.") from None


def _settings(pairs: Sequence[str]) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def _place(url: str) -> str:
    return url.partition("://")[2]


async def _ended(process: Process) -> None:
    assert process.child is not None
    await process.child.wait()


async def _all(starts: Sequence[Any]) -> None:
    """Await all; the first failure is raised after the others have come to an end too."""
    for result in await asyncio.gather(*starts, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
