"""One tenant's running Mosquitto, and what keeps it and its certificates as they should be."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from edge_node.broker.access import DOCTOR, REGISTRAR, WORKER, is_device
from edge_node.broker.configuration import BrokerLimits, TlsListener
from edge_node.broker.process import Broker
from edge_node.broker.provisioning import ProvisioningLimits
from edge_node.broker.registrar import Registrar
from edge_node.broker.supervision import keep_alive
from edge_node.broker.tenant import ACCESS_FILE, REVOKED_FILE, TenantAuthority, hold
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.identity.node import Validity, read_certificate
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings

PRESENCE_TIMEOUT_S = 5.0
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104  # compared with, not bound to
_OWN = (("worker", WORKER), ("registrar", REGISTRAR), ("doctor", DOCTOR))
_log = get_logger("nearcast.broker")


class TenantBroker:
    """Made by `start`.

    Attributes:
        authority: the tenant's certificates.
        broker: the child.
        registrar: answers certificate requests.
        tls: the files with which the node's worker connects; renewed in place.
        denied: devices without rights: nothing of theirs is to be answered any more.
    """

    def __init__(
        self,
        authority: TenantAuthority,
        broker: Broker,
        hosts: tuple[str, ...],
        clock: Clock,
        *,
        revision: int,
        owned: AsyncExitStack,
    ) -> None:
        self.authority = authority
        self.denied: frozenset[str] = frozenset()
        self.broker = broker
        self._hosts = hosts
        self._clock = clock
        self._owned = owned
        self._version = (revision, -1)
        self._restarted_at = -math.inf
        self._on_denied: Callable[[frozenset[str]], None] = lambda _denied: None
        self.tls = authority.files("worker")
        self.registrar = Registrar(
            authority, host=self.host, port=broker.port, tls=authority.files("registrar"), clock=clock
        )
        create = asyncio.get_running_loop().create_task
        self._tasks = [create(keep_alive(broker)), create(self.registrar.run()), create(self._watch())]

    @classmethod
    async def start(
        cls,
        folder: Path,
        *,
        tenant: str,
        host: str = "127.0.0.1",
        port: int = 0,
        names: tuple[str, ...] = (),
        limits: ProvisioningLimits | None = None,
        broker_limits: BrokerLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> TenantBroker:
        """Start the broker of a tenant; the first time this makes its CA.

        Args:
            folder: for keys, register, configuration and what the broker persists.
            tenant: whose devices these are.
            host: where to listen; any address.
            port: 0 = a free one.
            names: how devices call this machine; in the broker's certificate beside `host` and loopback.
            limits: bounds of certificates.
            broker_limits: bounds of the broker.
            clock: for the life of certificates.

        Raises:
            MeshError: UNSUPPORTED without Mosquitto, UNAVAILABLE if it does not start, INVALID_REQUEST.
        """
        outside = names or ((host,) if host not in WILDCARDS else ("127.0.0.1",))
        hosts = tuple(dict.fromkeys((*outside, *LOCAL_HOSTS)))
        authority = await asyncio.to_thread(lambda: TenantAuthority.create(folder, tenant, limits=limits, clock=clock))
        async with AsyncExitStack() as stack:
            stack.callback(authority.close)
            stack.callback(os.close, hold(folder))
            revision = await asyncio.to_thread(_prepare, authority, hosts)
            broker = await Broker.start(
                folder / "broker",
                host=host,
                port=port,
                kind="mosquitto",
                tls=_listener(authority),
                limits=broker_limits,
            )
            authority.move(f"mqtts://{_bracketed(outside[0])}:{broker.port}")
            return cls(authority, broker, hosts, clock, revision=revision, owned=stack.pop_all())

    @property
    def host(self) -> str:
        """Where the node itself reaches the broker."""
        host = self.broker.host
        return {"::": "::1"}.get(host, "127.0.0.1") if host in WILDCARDS else host

    @property
    def port(self) -> int:
        """The port."""
        return self.broker.port

    @property
    def url(self) -> str:
        """`mqtts://host:port`, for the node itself."""
        return f"mqtts://{_bracketed(self.host)}:{self.port}"

    def on_denied(self, call: Callable[[frozenset[str]], None]) -> None:
        """Have `call` told which devices have no rights, now and whenever that changes."""
        self._on_denied = call
        call(self.denied)

    async def stop(self) -> None:
        """End the broker and what belongs to it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.broker.stop()
        await self._owned.aclose()

    async def _refresh(self) -> None:
        """Tell the broker what changed in the register, end the sessions of those without rights, renew what is due.

        Raises:
            MeshError: UNAVAILABLE if the register or the broker cannot be reached; nothing is lost, it is due still.
        """
        registry = self.authority.registry
        version = await asyncio.to_thread(registry.version)
        renewal = self._own_renewal_due()
        if version == self._version and not renewal:
            return
        rights = await asyncio.to_thread(registry.rights)
        self.denied = frozenset(rights.denied)
        self._on_denied(self.denied)
        if renewal or version[0] != self._version[0]:
            if self._clock.monotonic() < self._restarted_at + self.authority.limits.restart_interval_s:
                return
            if renewal:
                await asyncio.to_thread(_renew_own, self.authority, self._hosts)
            await asyncio.to_thread(self.authority.write_rights, rights)
            self._restarted_at = self._clock.monotonic()
            if problem := await self.broker.restart():
                raise MeshError(Code.UNAVAILABLE, problem)
        for name in rights.unpurged:
            await self._purge(name)
        await asyncio.to_thread(registry.apply, version[0])
        self._version = version

    async def _watch(self) -> None:
        former = ""
        while True:
            problem = ""
            try:
                self.broker.trim_log()
                await self._refresh()
            except (MeshError, OSError, TimeoutError) as error:
                problem = str(error) or "no answer in time"
            if problem and problem != former:
                _log.warning("rights_not_applied", tenant=self.authority.place.tenant, error=problem)
            former = problem
            await asyncio.sleep(self.authority.limits.watch_interval_s)

    async def _purge(self, name: str) -> None:
        """Take the session of `name` over and end it: whoever is connected is cut, and what waited there is gone.

        The authority can be anyone for a minute. The holder cannot come back: the broker knows the revocation by now.
        """
        life_s = self.authority.limits.purge_life_s
        tls = await asyncio.to_thread(lambda: self.authority.own_files(name, "purge", life_s=life_s))
        connection = Connection(
            ConnectionSettings(host=self.host, port=self.port, client_id=name, tls=tls), on_message=lambda _m: None
        )
        try:
            await connection.open()
        finally:
            await connection.close()
            for path in (tls.certificate, tls.key):
                if path is not None:
                    path.unlink(missing_ok=True)
        if is_device(name):
            async with asyncio.timeout(PRESENCE_TIMEOUT_S):
                await self.registrar.listening.wait()
            self.registrar.forget_presence(name)
        await asyncio.to_thread(self.authority.registry.purged, name)
        _log.info("session_purged", name=name)

    def _own_renewal_due(self) -> bool:
        certificate = read_certificate(self.authority.folder / "broker.pem")
        validity = Validity(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())
        return not validity.starts_at <= self._clock.wall() < validity.renew_at


def _listener(authority: TenantAuthority) -> TlsListener:
    folder = authority.folder
    return TlsListener(
        ca=authority.ca,
        certificate=folder / "broker.pem",
        key=folder / "broker.key",
        revoked=folder / REVOKED_FILE,
        access=folder / ACCESS_FILE,
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _prepare(authority: TenantAuthority, hosts: tuple[str, ...]) -> int:
    """Write what the broker reads; returns the revision of the register that it knows then."""
    revision = authority.registry.revision()
    _renew_own(authority, hosts)
    authority.write_rights(authority.registry.rights())
    return revision


def _renew_own(authority: TenantAuthority, hosts: tuple[str, ...]) -> None:
    for label, name in _OWN:
        authority.own_files(name, label)
    authority.own_files(f"broker {authority.place.tenant}"[:64], "broker", hosts=hosts)
