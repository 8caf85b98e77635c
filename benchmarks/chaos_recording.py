"""Records a real node with `strace`, life after life; each ends by SIGKILL."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path

import msgspec

from benchmarks.chaos_devices import Device
from benchmarks.chaos_history import History
from benchmarks.chaos_node import NodeSettings
from benchmarks.crash_trace import Call, read_trace, record_prefix
from edge_node.broker import Broker
from edge_node.mqtt.limits import PublishLimits

WAIT_S = 60.0
IN_FLIGHT = 8


async def record(folder: Path, *, requests: int, lives: int = 2) -> Sequence[Call]:
    """What a node does to its disk and says to its broker while a device asks; `folder` is new.

    All but the last life leave something unanswered.
    """
    (folder / "disk").mkdir(parents=True)
    broker = await Broker.start(folder / "broker", kind="mosquitto")
    history = History()
    device = Device("d0", broker.port, history, random.Random(1), 1.0, asyncio.Event(), session_expiry_s=600)
    device.is_asking = False
    settings = NodeSettings(port=broker.port, folder=str(folder))
    calls: list[Call] = []
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(device.run())
            for life in range(lives):
                leave = IN_FLIGHT // 2 if life < lives - 1 else 0
                trace = await _live(settings, folder / f"trace-{life}", _ask(device, requests, leave=leave))
                calls += read_trace(trace, folder / "disk")
            running.cancel()
    finally:
        await broker.stop()
    return calls


async def _live(settings: NodeSettings, trace: Path, work: Coroutine[None, None, None]) -> Path:
    """One life of the node, as long as the work takes; returns its trace."""
    command = [sys.executable, "-m", "benchmarks.chaos_node", msgspec.json.encode(settings).decode()]
    process = await asyncio.create_subprocess_exec(*record_prefix(trace, sockets=True), *command)
    try:
        await work
    finally:
        os.kill(_child_of(process.pid), signal.SIGKILL)
        await process.wait()
    return trace


async def _ask(device: Device, requests: int, *, leave: int) -> None:
    """Ask so many questions, a few at a time, some of them twice; return when all but `leave` are answered."""
    deadline = time.monotonic() + WAIT_S
    for number in range(requests):
        while len(device.pending) >= IN_FLIGHT or not device.is_connected:
            await _pause(deadline)
        message = device.request()
        device.ask(message)
        if number % 10 == 0:
            device.again(message)
    while len(device.pending) > leave:
        await _pause(deadline)
    if not leave:
        await asyncio.sleep(2 * PublishLimits().forget_delay_s)
        device.ask(device.request())  # its commit brings along what was to be forgotten by now
        while device.pending:
            await _pause(deadline)


async def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError("the traced node does not answer")
    await asyncio.sleep(0.002)


def _child_of(pid: int) -> int:
    """The node below its tracer."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
