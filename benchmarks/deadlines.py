"""When clients are answered that set a deadline: in random schedules in virtual time, and by a real server overloaded.

The real server takes 200 ms a request on its one core and is offered twice what it can answer, at random instants, with
deadlines of 0.25 to 2 s (the protocol's `timeout`, so that the client's own timer answers nothing). Lateness is the
arrival of whatever answer at the client minus the deadline, both on one clock. Twice: as by default, where what cannot
be in time is refused at once; and with that switched off, where the queue fills and deadlines end most requests.
Meanwhile `stalls` notes when the machine itself stood still, which makes answers late that are due then.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.deadline_schedules import Outcome, play
from benchmarks.paced import fill_store, make_request
from benchmarks.paced_load import channel_to, find_work, measure_capacity, on_load_cpu, quantile
from benchmarks.processes import serve
from benchmarks.rows import Row
from benchmarks.stalls import Span, watch_stalls
from nearcast.errors import Code, MeshError
from nearcast.transport.oip import MODEL_INFER
from nearcast.transport.seam import Channel

MODEL_MS = 200.0
OVERLOAD = 2.0
LATE_MS = 5.0
TIMEOUT_S = (0.25, 0.5, 1.0, 2.0)
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "run_late": {"late_quantile": 0.0}}


@dataclass(slots=True)
class Seen:
    """What clients saw: lateness of each answer in ms, from its deadline to its coming, and how it ended."""

    late_ms: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)


def run(*, quick: bool) -> list[Row]:
    """Virtual time first, then the real one."""
    schedules, seconds = (5_000, 10.0) if quick else (100_000, 150.0)
    total = sum((play(seed) for seed in range(schedules)), Outcome())
    rows = [
        Row("deadlines.schedules", schedules, "", f"{total.requests} requests"),
        Row("deadlines.virtual_latest_ms", total.latest_s * 1e3, "ms", "timers ring up to 2 ms late"),
        Row("deadlines.virtual_answered_share", total.answered / total.requests, "share"),
    ]
    every: list[float] = []
    with tempfile.TemporaryDirectory() as folder, on_load_cpu():
        root = fill_store(Path(folder))
        for name, limits in SETTINGS.items():
            with serve("benchmarks.paced", root, json.dumps(limits)) as ready, watch_stalls(ready["pid"]) as stalls:
                seen = uvloop.run(overload(ready["address"], seconds=seconds))
            every += seen.late_ms
            count = len(seen.late_ms)
            late = [span for span, late_ms in zip(seen.spans, seen.late_ms, strict=True) if late_ms > LATE_MS]
            rows += [
                Row(f"deadlines.{name}_{end}_share", number / count, "share", f"of {count}")
                for end, number in sorted(seen.ends.items())
            ]
            rows += [
                Row(f"deadlines.{name}_latest_ms", max(seen.late_ms), "ms"),
                Row(f"deadlines.{name}_machine_stalls", len(stalls.spans), "", str(stalls)),
                Row(f"deadlines.{name}_beyond_5ms", len(late), "", "later than that"),
                Row(f"deadlines.{name}_beyond_5ms_without_stall", stalls.beyond(late), "", "from the deadline on"),
            ]
    note = f"{len(every)} answers, {MODEL_MS:g} ms model, {OVERLOAD:g}x overload"
    return [*rows, Row("deadlines.late_p999_ms", quantile(every, 0.999), "ms", note)]


async def overload(address: str, *, seconds: float) -> Seen:
    """Poisson arrivals at twice the measured capacity."""
    chance = random.Random(1)
    seen = Seen()
    async with channel_to(address) as channel:
        work = await find_work(channel, MODEL_MS)
        capacity, _ = await measure_capacity(channel, work, seconds=3.0)
        rate = OVERLOAD * capacity
        began = at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while at < began + seconds:
                at += chance.expovariate(rate)
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                group.create_task(ask(channel, work, chance.choice(TIMEOUT_S), seen))
    return seen


async def ask(channel: Channel, work: int, timeout_s: float, seen: Seen) -> None:
    """One request and when its answer came."""
    message = make_request(work, timeout_s=timeout_s)
    deadline = time.monotonic() + timeout_s
    end = "answered"
    try:
        await channel.unary(MODEL_INFER, (message,))
    except MeshError as error:
        if error.code not in (Code.DEADLINE, Code.OVERLOADED):
            raise
        end = "refused" if time.monotonic() < deadline else "expired"
    came = time.monotonic()
    seen.late_ms.append((came - deadline) * 1e3)
    seen.spans.append((deadline, came))
    seen.ends[end] = seen.ends.get(end, 0) + 1
