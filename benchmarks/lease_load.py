"""`python -m benchmarks.lease_load NODE ROUTER quick|full`: the lease benchmark's client; prints JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop

from benchmarks.router_node import MODEL
from nearcast.client import AsyncClient
from nearcast.handler import RequestContext
from nearcast.transport.grpc import make_channel
from nearcast.transport.remote import RemoteNode
from nearcast.wire.request import TensorRequest

SIZES = {"600B": 600, "602kB": 602_112}
DEADLINE_S = 5.0
IN_FLIGHT = {"600B": 16, "602kB": 4}


@dataclass(frozen=True)
class Plan:
    """Rounds, and requests of one round by size: one at a time, and many."""

    rounds: int
    singles: dict[str, int]
    many: dict[str, int]


QUICK = Plan(9, {"600B": 300, "602kB": 20}, {"600B": 1_000, "602kB": 80})
FULL = Plan(31, {"600B": 1_500, "602kB": 150}, {"600B": 8_000, "602kB": 600})

Ask = Callable[[dict[str, Any]], Awaitable[np.ndarray]]


def bare(address: str) -> tuple[RemoteNode, Ask]:
    """A channel and nothing else: the message is encoded and decoded, and has a deadline."""
    node = RemoteNode(make_channel("ngh2", address))
    ids = itertools.count()

    async def ask(inputs: dict[str, Any]) -> np.ndarray:
        request = TensorRequest(model=MODEL, inputs=inputs, id=f"b-{next(ids)}")
        context = RequestContext(deadline=time.monotonic() + DEADLINE_S)
        return (await node.infer(request, context)).decode()["y"]

    return node, ask


def by(client: AsyncClient) -> Ask:
    """The SDK."""

    async def ask(inputs: dict[str, Any]) -> np.ndarray:
        return (await client.infer(MODEL, inputs, deadline_ms=DEADLINE_S * 1e3)).outputs["y"]

    return ask


async def one_by_one(ask: Ask, inputs: dict[str, Any], count: int) -> tuple[float, float]:
    """Median latency and processor time per call, in microseconds."""
    latencies = []
    cpu = time.process_time()
    for _ in range(count):
        began = time.perf_counter()
        await ask(inputs)
        latencies.append(time.perf_counter() - began)
    return statistics.median(latencies) * 1e6, (time.process_time() - cpu) / count * 1e6


async def many(ask: Ask, inputs: dict[str, Any], count: int, in_flight: int) -> float:
    """Answers per second with `in_flight` requests under way."""

    async def worker() -> None:
        for _ in range(count // in_flight):
            await ask(inputs)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return count // in_flight * in_flight / (time.perf_counter() - began)


async def measure(ways: dict[str, Ask], size: str, plan: Plan) -> dict[str, Any]:
    """All ways in turn, in an order that rotates, so that a slow moment of the machine meets each of them."""
    inputs = {"x": (np.arange(SIZES[size]) % 251).astype(np.uint8)}
    for ask in ways.values():
        for _ in range(50):
            if not np.array_equal(await ask(inputs), inputs["x"]):
                raise RuntimeError("the answer is not the node's")
    p50: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    rps: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for number in range(plan.rounds):
        turn = number % len(names)
        for way in names[turn:] + names[:turn]:
            latency, processor = await one_by_one(ways[way], inputs, plan.singles[size])
            p50[way].append(latency)
            cpu[way].append(processor)
            rps[way].append(await many(ways[way], inputs, plan.many[size], IN_FLIGHT[size]))
    return {
        "rps_ratios": [a / b for a, b in zip(rps["lease"], rps["direct"], strict=True)],
        "p50_ratios": [b / a for a, b in zip(p50["lease"], p50["direct"], strict=True)],
        "rps": {way: statistics.median(values) for way, values in rps.items()},
        "p50_us": {way: statistics.median(values) for way, values in p50.items()},
        # Other work on the machine only ever adds to processor time: the best round of each is nearest to the truth.
        "added_cpu_us": min(cpu["lease"]) - min(cpu["bare"]),
    }


async def main() -> None:
    address, router, kind = sys.argv[1:]
    plan = QUICK if kind == "quick" else FULL
    node, ask_bare = bare(address)
    front, ask_front = bare(router)
    async with AsyncClient([address]) as direct, AsyncClient(router) as leased:
        ways = {"direct": by(direct), "lease": by(leased), "bare": ask_bare, "routed": ask_front}
        seen: dict[str, Any] = {size: await measure(ways, size, plan) for size in SIZES}
        seen["passed_on"] = leased.counts.passed_on
    await node.close()
    await front.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    uvloop.run(main())
