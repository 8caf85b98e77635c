"""A request, and then a sample of a stream, that kill the node each time that they run, among others that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_clients import LIMITS, sample_of
from benchmarks.chaos_devices import TENANT, Device
from benchmarks.chaos_judge import OK
from benchmarks.chaos_node import POISON, POISON_SAMPLE, STREAM
from benchmarks.chaos_run import Plan, Scene, make_devices, scene
from nearcast.client.mqtt import MqttDevice

TIMEOUT_S = 30.0
PAUSE_S = 1.0
"""Others ask before the poison comes, and after it is gone."""
SAMPLES = 4
"""Harmless ones, half of them before the poisonous one."""
STREAMER = "streamer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisoned:
    """What one poisonous request and one poisonous sample did.

    Attributes:
        crashes, data_crashes: of the node, by the request and by the sample.
        status: of the request's answer, 0 = none.
        letters: dead letters that were announced, each counted once.
        others, others_failed: requests of other devices, and those of them that got no result.
        results: of the harmless samples in the same stream.
    """

    crashes: int
    data_crashes: int
    status: int
    letters: int
    others: int
    others_failed: int
    results: int


async def poison(plan: Plan, folder: Path) -> Poisoned:
    """Send the poison; whoever looks after the node starts it again each time."""
    url = f"mqtt://127.0.0.1:{{port}}/{TENANT}/{STREAMER}"
    async with scene(plan, folder) as stage, asyncio.TaskGroup() as group:
        devices = [device for device in make_devices(stage) if isinstance(device, Device)]
        running = [group.create_task(device.run()) for device in devices]
        await asyncio.sleep(PAUSE_S)
        victim, message = devices[0], devices[0].request(body=POISON)
        victim.is_asking = False
        await stage.until(lambda: victim.is_connected, TIMEOUT_S)
        victim.ask(message)
        key = message.correlation.hex()
        crashes = await _restart_until(stage, lambda: key not in victim.pending)
        async with MqttDevice(url.format(port=stage.device_link.port), limits=LIMITS) as streamer:
            for number in range(SAMPLES + 1):
                await streamer.send(STREAM, sample_of(POISON_SAMPLE if number == SAMPLES // 2 else 0.0))
            data_crashes = await _restart_until(stage, lambda: _results(stage) == SAMPLES)
        await asyncio.sleep(PAUSE_S)
        for device in devices:
            device.is_asking = False
        await stage.until(lambda: not any(device.pending for device in devices), TIMEOUT_S)
        for task in running:
            task.cancel()
        return _judge(stage, key, crashes, data_crashes)


async def _restart_until(stage: Scene, is_over: Callable[[], bool]) -> int:
    """Start the node again whenever it dies; returns how often that was, once it is over."""
    crashes, deadline = 0, asyncio.get_running_loop().time() + TIMEOUT_S
    while not is_over() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
        if not stage.node.is_alive:
            crashes += 1
            await stage.restart()
    return crashes


def _results(stage: Scene) -> int:
    return len({event.key for event in stage.history.events() if event.kind == "event" and event.device == STREAMER})


def _judge(stage: Scene, key: str, crashes: int, data_crashes: int) -> Poisoned:
    events = stage.history.events()
    answers = {event.key: event.status for event in events if event.kind == "answered"}
    others = {event.key for event in events if event.kind == "asked" and not event.once} - {key}
    return Poisoned(
        crashes=crashes,
        data_crashes=data_crashes,
        status=answers.get(key, 0),
        letters=len({event.digest for event in events if event.kind == "buried"}),
        others=len(others),
        others_failed=sum(answers.get(other) != OK for other in others),
        results=_results(stage),
    )
