"""One run of chaos: broker, node, devices, two links that can be cut, and faults in random order."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.chaos_clients import Client
from benchmarks.chaos_devices import Device
from benchmarks.chaos_history import Event, History
from benchmarks.chaos_mutants import wire_of
from benchmarks.chaos_node import Node, NodeSettings, read_journal
from benchmarks.chaos_proxy import CUTS, Proxy
from benchmarks.chaos_wire import MOMENTS, Moment, NodeWire
from edge_node.broker import Broker, Kind
from edge_node.mqtt.worker import Durability

Fault: TypeAlias = Literal["node", "broker", "link"]
READY_TIMEOUT_S = 15.0
TRAP_S = 0.5
"""A trap that has not closed by then is sprung."""
QUIET_TIMEOUT_S = 30.0
OWED_TIMEOUT_S = 15.0
QUIET_S = 1.0
SESSION_EXPIRY_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens in a run.

    Attributes:
        pace_s: mean time between two faults.
        moments: when the node is killed; None = whenever.
        clients: devices that use our own client, and stream too.
        rate_hz: requests of each device in a second.
        wrong: the one mistake that this node or its link makes; "" = none.
        reboots: each restart of the node follows a power cut, as far as it can tell.
    """

    node_kills: int
    broker_kills: int
    link_cuts: int
    pace_s: float = 0.35
    devices: int = 8
    clients: int = 2
    rate_hz: float = 10.0
    broker: Kind = "mosquitto"
    durability: Durability = "full"
    wrong: str = ""
    reboots: bool = False
    moments: tuple[Moment | None, ...] = (None, *MOMENTS)
    seed: int = 1


class Scene:
    """Everything that takes part, while it lasts."""

    def __init__(self, plan: Plan, folder: Path, broker: Broker, wire: NodeWire, links: tuple[Proxy, Proxy]) -> None:
        self.plan = plan
        self.history = wire.history
        self.wire = wire
        self.node_link, self.device_link = links
        self.restarted = asyncio.Event()
        self.broker = broker
        self.settings = NodeSettings(
            port=self.node_link.port,
            folder=str(folder),
            durability=plan.durability,
            wrong=plan.wrong,
            reboots=plan.reboots,
        )
        self.node = Node(self.settings)
        self.draw = random.Random(plan.seed)
        self._folder = folder

    async def strike(self, fault: Fault) -> None:
        """Carry out one fault."""
        if fault == "link":
            self._cut()
        elif fault == "broker":
            await self._kill_broker()
        else:
            await self._kill_node_at(self.draw.choice(self.plan.moments))

    def _cut(self) -> None:
        link = self.draw.choice((self.node_link, self.device_link))
        how = self.draw.choice(CUTS)
        link.cut(how, self.draw, share=1.0 if link is self.node_link else 0.5)
        self.history.note("link cut", key=how)

    async def _kill_broker(self) -> None:
        """The broker dies, forgets everything and comes back."""
        await self.broker.kill()
        self.history.note("broker killed")
        self.wire.is_ready = False
        shutil.rmtree(self._folder / "broker" / "store", ignore_errors=True)
        await asyncio.sleep(self.draw.choice((0.0, 0.1, 0.5)))
        while problem := await self.broker.launch():
            if "in use" not in problem:
                raise RuntimeError(problem)
            await asyncio.sleep(0.05)

    async def _kill_node_at(self, moment: Moment | None) -> None:
        """Kill the node, in the very moment that something passes on its link, or whenever."""
        if self.draw.random() < 0.8:  # else it may die while it comes up
            await self.ready()
        if moment is not None:
            closed = asyncio.Event()

            def close() -> None:
                self.node.strike()
                closed.set()

            self.wire.trap = (moment, close)
            await self.until(closed.is_set, TRAP_S)
            self.wire.trap = None
        await self.restart()

    async def restart(self) -> None:
        """Kill the node and start it again."""
        await self.node.kill()
        self.history.note("node killed")
        self.wire.is_ready = False
        self.node.start()
        self.restarted.set()
        self.restarted.clear()

    async def ready(self) -> None:
        """Return once the node has subscribed since the last kill."""
        await self.until(lambda: self.wire.is_ready, READY_TIMEOUT_S)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for a condition; whether it came true."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.005)
        return True


