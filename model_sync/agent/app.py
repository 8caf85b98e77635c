"""The agent: checks at the start, when hinted, and at jittered intervals, and hands what it finds to the machines."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from msgspec.structs import replace

from model_sync.agent.config import AgentConfig
from model_sync.agent.follower import Follower
from model_sync.agent.hint import HintListener
from model_sync.agent.host_link import HostLink
from model_sync.agent.journal import Journal
from model_sync.agent.metadata import Checked, MetadataSource
from model_sync.agent.model_shell import ModelShell, Surroundings
from model_sync.agent.peers.download import Peers
from model_sync.agent.peers.side import PeerSide
from model_sync.agent.report import Reporter
from model_sync.agent.sources.addresses import make_source
from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors, SharedHealth
from model_sync.agent.sources.source import asked_pause_s
from model_sync.agent.status import AgentStatus, write_status
from model_sync.replica.events import CheckFailed, Intended, Polled, ReportFailed
from model_sync.replica.pause import check_pause_s
from model_sync.replica.state import Want
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.clock_store import ClockFloor
from nearcast.durable import make_folder
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, client_tls, load_identity
from nearcast.store import Store
from nearcast.telemetry import get_logger

ROOT_FILE = "root.json"
LOCK_WAIT_S = 10.0
"""How long a new agent waits for its predecessor to let go of the store."""
NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME. Used only while the clock is behind the floor and only for the repository, whose
content TUF verifies against the floor: without it a gateway that boots in 1970 could not fetch anything at all."""
_log = get_logger("model_sync.agent")


