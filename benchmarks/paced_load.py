"""What the benchmarks of deadlines and of frames have in common: the client, and how much work is a millisecond."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterator

from benchmarks.paced import make_request
from benchmarks.processes import LOAD_CPU
from nearcast.transport.grpc import make_channel
from nearcast.transport.oip import MODEL_INFER
from nearcast.transport.seam import Channel
from nearcast.wire.status import served_from_trailers

PROBE_WORK = 500
PROBES = 15
WARM_S = 2.0
"""Under load before anything counts: the server's loop goes first once it was quiet for a second."""


@contextlib.contextmanager
def on_load_cpu() -> Iterator[None]:
    """This process on the load's core, first there where the system grants it, and without collections of garbage.

    What it waits for would look like late answers.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LOAD_CPU})
    with contextlib.suppress(PermissionError):
        # Not its children: the server is as any other.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.sched_setaffinity(0, before)


@contextlib.asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[Channel]:
    """A channel of its own."""
    channel = make_channel("ngh2", address)
    try:
        yield channel
    finally:
        await channel.close()


async def find_work(channel: Channel, target_ms: float) -> int:
    """The work that takes the model `target_ms`, by the median of some runs one after the other."""
    times = []
    for _ in range(PROBES):
        reply = await channel.unary(MODEL_INFER, (make_request(PROBE_WORK),))
        times.append(served_from_trailers(reply.trailers).compute_us / 1e3)
    return max(1, round(PROBE_WORK * target_ms / statistics.median(times)))


async def measure_capacity(
    channel: Channel, work: int, *, seconds: float, in_flight: int = 4
) -> tuple[float, list[float]]:
    """Answers a second with so many requests without deadlines always in flight.

    And of each the milliseconds that were neither the queue's nor the model's: the way there and back, busy as it is.
    """
    message = make_request(work)
    warm = time.monotonic() + WARM_S
    until = warm + seconds
    ends: list[float] = []
    ways_ms: list[float] = []

    async def client() -> None:
        while (began := time.monotonic()) < until:
            reply = await channel.unary(MODEL_INFER, (message,))
            if began >= warm:
                ends.append(time.monotonic())
                served = served_from_trailers(reply.trailers)
                ways_ms.append((ends[-1] - began) * 1e3 - (served.queue_us + served.compute_us) / 1e3)

    await asyncio.gather(*(client() for _ in range(in_flight)))
    ends.sort()
    return (len(ends) - 1) / (ends[-1] - ends[0]), ways_ms


def quantile(values: list[float], q: float) -> float:
    """The smallest value that is at least as large as a share `q` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