@asynccontextmanager
async def scene(plan: Plan, folder: Path) -> AsyncIterator[Scene]:
    """Start all but the devices."""
    folder.mkdir(parents=True)
    async with AsyncExitStack() as stack:
        broker = await Broker.start(folder / "broker", kind=plan.broker)
        stack.push_async_callback(broker.stop)
        wire = wire_of(plan.wrong, History())
        node_link = await stack.enter_async_context(Proxy(broker.port, wire.watch))
        device_link = await stack.enter_async_context(Proxy(broker.port, lambda _session, _is_client, frame: frame))
        stage = Scene(plan, folder, broker, wire, (node_link, device_link))
        stage.node.start()
        stack.push_async_callback(stage.node.kill)
        await stage.ready()
        yield stage


def faults_of(plan: Plan) -> list[Fault]:
    """All faults of a plan in random order."""
    kinds: tuple[tuple[Fault, int], ...] = (
        ("node", plan.node_kills),
        ("broker", plan.broker_kills),
        ("link", plan.link_cuts),
    )
    faults = [kind for kind, times in kinds for _ in range(times)]
    random.Random(plan.seed).shuffle(faults)
    return faults


def make_devices(stage: Scene) -> list[Device | Client]:
    """The devices of a plan; every second one has a session that outlives its connection."""
    plan, port = stage.plan, stage.device_link.port
    clients = [
        Client(f"c{number}", port, stage.history, random.Random(f"{plan.seed}/c{number}"), plan.rate_hz / 2)
        for number in range(plan.clients)
    ]
    devices = [
        Device(
            name=f"d{number}",
            port=port,
            history=stage.history,
            draw=random.Random(f"{plan.seed}/{number}"),
            rate_hz=plan.rate_hz,
            restarted=stage.restarted,
            session_expiry_s=SESSION_EXPIRY_S if number % 2 else 0,
        )
        for number in range(plan.devices)
    ]
    return [*devices, *clients]


async def live_through(plan: Plan, folder: Path) -> Sequence[Event]:
    """Run a plan, then let everybody finish in peace; returns the history."""
    problems: list[Exception] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: _keep(context, problems))
    async with scene(plan, folder) as stage, asyncio.TaskGroup() as group:
        devices = make_devices(stage)
        running = [group.create_task(device.run()) for device in devices]
        for fault in faults_of(plan):
            await asyncio.sleep(stage.draw.expovariate(1.0 / plan.pace_s))
            await stage.strike(fault)
        await _settle(stage, devices)
        for task in running:
            task.cancel()
        stage.history.add(*read_journal(stage.settings.journal))
    if problems:
        raise ExceptionGroup("the run itself failed", problems)
    return stage.history.events()


def _keep(context: Mapping[str, object], problems: list[Exception]) -> None:
    """What fails in a callback of ours must fail the run: an observer that is blind sees no fault."""
    failure, problem = context.get("exception"), RuntimeError(f"{context.get('message')}")
    problem.__cause__ = failure if isinstance(failure, BaseException) else None
    problems.append(problem)


async def _settle(stage: Scene, devices: Sequence[Device | Client]) -> None:
    await stage.ready()
    for device in devices:
        device.is_asking = False
    await stage.until(lambda: not any(device.pending for device in devices), QUIET_TIMEOUT_S)
    await stage.until(lambda: not stage.history.is_owed, OWED_TIMEOUT_S / (5 if stage.plan.wrong else 1))
    await asyncio.sleep(QUIET_S)
