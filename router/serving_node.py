"""What an edge node and a cloud core share: store, model host, router, listeners, agent child, announcement."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from nearcast.clock import SYSTEM_CLOCK
from nearcast.config import ConfigError
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, load_identity, read_token, server_tls
from nearcast.load import NodeReport, Tier
from nearcast.runtime import Shutdown, announce, run_in_daemon
from nearcast.serving import ModelHost
from nearcast.serving.control import ControlSocket
from nearcast.store import Store
from nearcast.telemetry import Telemetry, get_logger
from nearcast.transport.grpc import make_server
from nearcast.transport.health import health_methods
from nearcast.transport.lease import lease_methods
from nearcast.transport.mesh import Members, join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.reflection import reflection_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import UNIX_PREFIX, Server
from nearcast.transport.service import InferenceService
from nearcast.transport.shared_memory import Regions
from nearcast.transport.statistics import FramesLetGo
from router.child import Child
from router.control import ControlLink, find_control
from router.decision_log import make_policy
from router.directory import Announcer, DirectoryReader
from router.explain import explain_routes
from router.lease import Announced
from router.lessor import Lessor
from router.router import Router
from router.serving_config import ServingConfig
from router.splits import StoreSplits
from router.targets import ChannelFactory, TargetSet
from router.traces import TracedHandler, make_traces

AGENT_NICE = 10
_log = get_logger("nearcast.node")


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

    `token` is what stood on the command line: see `read_token`.

    Raises:
        MeshError: if the identity cannot be read, is of another role, or the token does not open the door.
    """
    if (folder / "node.pem").exists():
        identity = load_identity(folder)
    elif token:
        from nearcast.identity import join

        identity = await run_in_daemon(lambda: join(read_token(token), folder), name="join")
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
        registry = telemetry.collectors
        self.host = WatchedHost(
            self.store,
            node=self.name,
            tier=tier,
            role=role,
            registry=registry,
            tenant_keys=Path(config.tenant_keys) if config.tenant_keys else None,
            price=config.price,
            limits=config.host_limits(),
        )
        seed = config.seed or random.SystemRandom().getrandbits(48)
        policy, self._decision_log = make_policy(
            config.policy, seed, config.decisions, data_dir=self.data_dir, node=self.name, registry=registry
        )
        self.router = Router(
            policy,
            local=self.host,
            splits=StoreSplits(self.store),
            node=self.name,
            clock=SYSTEM_CLOCK,
            registry=registry,
        )
        if config.shadows:
            self.router.shadow(config.shadows, config.shadow)
        self._traces = make_traces(config.traces, node=self.name, role=role)
        self.handler = self.router if self._traces is None else TracedHandler(self.router, self._traces)
        self._members = Members()
        self._targets: TargetSet | None = None
        self._directory: DirectoryReader | None = None
        self._link: ControlLink | None = None
        self._agent: Child | None = None
        self._listeners: list[Server | RestServer] = []
        self._closers = AsyncExitStack()

    @property
    def control_url(self) -> str:
        """Where the controller is; "" for a node that stands alone."""
        return "" if self.identity is None else find_control(self.data_dir / "identity")

    @property
    def sees_mesh(self) -> bool:
        """Whether it is known which other nodes there are. One that stands alone knows."""
        return self._directory is None or not self._directory.is_away

    async def start(self) -> None:
        """Open everything, in the order in which the parts need each other. `drain` undoes it in reverse.

        Raises:
            MeshError: if an address is taken or not allowed, or the data folder cannot be made.
        """
        closers = self._closers
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"`data_dir`: {self.data_dir} cannot be made: {error.strerror}.") from error
        if self._decision_log is not None:
            closers.callback(self._decision_log.close)
        if self._traces is not None:
            closers.push_async_callback(self._traces.close)
        await self.host.start()
        closers.push_async_callback(self.host.close)
        self.host.on_refresh = self.router.observe_local
        await self.router.start()
        closers.push_async_callback(self.router.close)
        control = ControlSocket(self.host, self.data_dir / "host.sock")
        await control.start()
        closers.push_async_callback(control.close)
        if self.control_url and self.identity is not None:
            self._link = ControlLink(self.control_url, self.identity)
            closers.push_async_callback(self._link.close)
            if self._find_targets:
                await self._follow_nodes(self._link, self.identity)
            from router.renewal import Renewal

            renewal = Renewal(self.identity, registry=self._telemetry.collectors)
            renewal.start()
            closers.push_async_callback(renewal.close)
        closers.push_async_callback(self._close_listeners)
        await self._listen_for_clients()
        if self.identity is not None:
            await self._listen_for_mesh(self.identity)
            self._start_agent()
        if self.config.listen.metrics:
            place = await self._telemetry.serve_metrics(self.config.listen.metrics, routes=explain_routes(self.router))
            self.addresses["metrics"] = place
            closers.push_async_callback(self._telemetry.close)

    async def serve(self, shutdown: Shutdown, **more: str) -> None:
        """Tell the mesh and the parent that the node is ready; return when it is to end.

        Args:
            shutdown: ends it.
            more: addresses besides those of the node's own listeners, such as `mqtt`.
        """
        self.addresses |= more
        if self._link is not None:
            interval_s = self.config.probe.announce_ms / 1e3
            announcer = Announcer(
                self._link,
                addresses=self._announced,
                models=self._models,
                heed_removed=self._members.remove_only,
                interval_s=interval_s,
            )
            await announcer.start()
            self._closers.push_async_callback(announcer.close)
        announce(self.name, **self.addresses)
        _log.info("node_ready", node=self.name, role=self._role, **self.addresses)
        await shutdown.wait()
        self.router.mark_draining()

    async def drain(self) -> None:
        """Finish what is in flight, within the drain time, and close everything."""
        await self._closers.aclose()

    async def _follow_nodes(self, link: ControlLink, identity: Identity) -> None:
        """Learn where the other nodes are, and keep asking how they are."""
        make = ChannelFactory(self.config.listen.transport, identity)
        self._targets = targets = TargetSet(self.router, make, config=self.config.probe)
        self._closers.push_async_callback(targets.close)
        reader = DirectoryReader(link, targets, interval_s=self.config.probe.directory_ms / 1e3)
        self._directory = reader
        await reader.start()
        self._closers.push_async_callback(reader.close)

    async def _listen_for_clients(self) -> None:
        listen, router = self.config.listen, self.router
        shown = self.identity if listen.tls else None
        regions, frames = Regions(), FramesLetGo()
        self._closers.callback(regions.close)
        self._telemetry.collectors.register(frames)
        lessor = Lessor(router, self._reports, config=self.config.lease, registry=self._telemetry.collectors)
        service = InferenceService(
            self.handler,
            router,
            server_name=self.name,
            counting=self.host,
            repository=self.host,
            report=router.catalogue,
            regions=regions,
            frames=frames,
        )
        methods = join_methods(
            lease_methods(lessor.grant),
            oip_methods(service, trusted=False),
            health_methods(router.is_ready),
        )
        methods = join_methods(methods, reflection_methods(methods))
        await self._open("grpc", make_server(listen.transport, methods, address=listen.grpc, identity=shown))
        if listen.local:
            await self._open("local", make_server(listen.transport, methods, address=listen.local))
        tls = None if shown is None else server_tls(shown, require_client=False, alpn=("http/1.1",))
        await self._open("http", RestServer(service, address=listen.http, tls=tls))

    async def _listen_for_mesh(self, identity: Identity) -> None:
        """For other nodes: requests that are decided already, and the question how this node is."""
        listen, report = self.config.listen, self._report
        service = InferenceService(self.handler, self.host, server_name=self.name, report=report)
        inference = oip_methods(service, trusted=True)
        methods = self._members.guard(join_methods(inference, mesh_methods(report)))
        server = make_server(listen.transport, methods, address=listen.mesh, identity=identity, require_client=True)
        await self._open("mesh", server)

    def _report(self) -> NodeReport:
        """What we say to other nodes: how the host is, that it drains, and where clients reach it."""
        return replace(
            self.router.report_self(), client_address=self.addresses.get("grpc", ""), client_tls=self.config.listen.tls
        )

    def _reports(self) -> Iterator[Announced]:
        """Whom a lease may name: this node and those it knows."""
        yield Announced(self._report())
        if self._targets is not None:
            yield from (Announced(report, address) for report, address in self._targets.reports)

    async def _open(self, name: str, server: Server | RestServer) -> None:
        await server.start()
        self._listeners.append(server)
        self.addresses[name] = server.address

    async def _close_listeners(self) -> None:
        drains = [server.drain(self.config.drain_s) for server in self._listeners]
        await asyncio.gather(*drains, *([] if self._agent is None else [self._agent.stop()]))

    def _start_agent(self) -> None:
        """The agent writes the store at low priority; without it everything else goes on."""
        if not self.config.agent.enabled:
            return
        path = self.data_dir / "agent.toml"
        path.write_text(self._agent_toml())
        command = [sys.executable, "-m", "model_sync.agent", "--config", str(path)]
        self._agent = Child("agent", command, log=self.data_dir / "logs" / "agent.log", nice=AGENT_NICE)
        self._agent.start()

    def _agent_toml(self) -> str:
        settings = self.config.agent
        values: dict[str, str | float | tuple[str, ...]] = {
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
            "mirrors": settings.mirrors,
            "on_delta_failure": settings.on_delta_failure,
            "metered": settings.metered,
            "apply_spread_s": settings.apply_spread_s,
            "peer_listen": settings.peer_listen,
            "limits.upload_bytes_per_s_max": settings.upload_bytes_per_s_max,
            "tenant_keys": str(Path(self.config.tenant_keys).resolve()) if self.config.tenant_keys else "",
            "limits.quota_bytes": settings.quota_bytes,
            "limits.download_bytes_per_s_max": settings.download_bytes_per_s_max,
            "limits.download_bytes_per_day_max": settings.download_bytes_per_day_max,
            "log_level": self.config.telemetry.level,
        }
        # JSON's strings, numbers and lists are TOML's too.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

    def _announced(self) -> dict[str, str]:
        """Our listeners that others can reach, and the one that the agent says it has opened."""
        reachable = {name: address for name, address in self.addresses.items() if not address.startswith(UNIX_PREFIX)}
        if not self.config.agent.peer_listen:
            return reachable
        try:
            status = json.loads((self.store.root / ".agent" / "status.json").read_bytes())
            return {**reachable, "peer": str(status.get("peer", ""))}
        except (OSError, ValueError):
            return reachable

    def _models(self) -> dict[str, list[str]]:
        """What the directory shows: the hot versions of each model."""
        out: dict[str, list[str]] = {}
        for version in self.host.report().versions:
            if version.residency == "hot":
                out.setdefault(version.model, []).append(version.version)
        return out
