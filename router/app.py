"""The stand-alone router of a point of presence: listeners in front, targets behind, pointers from its agent."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import ssl
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from nearcast import telemetry
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, load_identity, server_tls
from nearcast.runtime import Shutdown, announce, keep_pages
from nearcast.store import Store
from nearcast.telemetry import get_logger
from nearcast.transport.grpc import make_server
from nearcast.transport.health import health_methods
from nearcast.transport.lease import lease_methods
from nearcast.transport.mesh import Members, join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.reflection import reflection_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Methods, Server
from nearcast.transport.service import InferenceService
from nearcast.transport.statistics import FramesLetGo, Statistics
from router.child import Child
from router.config import RouterConfig
from router.control import ControlLink, find_control
from router.decision_log import make_policy
from router.directory import Announcer, DirectoryReader
from router.explain import explain_routes
from router.lease import Announced
from router.lessor import Lessor
from router.reload import merge
from router.renewal import Renewal
from router.router import Router
from router.splits import StoreSplits
from router.target import configured_views
from router.targets import ChannelFactory, TargetSet
from router.traces import TracedHandler, make_traces

_log = get_logger(__name__)
DRAIN_S = 5.0
AGENT_NICE = 10


class RouterApp:
    """Everything that one router process runs. `start`, then `drain`."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._data = Path(config.data_dir)
        folder = Path(config.identity) if config.identity else self._data / "identity"
        self._identity_folder = folder
        self.identity: Identity | None = load_identity(folder) if config.identity or folder.is_dir() else None
        self.name = self.identity.name if self.identity is not None else config.name
        self.addresses: dict[str, str] = {}
        self._telemetry = telemetry.start(self.name, config.telemetry)
        self._store = Store(self._data / "models")
        seed = config.seed if config.seed >= 0 else secrets.randbits(63)
        registry = self._telemetry.collectors
        policy, self._decision_log = make_policy(
            config.policy, seed, config.decisions, data_dir=self._data, node=self.name, registry=registry
        )
        self.router = Router(
            policy,
            splits=StoreSplits(self._store),
            node=self.name,
            registry=self._telemetry.collectors,
            limits=config.limits,
        )
        if config.shadows:
            self.router.shadow(config.shadows, config.shadow)
        self._traces = make_traces(config.traces, node=self.name, role="router")
        self._handler = self.router if self._traces is None else TracedHandler(self.router, self._traces)
        self.targets = TargetSet(self.router, ChannelFactory(config.transport, self.identity), config=config.probe)
        self._reader: DirectoryReader | None = None
        self._members = Members()
        self._listeners: list[Server | RestServer] = []
        self._closers = AsyncExitStack()

    async def start(self) -> None:
        """Find the targets, then listen.

        Raises:
            MeshError: an address in use, or reachable from other machines without certificates.
        """
        self._data.mkdir(parents=True, exist_ok=True)
        if self._decision_log is not None:
            self._closers.callback(self._decision_log.close)
        if self._traces is not None:
            self._closers.push_async_callback(self._traces.close)
        await self.router.start()
        self._closers.push_async_callback(self.router.close)
        self._closers.push_async_callback(self.targets.close)
        link = self._make_link()
        await self._follow_nodes(link)
        await self._listen()
        if link is not None:
            announcer = Announcer(
                link,
                addresses=lambda: self.addresses,
                heed_removed=self._members.remove_only,
                interval_s=self._config.probe.announce_ms / 1e3,
            )
            await announcer.start()
            self._closers.push_async_callback(announcer.close)
        self._start_agent()

    def reload(self, wanted: RouterConfig) -> None:
        """Take from another configuration what a running router can take, and say in one line what it cannot."""
        merged = merge(self._config, wanted)
        config = self._config = merged.config
        self.router.policy.reconfigure(self.router.now(), config.policy)
        self.targets.configure(config.probe)
        fixed = configured_views(config.targets)
        if self._reader is None:
            self.targets.update(fixed)
        else:
            self._reader.fix(fixed)
        telemetry.set_level(config.telemetry.level)
        _log.info("configuration_reloaded", changed=merged.changed, needs_restart=merged.kept)

    async def drain(self) -> None:
        """Refuse new requests, finish those in flight, close everything. Bounded by the drain times."""
        self.router.mark_draining()
        await self._closers.aclose()

    def _make_link(self) -> ControlLink | None:
        url = find_control(self._identity_folder, self._config.control)
        if not url:
            return None
        if self.identity is None:
            raise MeshError(
                Code.UNAUTHENTICATED, "The control API needs an identity; run `nearcast nodes invite` and join."
            )
        link = ControlLink(url, self.identity)
        self._closers.push_async_callback(link.close)
        renewal = Renewal(self.identity, control=url, registry=self._telemetry.collectors)
        renewal.start()
        self._closers.push_async_callback(renewal.close)
        return link

    async def _follow_nodes(self, link: ControlLink | None) -> None:
        fixed = configured_views(self._config.targets)
        self.targets.update(fixed)
        if link is None:
            return
        interval_s = self._config.probe.directory_ms / 1e3
        self._reader = DirectoryReader(link, self.targets, interval_s=interval_s, fixed=fixed)
        await self._reader.start()
        self._closers.push_async_callback(self._reader.close)

    async def _close_listeners(self) -> None:
        await asyncio.gather(*(server.drain(DRAIN_S) for server in self._listeners))

    async def _listen(self) -> None:
        self._closers.push_async_callback(self._close_listeners)
        listen, router = self._config.listen, self.router
        shown = self.identity if self._config.tls else None
        counts, frames = Statistics(), FramesLetGo()
        self._telemetry.collectors.register(frames)
        lessor = Lessor(
            router,
            lambda: (Announced(report, address) for report, address in self.targets.reports),
            config=self._config.lease,
            registry=self._telemetry.collectors,
        )
        service = InferenceService(
            self._handler, router, server_name="nearcast", statistics=counts, report=router.catalogue, frames=frames
        )
        methods = join_methods(
            lease_methods(lessor.grant),
            oip_methods(service, trusted=False),
            health_methods(router.is_ready),
        )
        if listen.grpc:
            offered = join_methods(methods, reflection_methods(methods))
            await self._serve("grpc", listen.grpc, offered, shown, require_client=False)
        if listen.http:
            tls = None if shown is None else server_tls(shown, require_client=False, alpn=("http/1.1",))
            await self._serve_rest(listen.http, tls, service)
        if listen.mesh and self.identity is not None:
            # Holds no models: what is forwarded here is sent elsewhere, but a router can be asked how it is.
            mesh = join_methods(
                oip_methods(InferenceService(router, router, server_name="nearcast", statistics=counts), trusted=True),
                mesh_methods(router.report_self),
            )
            await self._serve("mesh", listen.mesh, self._members.guard(mesh), self.identity, require_client=True)
        if listen.metrics:
            self.addresses["metrics"] = await self._telemetry.serve_metrics(
                listen.metrics, routes=explain_routes(router)
            )
            self._closers.push_async_callback(self._telemetry.close)

    async def _serve(
        self, name: str, address: str, methods: Methods, identity: Identity | None, *, require_client: bool
    ) -> None:
        server = make_server(
            self._config.transport, methods, address=address, identity=identity, require_client=require_client
        )
        await server.start()
        self.addresses[name] = server.address
        self._listeners.append(server)

    async def _serve_rest(self, address: str, tls: ssl.SSLContext | None, service: InferenceService) -> None:
        server = RestServer(service, address=address, tls=tls)
        await server.start()
        self.addresses["http"] = server.address
        self._listeners.append(server)

    def _start_agent(self) -> None:
        control = find_control(self._identity_folder, self._config.control)
        if not (self._config.agent.enabled and self.identity is not None and control):
            return
        path = self._data / "agent.toml"
        settings = {
            "node": self.name,
            "role": "router",
            "mode": "follow",
            "control": control,
            "identity": str(self._identity_folder.resolve()),
            "store": str(self._store.root.resolve()),
            "channel": self._config.agent.channel,
            "poll_s": self._config.agent.poll_s,
        }
        # JSON's strings and numbers are TOML's too.
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        command = [sys.executable, "-m", "model_sync.agent", "--config", str(path)]
        agent = Child("agent", command, log=self._data / "logs" / "agent.log", nice=AGENT_NICE)
        agent.start()
        self._closers.push_async_callback(agent.stop)


async def serve(config: RouterConfig, shutdown: Shutdown, read: Callable[[], RouterConfig]) -> int:
    """Run a router until the shutdown is requested. SIGHUP has it `read` its configuration again."""
    loop, hangup = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    app = RouterApp(config)
    try:
        await app.start()
        keep_pages()
        announce(app.name, **app.addresses)
        reloads = loop.create_task(_reload_forever(app, hangup, read))
        await shutdown.wait()
        reloads.cancel()
    finally:
        await asyncio.shield(app.drain())
        loop.remove_signal_handler(signal.SIGHUP)
    return 0


async def _reload_forever(app: RouterApp, hangup: asyncio.Event, read: Callable[[], RouterConfig]) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            app.reload(read())
        except MeshError as error:
            _log.error("configuration_refused", error=error.message, still="the one before")
