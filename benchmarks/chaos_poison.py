"""A request that kills the node each time that it runs, among others that do not."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_devices import Device
from benchmarks.chaos_judge import OK
from benchmarks.chaos_node import POISON, read_journal
from benchmarks.chaos_run import Plan, Scene, make_devices, scene

TIMEOUT_S = 30.0
PAUSE_S = 1.0
"""Others ask before the poison comes, and after it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisoned:
    """What one poisonous request did.

    Attributes:
        crashes: of the node. status: of its answer, 0 = none.
        letters: dead letters that were announced.
        others: requests of other devices; `others_failed` of them got no result.
    """

    crashes: int
    status: int
    letters: int
    others: int
    others_failed: int


async def poison(plan: Plan, folder: Path) -> Poisoned:
    """Send one poisonous request; whoever looks after the node starts it again each time."""
    crashes = 0
    async with scene(plan, folder) as stage, asyncio.TaskGroup() as group:
        devices = make_devices(stage)
        running = [group.create_task(device.run()) for device in devices]
        await asyncio.sleep(PAUSE_S)
        victim = devices[0]
        assert isinstance(victim, Device)
        message = victim.request(body=POISON)
        victim.is_asking = False
        await stage.until(lambda: victim.is_connected, TIMEOUT_S)
        victim.ask(message)
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        while message.correlation.hex() in victim.pending and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
            if not stage.node.is_alive:
                crashes += 1
                await stage.restart()
        await asyncio.sleep(PAUSE_S)
        for device in devices:
            device.is_asking = False
        with contextlib.suppress(TimeoutError):
            await stage.until(lambda: not any(device.pending for device in devices), TIMEOUT_S)
        for task in running:
            task.cancel()
        ran = sum(event.key == message.correlation.hex() for event in read_journal(stage.settings.journal))
        return _judge(stage, message.correlation.hex(), max(crashes, ran))


def _judge(stage: Scene, key: str, crashes: int) -> Poisoned:
    events = stage.history.events()
    answers = {event.key: event.status for event in events if event.kind == "answered"}
    others = {event.key for event in events if event.kind == "asked" and not event.once} - {key}
    return Poisoned(
        crashes=crashes,
        status=answers.get(key, 0),
        letters=sum(event.kind == "buried" for event in events),
        others=len(others),
        others_failed=sum(answers.get(other) != OK for other in others),
    )
