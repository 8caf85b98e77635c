"""The thin shell of one replica machine: carries out its instructions in order, and reports back as events."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from model_sync.agent.config import AgentConfig
from model_sync.agent.host_link import HostLink, VersionState
from model_sync.agent.install.gate import Gate
from model_sync.agent.install.shorter_ways import DeltaError
from model_sync.agent.install.steps import DiskFullError, Installer, installed_releases, read_manifest
from model_sync.agent.journal import Journal
from model_sync.agent.metadata import MetadataSource
from model_sync.agent.peers.download import Peers
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors
from model_sync.agent.sources.source import asked_pause_s
from model_sync.agent.status import ModelStatus, pointer_fields
from model_sync.replica.events import Booted, Done, Event, Failed, Loaded, Sampled, Ticked
from model_sync.replica.instructions import (
    Cancel,
    Collect,
    Discard,
    Instruction,
    Refresh,
    Remember,
    Run,
    Watch,
    WritePointer,
)
from model_sync.replica.machine import Replica
from model_sync.replica.state import Failure, Goal, Memory, ReplicaLimits, State
from nearcast.errors import Code, MeshError
from nearcast.store import Pointer, Store
from nearcast.telemetry import get_logger

REBOOT_S = 5.0
"""After the disk refused a journal record or a pointer, the machine starts over from the disk after this time."""
SAMPLES = 10
"""Samples of the host's counters in one probation."""
_log = get_logger("model_sync.agent")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all model shells of one agent share. `changed` is called after every event, to write the status."""

    config: AgentConfig
    store: Store
    journal: Journal
    metadata: MetadataSource
    host: HostLink
    executor: Executor
    make_source: Callable[[], Mirrors]
    meter: Meter
    draw: Callable[[], float]
    changed: Callable[[], None]
    peers: Peers | None = None


class ModelShell:
    """One model. All methods belong to the event loop; blocking work goes to the executor."""

    def __init__(self, model: str, around: Surroundings) -> None:
        self.model = model
        self._around = around
        self._source = around.make_source()
        self._installer: Installer | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stops: dict[int, threading.Event] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._working = asyncio.Lock()
        keys = around.config.tenant_keys
        self._gate = Gate(Path(keys) if keys else None)
        self._timer: asyncio.TimerHandle | None = None
        self._machine: Replica | None = None
        self._fault = ""
        self._received_bytes = 0

    async def boot(self) -> None:
        """Read journal, pointer and folders, and take up what was going on."""
        installed = await self._in_thread(lambda: installed_releases(self._around.store, self.model))
        try:
            pointer = self._around.store.pointer(self.model)
        except MeshError as error:
            _log.warning("pointer_unreadable", model=self.model, error=error.message)
            pointer = None
        memory = self._around.journal.memories.get(self.model, Memory(model=self.model))
        self._machine = Replica(
            self._around.config.node,
            memory,
            pointer,
            installed,
            limits=replica_limits(self._around.config),
            draw=self._around.draw,
        )
        self._fault = ""
        self.send(Booted())

    def send(self, event: Event) -> None:
        """Give the machine an event and do what it says."""
        machine = self._machine
        if machine is None:
            return
        before = machine.state
        try:
            for instruction in machine.handle(self._now(), event):
                self._carry_out(instruction)
        except (OSError, MeshError) as error:
            self._start_over(error)
            return
        if machine.state is not before:
            _log.info("replica_state", model=self.model, state=machine.state, was=before, error=machine.error)
        self._arm()
        self._around.changed()

    @property
    def status(self) -> ModelStatus:
        """What to report."""
        machine = self._machine
        if machine is None:
            return ModelStatus(state="HOLD", error=self._fault)
        memory = machine.memory
        return ModelStatus(
            state=machine.state,
            goal=memory.goal.release if memory.goal is not None else None,
            error=machine.error,
            quarantined=tuple(sorted(ban.release for ban in memory.bans)),
            reasons={str(ban.release): ban.reason for ban in memory.bans},
            received_bytes=self._received_bytes,
            **pointer_fields(machine.pointer),
        )

    async def close(self, *, orderly: bool) -> None:
        """Stop all work; what was done is on the disk. An `orderly` end is not held against a version on trial."""
        machine, self._machine = self._machine, None
        if machine is not None and orderly:
            with suppress(OSError):
                for instruction in machine.leave():
                    self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
        for job in list(self._tasks):
            self._cancel(job)
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._source.close()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Remember(memory):
                self._around.journal.append(memory)
            case WritePointer(pointer):
                self._write_pointer(pointer)
            case Run(job, step, goal, deltas):
                self._spawn(job, self._run(job, step, goal, deltas=deltas))
            case Refresh(job, release):
                self._spawn(job, self._refresh(job, release))
            case Watch(job, release):
                self._spawn(job, self._watch(job, release))
            case Cancel(job):
                self._cancel(job)
            case Discard(goal, installed):
                self._discard(goal, installed=installed)
            case Collect(keep):
                self._collect(keep)

    def _write_pointer(self, pointer: Pointer) -> None:
        self._around.store.write_pointer(self.model, pointer)
        _log.info("pointer_written", model=self.model, **pointer_fields(pointer))

    def _collect(self, keep: frozenset[int]) -> None:
        for release in set(self._around.store.releases(self.model)) - keep:
            self._around.store.remove_release(self.model, release)

    def _discard(self, goal: Goal, *, installed: bool) -> None:
        store = self._around.store
        try:
            if installed:
                store.remove_release(self.model, goal.release)
            else:
                store.discard_staged(self.model, goal.release)
        except MeshError as error:
            _log.warning("release_not_removed", model=self.model, release=goal.release, error=error.message)

    # Jobs.

    def _spawn(self, job: int, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        if job:
            self._tasks[job] = task
        task.add_done_callback(lambda _: self._ended(job, task))

    def _ended(self, job: int, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if self._tasks.get(job) is task:
            del self._tasks[job]
        if not task.cancelled() and task.exception() is not None:
            _log.error("job_broke", model=self.model, job=job, error=repr(task.exception()))
            self.send(Failed(job, Failure.TRANSIENT, f"The agent failed in an unforeseen way: {task.exception()!r}."))

    def _cancel(self, job: int) -> None:
        stop = self._stops.pop(job, None)
        if stop is not None:
            stop.set()
            self._source.abort()
        task = self._tasks.pop(job, None)
        if task is not None:
            task.cancel()

    async def _run(self, job: int, step: State, goal: Goal, *, deltas: bool) -> None:
        try:
            await self._step(job, step, goal, deltas=deltas)
        except DiskFullError as error:
            event: Event = Failed(job, Failure.FULL, error.message)
        except DeltaError as error:
            event = Failed(job, Failure.DELTA, error.message)
        except MeshError as error:
            bad = step is State.GATE and error.code is Code.UNTRUSTED
            event = Failed(job, Failure.BAD if bad else Failure.TRANSIENT, error.message, asked_pause_s(error))
        except OSError as error:
            event = Failed(job, Failure.TRANSIENT, f"{step} failed: {error.strerror or error}.")
        else:
            event = Done(job)
        self.send(event)

    async def _step(self, job: int, step: State, goal: Goal, *, deltas: bool) -> None:
        store = self._around.store
        if step is State.GATE:
            # The machine's own deadline comes a little later: the child is killed here, with its reason.
            timeout_s = self._around.config.limits.gate_s * 0.95
            await self._gate.run(store.folder(self.model, goal.release), timeout_s=timeout_s)
            return
        stop = self._stops[job] = threading.Event()
        async with self._working:  # a cancelled thread may need a moment to notice
            if step is State.PLAN or self._installer is None:
                self._installer = self._make_installer(goal)
            installer = self._installer
            try:
                await self._in_thread(lambda: self._work(installer, step, stop, deltas=deltas))
            finally:
                self._stops.pop(job, None)

    def _make_installer(self, goal: Goal) -> Installer:
        around = self._around
        data = read_manifest(around.store, self.model, goal.release, goal.sha256)
        folder = around.config.tenant_keys
        return Installer(
            around.store,
            data if data is not None else around.metadata.manifest(goal.sha256),
            self._source,
            supply=self._source,
            meter=around.meter,
            limits=around.config.limits,
            tenant_keys=Path(folder) if folder else None,
            metered=around.config.metered,
            peers=around.peers,
        )

    def _work(self, installer: Installer, step: State, stop: threading.Event, *, deltas: bool) -> None:
        before = installer.received_bytes
        try:
            match step:
                case State.PLAN:
                    installer.plan(stop, deltas=deltas)
                case State.FETCH:
                    installer.fetch(stop)
                case State.PATCH:
                    installer.patch(stop)
                case State.VERIFY:
                    installer.verify()
                case _:
                    installer.stage()
        finally:
            self._received_bytes += installer.received_bytes - before

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Run in the executor; a cancelled caller waits for the thread's end, so that no two touch the same files."""
        future = asyncio.get_running_loop().run_in_executor(self._around.executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with suppress(Exception):
                await future
            raise

    async def _refresh(self, job: int, release: int | None) -> None:
        try:
            found = await self._around.host.follow_pointer(
                self.model, release if job else None, timeout_s=self._around.config.limits.activate_s
            )
        except MeshError as error:
            failure = Failure.BAD if error.code is Code.UNTRUSTED else Failure.TRANSIENT
            event: Event = Failed(job, failure, error.message)
        else:
            event = Loaded(job, **_counters(found)) if found is not None else Loaded(job)
        if job:
            self.send(event)

    async def _watch(self, job: int, release: int) -> None:
        interval_s = max(0.1, self._around.config.probation_s / SAMPLES)
        while self._around.host.present:
            try:
                versions = await self._around.host.ask("stats", self.model, timeout_s=max(1.0, interval_s))
            except MeshError:
                self.send(Sampled(job, heard=False))
            else:
                found = versions.get(release)
                if found is None:
                    self.send(Sampled(job, heard=False))
                else:
                    failed = found.error or "no reason given" if found.state == "failed" else ""
                    reference = versions.get(self._replaced_by(release) or 0)
                    latency = reference.latency if reference is not None else {}
                    self.send(Sampled(job, **_counters(found), failed=failed, reference=latency))
            await asyncio.sleep(interval_s)

    def _replaced_by(self, release: int) -> int | None:
        """What a release on trial is compared with: stable, or if it is stable itself, what was before."""
        pointer = self._machine.pointer if self._machine is not None else Pointer()
        return pointer.stable if pointer.stable != release else pointer.last_good

    # Time and faults.

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._machine is not None and not math.isinf(self._machine.deadline):
            self._timer = asyncio.get_running_loop().call_at(self._machine.deadline, self._tick)

    def _tick(self) -> None:
        self.send(Ticked())

    def _start_over(self, error: Exception) -> None:
        """The disk did not take a record: forget this machine and begin from what the disk says."""
        self._fault = f"{self.model} cannot be changed: {error}. It is tried again from what is on the disk."
        _log.error("replica_fault", model=self.model, error=str(error))
        self._machine = None
        for job in list(self._tasks):
            self._cancel(job)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(REBOOT_S, self._reboot)
        self._around.changed()

    def _reboot(self) -> None:
        self._spawn(0, self._boot_again())

    async def _boot_again(self) -> None:
        with suppress(OSError):
            await self.boot()
            return
        self._start_over(OSError("the disk still refuses"))


def _counters(version: VersionState) -> dict[str, Any]:
    names = ("requests", "errors", "latency", "compared", "disagreed")
    return {name: getattr(version, name) for name in names}


def replica_limits(config: AgentConfig) -> ReplicaLimits:
    """The bounds of a machine from the agent's configuration."""
    limits = config.limits
    return ReplicaLimits(
        check_s=limits.check_s,
        plan_s=limits.plan_s,
        fetch_s=limits.fetch_s,
        patch_s=limits.patch_s,
        verify_s=limits.verify_s,
        stage_s=limits.stage_s,
        gate_s=limits.gate_s,
        activate_s=limits.activate_s,
        probation_s=config.probation_s,
        backoff_base_s=limits.backoff_base_s,
        backoff_cap_s=limits.backoff_cap_s,
        apply_spread_s=config.apply_spread_s,
        on_delta_failure=config.on_delta_failure,
        metered=config.metered,
        boots_max=limits.boots_max,
        error_share_max=limits.error_share_max,
        errors_min=limits.errors_min,
        p99_factor_max=limits.p99_factor_max,
        p99_slack_us=limits.p99_slack_us,
        answers_min=limits.answers_min,
        disagreement_share_max=limits.disagreement_share_max,
        compared_min=limits.compared_min,
        probation_requests=limits.probation_requests,
    )
