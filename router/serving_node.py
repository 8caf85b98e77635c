"""What an edge node and a cloud core share: store, model host, router, listeners, agent child, announcement."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from nearcast.clock import SYSTEM_CLOCK
from nearcast.config import load_config
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, join, load_identity, server_tls
from nearcast.load import Tier
from nearcast.runtime import Shutdown, announce
from nearcast.serving import ModelHost
from nearcast.serving.control import ControlSocket
from nearcast.store import Store
from nearcast.telemetry import Telemetry, TelemetryConfig, get_logger
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Server
from router.child import Child
from router.config import ProbeConfig
from router.control import ControlLink, find_control
from router.directory import Announcer, DirectoryReader
from router.policy import Policy
from router.policy.config import PolicyConfig
from router.router import Router
from router.splits import StoreSplits
from router.targets import ChannelFactory, TargetSet

C = TypeVar("C", bound=msgspec.Struct)
AGENT_NICE = 10
_log = get_logger("nearcast.node")


class ListenConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a node listens. Port 0 = the system chooses.

    Attributes:
        grpc, http: for clients; other addresses than loopback need `tls`.
        metrics: Prometheus; "" = nowhere.
        mesh: for other nodes, always with client certificates; opened only by a node with an identity.
        tls: show the node's mesh certificate to clients too.
        transport: which implementation of gRPC.
    """

    grpc: str = "127.0.0.1:8001"
    http: str = "127.0.0.1:8000"
    metrics: str = "127.0.0.1:8002"
    mesh: str = "127.0.0.1:0"
    tls: bool = False
    transport: Literal["ngh2", "grpcio"] = "ngh2"


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sync agent that a node with an identity runs beside itself.

    Attributes:
        channel: which channel document it follows.
        poll_s: mean seconds between looks at the repository, where no hint comes.
        probation_s: how long a new version is watched before it is committed.
        repository: URL of a mirror; "" = the controller's repository.
    """

    enabled: bool = True
    channel: str = "stable"
    poll_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    probation_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    repository: str = ""


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node that holds models.

    Attributes:
        name: this node's name where it has no identity; with one, the certificate's name counts.
        data_dir: identity, models, control socket, inbox, logs of children.
        seed: of the router's choices between near ties; 0 = a different one at each start.
        drain_s: how long requests may take to finish at the end.
    """

    name: str = "node"
    data_dir: str = ".nearcast/node"
    listen: ListenConfig = ListenConfig()
    agent: AgentSettings = AgentSettings()
    policy: PolicyConfig = PolicyConfig()
    probe: ProbeConfig = ProbeConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    seed: int = 0
    drain_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0


class WatchedHost(ModelHost):
    """A model host that tells when it has followed the pointers, so that the router sees a switch at once."""

    on_refresh: Callable[[str | None], None] = staticmethod(lambda _model: None)

    async def refresh(self, model: str | None = None) -> None:
        """Follow the pointers, then tell."""
        try:
            await super().refresh(model)
        finally:
            self.on_refresh(model)


async def load_or_join(folder: Path, token: str, role: str) -> Identity | None:
    """The identity in `folder`; made by joining with `token` if there is none yet; None without either.

    Raises:
        MeshError: if the identity cannot be read, is of another role, or the token does not open the door.
    """
    if (folder / "node.pem").exists():
        identity = load_identity(folder)
    elif token:
        identity = await asyncio.to_thread(join, token, folder)
    else:
        return None
    if identity.role != role:
        raise MeshError(
            Code.INVALID_REQUEST, f"{folder} holds an identity of a {identity.role}; this process is a {role}."
        )
    return identity


