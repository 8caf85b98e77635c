"""`python -m benchmarks.storm_devices PORT COUNT [OPTIONS]`: many devices on one broker, each a real device client.

Says `{"up": …}` once all are connected. For a line `{"outage_s": …}` each device asks one question at a moment of its
own in that time, and says with the last answer when each of them was up again and answered; for `{"up_after": …}` they
only say when they were up again. `--together` takes the jitter out: what the others would be without it.
`--identities` names a folder with one identity for each device, which then come over TLS.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from nearcast.client.mqtt import MqttDevice
from nearcast.client.provisioning import device_url, identity_tls
from nearcast.errors import MeshError
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.connection import Connection

DEADLINE_MS = 60_000.0
POLL_S = 0.05
IMAGE = np.zeros((1, 256), np.float32)


class _Latest(random.Random):
    """Full jitter without the jitter: always the longest wait."""

    def random(self) -> float:
        return 0.0


class Member:
    """One device, when it was last up, and the wishes that reached it."""

    def __init__(self, port: int, number: int, *, together: bool, identities: Path | None) -> None:
        self.up_at = self.answered_at = 0.0
        self.wishes = 0
        url, tls = f"mqtt://127.0.0.1:{port}/local/storm-{number}", None
        if identities is not None:
            identity = DeviceIdentity.load(identities / str(number))
            url, tls = device_url(identity), identity_tls(identity)
        self.device = MqttDevice(url, tls=tls, apply=self._wish)
        link, go_on = self.device.link, self.device._go_on

        def up(connection: Connection) -> None:
            self.up_at = time.monotonic()
            go_on(connection)

        link._on_up = up
        if together:
            link._generator = _Latest()

    def _wish(self, desired: dict[str, Any]) -> dict[str, Any]:
        self.wishes += 1
        return desired

    async def ask(self, within_s: float) -> str:
        """Ask at some moment; "" or what went wrong."""
        await asyncio.sleep(random.random() * within_s)
        try:
            answer = await self.device.infer("noop", {"x": IMAGE}, deadline_ms=DEADLINE_MS)
        except MeshError as error:
            return str(error)
        self.answered_at = time.monotonic()
        return "" if np.array_equal(answer.outputs["x"], IMAGE) else "another answer"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--identities", type=Path)
    options = parser.parse_args()
    members = [
        Member(options.port, number, together=options.together, identities=options.identities)
        for number in range(options.count)
    ]
    async with AsyncExitStack() as stack:
        for member in members:
            await stack.enter_async_context(member.device)
        for member in members:
            await member.device.link.wait_up()
        _say(up=len(members))
        while line := await asyncio.to_thread(sys.stdin.readline):
            told = json.loads(line)
            if "outage_s" in told:
                problems = await asyncio.gather(*(member.ask(told["outage_s"]) for member in members))
                _say(
                    up_at=[member.up_at for member in members],
                    answered_at=[member.answered_at for member in members],
                    problems=[problem for problem in problems if problem],
                )
            elif "up_after" in told:
                while min(member.up_at for member in members) <= told["up_after"]:
                    await asyncio.sleep(POLL_S)
                _say(up_at=[member.up_at for member in members])
            else:
                _say(wishes=[member.wishes for member in members])


def _say(**said: Any) -> None:
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
