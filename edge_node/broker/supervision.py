"""A broker that ends is started again."""

from __future__ import annotations

import asyncio
import random

from edge_node.broker.process import Broker
from nearcast.backoff import full_jitter_s
from nearcast.telemetry import get_logger
from router.child import ChildLimits

_log = get_logger("nearcast.broker")


async def keep_alive(broker: Broker, limits: ChildLimits | None = None) -> None:
    """Start the broker again whenever it ends; one that keeps ending is started ever more seldom."""
    limits, generator, clock = limits or ChildLimits(), random.Random(), asyncio.get_running_loop().time
    attempt = 0
    while True:
        began = clock()
        code = await broker.wait()
        attempt = 0 if clock() - began >= limits.stable_s else attempt + 1
        _log.warning("broker_ended", exit_code=code)
        if attempt > 1:  # the first restart is at once: devices are waiting
            await _pause(attempt, generator, limits)
        while problem := await broker.launch():
            attempt += 1
            _log.warning("broker_not_started", problem=problem)
            await _pause(attempt, generator, limits)


async def _pause(attempt: int, generator: random.Random, limits: ChildLimits) -> None:
    await asyncio.sleep(full_jitter_s(attempt, generator, base_s=limits.restart_base_s, max_s=limits.restart_max_s))