class ServingNode:
    """Everything between the store and the listeners. Made and run by `edge_node.app` and `cloud_core.app`.

    Args:
        config: the node's settings.
        telemetry: of this process.
        role: `edge` or `cloud`.
        tier: what this node is to its own clients.
        identity: who it is in the mesh; None = it stands alone: no mesh listener, no agent, no other targets.
        find_targets: whether requests may be sent to other nodes.
    """

    def __init__(
        self,
        config: ServingConfig,
        telemetry: Telemetry,
        *,
        role: Literal["edge", "cloud"],
        tier: Tier,
        identity: Identity | None,
        find_targets: bool,
    ) -> None:
        self.config = config
        self.identity = identity
        self.name = config.name if identity is None else identity.name
        self.data_dir = Path(config.data_dir)
        self.addresses: dict[str, str] = {}
        self._role = role
        self._find_targets = find_targets
        self._telemetry = telemetry
        self.store = Store(self.data_dir / "models")
        registry = telemetry.registry
        self.host = WatchedHost(self.store, node=self.name, tier=tier, role=role, registry=registry)
        seed = config.seed or random.SystemRandom().getrandbits(48)
        self.router = Router(
            Policy(config.policy, seed),
            local=self.host,
            splits=StoreSplits(self.store),
            node=self.name,
            clock=SYSTEM_CLOCK,
            registry=registry,
        )
        self._draining = AsyncExitStack()

    @property
    def control_url(self) -> str:
        """Where the controller is; "" for a node that stands alone."""
        return "" if self.identity is None else find_control(self.data_dir / "identity")

    async def start(self) -> None:
        """Open everything, in the order in which the parts need each other. `drain` undoes it in reverse.

        Raises:
            MeshError: if an address is taken or not allowed.
        """
        await self.host.start()
        self._draining.push_async_callback(self.host.close)
        self.host.on_refresh = self.router.observe_local
        await self.router.start()
        self._draining.push_async_callback(self.router.close)
        control = ControlSocket(self.host, self.data_dir / "host.sock")
        await control.start()
        self._draining.push_async_callback(control.close)
        await self._listen_for_clients()
        if self.identity is not None:
            await self._listen_for_mesh(self.identity)
            self._start_agent()
        if self.config.listen.metrics:
            self.addresses["metrics"] = await self._telemetry.serve_metrics(self.config.listen.metrics)
            self._draining.push_async_callback(self._telemetry.close)

    async def serve(self, shutdown: Shutdown, **more: str) -> None:
        """Tell the parent and the mesh that the node is ready; return when it is to end.

        Args:
            shutdown: ends it.
            more: addresses besides those of the node's own listeners, such as `mqtt`.
        """
        self.addresses |= more
        if self.identity is not None:
            await self._join_mesh(self.identity)
        announce(self.name, **self.addresses)
        _log.info("node_ready", node=self.name, role=self._role, **self.addresses)
        await shutdown.wait()

    async def drain(self) -> None:
        """Finish what is in flight and close everything."""
        await self._draining.aclose()

    async def _listen_for_clients(self) -> None:
        listen = self.config.listen
        shown = self.identity if listen.tls else None
        methods = oip_methods(self.router, self.router, server_name=self.name, trusted=False, report=self.host.report)
        server = make_server(listen.transport, methods, address=listen.grpc, identity=shown)
        self.addresses["grpc"] = await self._open(server)
        tls = None if shown is None else server_tls(shown, require_client=False, alpn=("http/1.1",))
        rest = RestServer(
            self.router,
            self.router,
            address=listen.http,
            server_name=self.name,
            tls=tls,
            report=self.host.report,
        )
        self.addresses["http"] = await self._open(rest)

    async def _listen_for_mesh(self, identity: Identity) -> None:
        listen = self.config.listen
        inference = oip_methods(self.router, self.host, server_name=self.name, trusted=True, report=self.host.report)
        methods = join_methods(inference, mesh_methods(self.host.report))
        server = make_server(listen.transport, methods, address=listen.mesh, identity=identity, require_client=True)
        self.addresses["mesh"] = await self._open(server)

    async def _open(self, server: Server | RestServer) -> str:
        await server.start()
        self._draining.push_async_callback(server.drain, self.config.drain_s)
        return server.address

    def _start_agent(self) -> None:
        """The agent writes the store at low priority; without it everything else goes on."""
        if not self.config.agent.enabled:
            return
        path = self.data_dir / "agent.toml"
        path.write_text(self._agent_toml())
        command = [sys.executable, "-m", "model_sync.agent", "--config", str(path)]
        child = Child("agent", command, log=self.data_dir / "logs" / "agent.log", nice=AGENT_NICE)
        child.start()
        self._draining.push_async_callback(child.stop)

    def _agent_toml(self) -> str:
        settings = self.config.agent
        values: dict[str, str | float] = {
            "node": self.name,
            "role": self._role,
            "control": self.control_url,
            "repository": settings.repository,
            "identity": str(self.data_dir.resolve() / "identity"),
            "store": str(self.data_dir.resolve() / "models"),
            "host_socket": str(self.data_dir.resolve() / "host.sock"),
            "channel": settings.channel,
            "poll_s": settings.poll_s,
            "probation_s": settings.probation_s,
            "log_level": self.config.telemetry.level,
        }
        # JSON's strings and numbers are TOML's too.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

    async def _join_mesh(self, identity: Identity) -> None:
        """Tell the controller where this node is, and learn where the others are."""
        if not self.control_url:
            return
        probe = self.config.probe
        link = ControlLink(self.control_url, identity)
        self._draining.push_async_callback(link.close)
        if self._find_targets:
            make = ChannelFactory(self.config.listen.transport, identity)
            targets = TargetSet(self.router, make, config=probe)
            self._draining.push_async_callback(targets.close)
            reader = DirectoryReader(link, targets, interval_s=probe.directory_ms / 1e3)
            self._draining.push_async_callback(reader.close)
            await reader.start()
        announcer = Announcer(link, addresses=self.addresses, models=self._models, interval_s=probe.announce_ms / 1e3)
        self._draining.push_async_callback(announcer.close)
        await announcer.start()

    def _models(self) -> dict[str, list[str]]:
        """What the directory shows: the hot versions of each model."""
        out: dict[str, list[str]] = {}
        for version in self.host.report().versions:
            if version.residency == "hot":
                out.setdefault(version.model, []).append(version.version)
        return out


def load_arguments(kind: type[C], program: str) -> tuple[C, str]:
    """The configuration and the join token of a node's command line: `--config`, `--join`, `--set`."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--join", default="", metavar="TOKEN", help="join the mesh with this token")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    chosen = parser.parse_args()
    return read_config(kind, chosen.config, chosen.set), chosen.join


def read_config(kind: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    """The layered configuration of a node.

    Raises:
        ConfigError: for an unknown key or a value that does not fit.
    """
    # NEARCAST_HOME is the operator's folder, not a setting of this process.
    environ = {key: value for key, value in os.environ.items() if key != "NEARCAST_HOME"}
    return load_config(kind, path=path, environ=environ, overrides=overrides).value