class Agent:
    """One agent on one store. `start`, then `close`; `check` may be called at any time."""

    def __init__(self, config: AgentConfig, *, clock: Clock = SYSTEM_CLOCK, store: Store | None = None) -> None:
        if not config.control and not config.repository:
            raise MeshError(Code.INVALID_REQUEST, "The agent has nobody to ask; set `control` or `repository`.")
        self.config = config
        self._random = random.Random()
        self._store = store or Store(Path(config.store))
        self._folder = self._store.root / ".agent"
        self._identity_folder = Path(config.identity) if config.identity else None
        self._identity = _identity(self._identity_folder)
        self._lock: IO[bytes] | None = None
        for place in (self._store.root, self._folder):
            make_folder(place)
        self._clock = ClockFloor(self._folder / "clock.json", clock, build_time=config.build_time)
        self._checker = ThreadPoolExecutor(1, "check")
        self._workers = ThreadPoolExecutor(2, "install")
        self._wake = asyncio.Event()
        self._checking = asyncio.Lock()
        self._shells: dict[str, ModelShell | Follower] = {}
        self._status = AgentStatus(node=config.node, channel=config.channel, mode=config.mode, pid=os.getpid())
        self._failures = 0
        self._retry_s = 0.0
        self._hint: HintListener | None = None
        self._reporter: Reporter | None = None
        self._peer_side: PeerSide | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._health = SharedHealth(1 + len(config.mirrors))
        self._meter = Meter(
            self._folder / "downloads.json",
            clock,
            bytes_per_s_max=config.limits.download_bytes_per_s_max,
            bytes_per_day_max=config.limits.download_bytes_per_day_max,
        )
        self._source = self._make_source()
        self._metadata: MetadataSource
        self._around: Surroundings

    @property
    def status_path(self) -> Path:
        """Where the status is written."""
        return self._folder / "status.json"

    async def start(self) -> None:
        """Take the store, boot the machines from the disk, and begin to check.

        Raises:
            MeshError: CONFLICT if another agent holds the store; INVALID_REQUEST or UNAUTHENTICATED if root.json or the
                identity cannot be used.
        """
        await self._take_store()
        self._store.clean()
        self._metadata = MetadataSource(
            self._folder,
            self._source,
            self._pinned_root(),
            channel=self.config.channel,
            timeout_s=self.config.limits.chunk_timeout_s,
            models_max=self.config.limits.models_max,
        )
        journal = Journal(self._folder / "journal", size_bytes_max=self.config.limits.journal_bytes_max)
        self._around = Surroundings(
            config=self.config,
            store=self._store,
            journal=journal,
            metadata=self._metadata,
            host=HostLink(self.config.host_socket, answer_bytes_max=self.config.limits.answer_bytes_max),
            executor=self._workers,
            make_source=self._make_source,
            meter=self._meter,
            draw=self._random.random,
            changed=self._write_status,
            peers=await self._join_peers(),
        )
        for model in sorted({*self._store.models(), *journal.memories}):
            await self._shell(model)
        self._loop_task = asyncio.create_task(self._check_forever())
        if self.config.control and self.config.hint_wait_s > 0:
            self._listen()
        self._report()

    async def close(self, *, orderly: bool = False) -> None:
        """Stop at once; every state is on the disk. `orderly`: by order, not because the node has gone."""
        if self._reporter is not None:
            await self._reporter.close()
        if self._hint is not None:
            await asyncio.to_thread(self._hint.close)
        if self._loop_task is not None:
            self._loop_task.cancel()
            self._source.abort()
            with suppress(asyncio.CancelledError):
                await self._loop_task
        for shell in self._shells.values():
            await shell.close(orderly=orderly)
        if self._peer_side is not None:
            await self._peer_side.close()
        for pool in (self._checker, self._workers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()
        if self._lock is not None:
            self._lock.close()

    async def check(self) -> bool:
        """Check the metadata once and act on it; whether it could be verified."""
        async with self._checking:
            for shell in self._shells.values():
                shell.send(Polled())
            try:
                checked = await self._verified()
            except MeshError as error:
                self._failed(error)
                return False
            await self._apply(checked)
            return True

    async def _verified(self) -> Checked:
        reading = self._clock.read()
        if reading.reason and reading.reason != self._status.clock_note:
            _log.warning("clock_wrong", reason=reading.reason)
        self._note(clock_ok=not reading.reason, clock_note=reading.reason, checked_at=reading.now)
        if not reading.trusted:
            raise MeshError(Code.UNAVAILABLE, reading.reason)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.config.limits.check_s):
                checked = await loop.run_in_executor(self._checker, self._check_in_turn, reading.now)
        except TimeoutError:
            self._source.abort()
            raise MeshError(
                Code.UNAVAILABLE, f"The check of {self._source.url} took too long; the node serves on."
            ) from None
        except OSError as error:
            raise MeshError(
                Code.UNAVAILABLE, f"The checked metadata cannot be stored: {error.strerror or error}."
            ) from error
        with suppress(OSError):
            self._clock.verified(reading)
        return checked

    def _check_in_turn(self, now: float) -> Checked:
        """Ask the repository, then its mirrors, until one gives metadata that can be verified."""
        refusal: MeshError | None = None
        for source in self._source.attempts():
            try:
                checked = self._metadata.check(now)
            except MeshError as error:
                if error.code is Code.CANCELLED:
                    raise
                self._source.failed(source, None, error)
                refusal = refusal or error
            else:
                self._source.served(source)
                return checked
        raise refusal or MeshError(Code.UNAVAILABLE, "No repository can be asked.")

    async def _apply(self, checked: Checked) -> None:
        for model, want in checked.wants.items():
            (await self._shell(model)).send(Intended(want))
        for model in set(self._shells) - set(checked.wants):
            self._shells[model].send(Intended(Want(intent=checked.intent, stable=None)))
        if self._hint is not None:
            self._hint.known(checked.serial)
        if checked.serial != self._status.serial or self._failures:
            _log.info("channel_checked", channel=self.config.channel, serial=checked.serial, intent=checked.intent)
        self._failures, self._retry_s = 0, 0.0
        self._note(serial=checked.serial, succeeded_at=self._status.checked_at, error="")

    def _failed(self, error: MeshError) -> None:
        self._failures += 1
        self._retry_s = asked_pause_s(error)
        for shell in self._shells.values():
            shell.send(CheckFailed(error.message))
        if error.message != self._status.error:
            _log.warning("check_failed", code=error.code, error=error.message)
        self._note(error=error.message)

    async def _shell(self, model: str) -> ModelShell | Follower:
        shell = self._shells.get(model)
        if shell is None:
            shell = ModelShell(model, self._around) if self.config.mode == "install" else Follower(model, self._around)
            await shell.boot()
            self._shells[model] = shell
            shell.send(Polled())
        return shell

    async def _check_forever(self) -> None:
        while True:
            self._wake.clear()
            await self.check()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()

    def _pause_s(self) -> float:
        return check_pause_s(
            self._random.random,
            poll_s=self.config.poll_s,
            failures=self._failures,
            backoff_base_s=self.config.limits.backoff_base_s,
            retry_s=self._retry_s,
        )

    async def _join_peers(self) -> Peers | None:
        """Give chunks to other nodes, and take them from those, where that is wanted."""
        if not self.config.peer_listen or self.config.mode == "follow":
            return None
        self._peer_side = PeerSide(
            self.config,
            self._store,
            self._identity,
            tls=self._tls(any_time=True),
            make_origin=self._make_source,
            draw=self._random.random,
        )
        self._note(peer=await self._peer_side.start())
        return self._peer_side.peers

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        source = HttpSource(
            self.config.control, tls=self._tls(), connect_timeout_s=self.config.limits.connect_timeout_s
        )

        def wake(_serial: int) -> None:
            loop.call_soon_threadsafe(self._wake.set)

        self._hint = HintListener(
            source,
            wake,
            wait_s=self.config.hint_wait_s,
            backoff_cap_s=min(self.config.poll_s, self.config.limits.backoff_cap_s),
            draw=self._random.random,
        )
        self._hint.start()

    def _make_source(self) -> Mirrors:
        """The repository and its mirrors, for one worker."""
        limits, repository = self.config.limits, self.config.repository_url
        return Mirrors(
            [
                make_source(
                    url,
                    tls=self._tls(any_time=True) if url == repository else self._outer_tls,
                    connect_timeout_s=limits.connect_timeout_s,
                    timeout_s=limits.chunk_timeout_s,
                    roles=("sync",) if url == repository else (),
                )
                for url in (repository, *self.config.mirrors)
            ],
            self._health,
        )

    def _outer_tls(self) -> ssl.SSLContext:
        """For mirrors, which may be outside the mesh: they are untrusted anyway, and our certificate is not shown."""
        context = ssl.create_default_context()
        ca = self._identity_folder / "ca.pem" if self._identity_folder is not None else None
        if ca is not None and ca.exists():
            context.load_verify_locations(ca)
        return context

    def _tls(self, *, any_time: bool = False) -> _MakeTls | None:
        if self._identity_folder is None:
            return None
        return _MakeTls(self._identity, self._identity_folder / "ca.pem", self._clock if any_time else None)

    def _pinned_root(self) -> bytes:
        folder = self._identity_folder or self._folder
        try:
            return (folder / ROOT_FILE).read_bytes()
        except OSError as error:
            raise MeshError(
                Code.UNAUTHENTICATED,
                f"{folder / ROOT_FILE} cannot be read ({error.strerror}); join the mesh to get the pinned TUF root.",
            ) from error

    async def _take_store(self) -> None:
        self._lock = (self._folder / "lock").open("wb")
        deadline = asyncio.get_running_loop().time() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if asyncio.get_running_loop().time() >= deadline:
                    raise MeshError(
                        Code.CONFLICT, f"Another agent works on the store {self._store.root}; stop it first."
                    ) from None
                await asyncio.sleep(0.1)
            else:
                return

    def _note(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)
        self._write_status()

    def _report(self) -> None:
        tls = self._tls()
        if not self.config.control.startswith("https://") or tls is None or self._identity is None:
            return
        self._reporter = Reporter(
            self.config,
            self._around.host,
            self._whole_status,
            tls,
            self._identity.key,
            draw=self._random.random,
            failed=self._report_failed,
        )
        self._reporter.start()

    def _report_failed(self, reason: str) -> None:
        for shell in self._shells.values():
            shell.send(ReportFailed(reason))

    def _whole_status(self) -> AgentStatus:
        return replace(self._status, models={model: shell.status for model, shell in self._shells.items()})

    def _write_status(self) -> None:
        with suppress(OSError):  # a report that cannot be written changes nothing
            write_status(self._folder, self._whole_status())
        if self._reporter is not None:
            self._reporter.look()


class _MakeTls:
    """Makes a context per connection, so that a renewed certificate and a corrected clock count from then on."""

    def __init__(self, identity: Identity | None, ca: Path, any_time: ClockFloor | None) -> None:
        self._identity = identity
        self._ca = ca
        self._any_time = any_time

    def __call__(self) -> ssl.SSLContext:
        context = client_tls(self._identity, ca=self._ca, alpn=("http/1.1",))
        if self._any_time is not None and self._any_time.is_behind:
            context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
        return context


def _identity(folder: Path | None) -> Identity | None:
    """The node's identity if it has one; a repository on http needs none."""
    if folder is None or not (folder / "node.pem").exists():
        return None
    return load_identity(folder)
