"""An edge node dies by SIGKILL while it works on requests: hardly anybody notices, and it comes back."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.e2e.fleet import Traffic
from tests.e2e.ways import DIGIT, attempt, load_node, open_way

VICTIM = "edge-2"
RATE_PER_S = 200.0
BEFORE_S, AFTER_S = 1.0, 2.0
IN_FLIGHT_MIN = 8
FAILED_MAX = 3
BACK_S = 60.0


@pytest.mark.parametrize("by", ["client", "router"])
async def test_an_edge_node_is_killed_under_load_and_comes_back(fleet, figure, by):
    async with open_way(by, fleet) as way, Traffic(by, way.ask, rate_per_s=RATE_PER_S) as traffic:
        await asyncio.sleep(BEFORE_S)
        burst, in_flight = await load_node(way, VICTIM, at_least=IN_FLIGHT_MIN)
        killed_at = time.monotonic()
        fleet.mesh.kill(VICTIM, signal.SIGKILL)
        lost = [error for error in await asyncio.gather(*burst) if error]
        await asyncio.sleep(max(0.0, killed_at + AFTER_S - time.monotonic()))
        away_until = time.monotonic()
        await asyncio.to_thread(fleet.restart, VICTIM)
        back_at = time.monotonic()
        again = await work_until_served(fleet, way)
        lost += [error for error in again if error]
    errors = [*(f"{s.sent_at - killed_at:+.3f} s: {s.error}" for s in traffic.failures), *lost]
    total = len(traffic.samples) + len(burst) + len(again)
    spread = dict(traffic.served_by(killed_at)) if by == "client" else ""
    figure(
        f"{in_flight} in flight on {VICTIM} at the kill; {len(errors)} of {total} requests failed; "
        f"back after {back_at - away_until:.1f} s {spread}"
    )
    assert in_flight >= IN_FLIGHT_MIN
    assert len(errors) <= FAILED_MAX, errors
    assert total >= RATE_PER_S * (BEFORE_S + AFTER_S) * 0.9, "the traffic did not keep its rate"
    assert {sample.answer.says for sample in traffic.samples if sample.answer} == {str(DIGIT)}
    if by == "client":
        away = [s for s in traffic.samples if s.answer and killed_at + 0.1 <= s.sent_at <= away_until]
        assert away
        assert VICTIM not in {s.answer.served_by for s in away}


async def work_until_served(fleet, way):
    """More work than one node likes, until the restarted one has answered some of it; the errors, "" for none."""
    errors: list[str] = []
    until = time.monotonic() + BACK_S
    while not await asyncio.to_thread(fleet.counter, VICTIM, "nearcast_requests_total", model="magika", code="OK"):
        assert time.monotonic() < until, f"{VICTIM} is back and gets no work"
        errors += await asyncio.gather(*(attempt(way) for _ in range(16)))
    return errors
