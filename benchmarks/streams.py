"""Streaming calls of our channels: what a message costs, how fast a cancelled call ends, what fails as connections go.

Server and channel share one process and one loop, so that both ends of a call are on one clock.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvloop

from benchmarks.rows import Row
from nearcast.errors import Code, MeshError
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.seam import Call, CallError, Channel, Limits, Methods, Reply

MESSAGE = bytes(100)
ECHO, TALK, HANG, SLOW = "/b.B/echo", "/b.B/talk", "/b.B/hang", "/b.B/slow"
CALLERS = 200
CONNECTION_AGE_S = 0.2
RESETS_AT_ONCE = 10


class Service:
    """Notes when its methods were cancelled, and when it ended a call itself."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled: asyncio.Queue[float] = asyncio.Queue()
        self.failed_at = 0.0

    async def echo(self, message: bytes, _: Call) -> Reply:
        return Reply((message,))

    async def slow(self, message: bytes, _: Call) -> Reply:
        await asyncio.sleep(0.02)
        return Reply((message,))

    async def talk(self, messages: AsyncIterator[bytes], _: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            if not message:
                self.failed_at = time.monotonic()
                raise MeshError(Code.OVERLOADED, "enough")
            yield Reply((message,))

    async def hang(self, message: bytes, _: Call) -> Reply:
        self.started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.put_nowait(time.monotonic())
            raise
        return Reply((message,))


@asynccontextmanager
async def calling(kind: Kind, service: Service, age_s: float = 0.0) -> AsyncIterator[Channel]:
    methods = Methods(unary={ECHO: service.echo, HANG: service.hang, SLOW: service.slow}, stream={TALK: service.talk})
    server = make_server(kind, methods, address="127.0.0.1:0", limits=Limits(connection_age_s=age_s))
    await server.start()
    channel = make_channel(kind, server.address)
    try:
        yield channel
    finally:
        await channel.close()
        await server.drain(0.5)


async def bodies(count: int, *last: bytes) -> AsyncIterator[Sequence[bytes]]:
    for _ in range(count):
        yield (MESSAGE,)
    for message in last:
        yield (message,)
        await asyncio.Event().wait()


async def cost_us(kind: Kind, count: int) -> float:
    """Processor time of both ends for one message and its answer, on one stream without pauses."""
    async with calling(kind, Service()) as channel:
        for messages in (count // 10, count):
            began = time.process_time()
            heard = [message async for message in channel.stream(TALK, bodies(messages))]
            spent_s = time.process_time() - began
            if heard != [MESSAGE] * messages:
                raise RuntimeError(f"{kind}: the stream was not echoed")
        return spent_s / count * 1e6


async def cancel_times_ms(count: int) -> tuple[list[float], list[float]]:
    """From the caller's cancel to the method's, and from the method's error to the caller's."""
    service = Service()
    to_server, to_client = [], []
    async with calling("ngh2", service) as channel:
        for _ in range(count):
            service.started.clear()
            task = asyncio.ensure_future(channel.unary(HANG, (MESSAGE,)))
            await service.started.wait()
            began = time.monotonic()
            task.cancel()
            to_server.append((await service.cancelled.get() - began) * 1e3)
            try:
                async for _ in channel.stream(TALK, bodies(1, b"")):
                    pass
            except CallError:
                to_client.append((time.monotonic() - service.failed_at) * 1e3)
    return to_server, to_client


async def fail_count(seconds: float, *, age_s: float, resets: bool) -> tuple[int, int]:
    """Calls that failed, and all calls, of many callers on one channel while its connections go."""
    failed = total = 0
    method = SLOW if resets else ECHO
    ends_at = time.monotonic() + seconds
    async with calling("ngh2", Service(), age_s) as channel:

        async def call() -> None:
            nonlocal failed, total
            while time.monotonic() < ends_at:
                total += 1
                try:
                    await channel.unary(method, (MESSAGE,))
                except CallError:
                    failed += 1

        async def reset() -> None:
            while resets and time.monotonic() < ends_at:
                tasks = [asyncio.ensure_future(channel.unary(HANG, (MESSAGE,))) for _ in range(RESETS_AT_ONCE)]
                await asyncio.sleep(0.002)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        await asyncio.gather(reset(), *(call() for _ in range(CALLERS)))
    return failed, total


def run(*, quick: bool) -> list[Row]:
    """Cost, cancellation and failures."""
    count, tries, seconds = (20_000, 200, 1.0) if quick else (100_000, 2000, 10.0)
    costs = {kind: uvloop.run(cost_us(kind, count // (1 if kind == "ngh2" else 10))) for kind in KINDS}
    to_server, to_client = uvloop.run(cancel_times_ms(tries))
    aged, aged_total = uvloop.run(fail_count(seconds, age_s=CONNECTION_AGE_S, resets=False))
    reset, reset_total = uvloop.run(fail_count(seconds, age_s=0, resets=True))
    return [
        Row("streams.cpu_vs_grpcio", costs["grpcio"] / costs["ngh2"], "x", "both ends, 100 B and its answer"),
        *(Row(f"streams.{kind}_message_cpu_us", cost, "us") for kind, cost in costs.items()),
        *_spread("streams.cancel_to_server", to_server),
        *_spread("streams.cancel_to_client", to_client),
        Row("streams.failed_by_connection_age", aged, "", f"of {aged_total} calls, {CONNECTION_AGE_S:g} s each"),
        Row("streams.failed_by_resets", reset, "", f"of {reset_total} calls beside calls that are cancelled"),
    ]


def _spread(name: str, values: list[float]) -> list[Row]:
    return [
        Row(f"{name}_p50_ms", statistics.median(values), "ms"),
        Row(f"{name}_p99_ms", statistics.quantiles(values, n=100)[98], "ms", f"of {len(values)}"),
    ]
