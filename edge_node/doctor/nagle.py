"""Whether small packets wait for an acknowledgement of TCP, on our side of the broker and on its own.

Nagle's algorithm holds a second small segment back until the first is acknowledged, and the other end delays that
acknowledgement by up to 40 ms if it has nothing to say (RFC 896, RFC 1122 4.2.3.2). Both can be provoked with PUBLISH
packets alone, which need no right to the topic: a refused one is acknowledged as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from edge_node.doctor.findings import DoctorLimits, Finding
from edge_node.doctor.player import Player
from nearcast.transport.mqtt.message import Message

_GAP_S = 0.001
"""Between two packets that are to travel in segments of their own."""


async def measure_stalls(player: Player, topic: str, limits: DoctorLimits) -> list[Finding]:
    """Compare three round trips: a plain one, one with two segments of ours, one with two segments of the broker's."""
    clock = asyncio.get_running_loop().time
    spoken, silent = Message(topic=topic), Message(topic=topic, qos=0)

    async def plain() -> None:
        await player.confirmed(spoken)

    async def ours() -> None:
        player.connection.publish(silent)  # nothing answers it, so its acknowledgement is delayed
        await asyncio.sleep(_GAP_S)
        await player.confirmed(spoken)

    async def theirs() -> None:
        await asyncio.gather(player.confirmed(spoken), player.confirmed(spoken))  # two PUBACKs, and silence from us

    async def fastest_ms(exchange: Callable[[], Awaitable[None]]) -> float:
        times = []  # a busy machine delays some rounds, Nagle each of them
        for _ in range(limits.rounds):
            began = clock()
            await exchange()
            times.append(1e3 * (clock() - began))
        return min(times)

    for _ in range(limits.warm_up_rounds):
        await plain()
    floor_ms = await fastest_ms(plain)
    ours_ms, theirs_ms = await fastest_ms(ours) - 1e3 * _GAP_S, await fastest_ms(theirs)
    return judge(floor_ms, ours_ms, theirs_ms, limits.stall_ms)


def judge(floor_ms: float, ours_ms: float, theirs_ms: float, stall_ms: float) -> list[Finding]:
    """What the three round trips mean: only the time beyond the plain one counts, however far the broker is."""
    told = f"round trip {floor_ms:.1f} ms, with two segments {{:.1f}} ms"
    here, there = ours_ms - floor_ms > stall_ms, theirs_ms - floor_ms > stall_ms
    return [
        Finding(
            check="nagle-here",
            status="fail" if here else "ok",
            detail=told.format(ours_ms),
            advice="Something on this machine sets TCP_NODELAY off for our connection." if here else "",
        ),
        Finding(
            check="nagle-broker",
            status="fail" if there else "ok",
            detail=told.format(theirs_ms),
            advice="Set `set_tcp_nodelay true` in mosquitto.conf: every answer waits for it." if there else "",
        ),
    ]
