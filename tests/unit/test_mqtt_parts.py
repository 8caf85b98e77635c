from __future__ import annotations

import asyncio
from random import Random

import pytest

from edge_node.mqtt.ack_window import AckWindow
from edge_node.mqtt.idempotency import BOOTS_MAX, Known, Position, Step, decide, follow
from edge_node.mqtt.lanes import Lanes, Recent
from nearcast.backoff import ReconnectLimits, Reconnects, full_jitter_s
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import parse_url
from nearcast.transport.mqtt.reconnect import stay_connected


@pytest.mark.parametrize(
    ("known", "has_room", "verdict"),
    [
        (None, True, "accept"),
        (None, False, "full"),
        (Known(b"d", "pending"), True, "pending"),
        (Known(b"d", "pending"), False, "pending"),
        (Known(b"d", "done"), False, "replay"),
        (Known(b"x", "pending"), True, "conflict"),
        (Known(b"x", "done"), True, "conflict"),
    ],
)
def test_the_decision_table(known, has_room, verdict):
    assert decide(known, b"d", has_room=has_room) == verdict


def test_a_stream_knows_what_came_in_its_last_boots():
    known = ()
    for boot in ("a", "b", "c"):
        step = follow(known, boot, 5)
        assert step is not None
        known = step.positions
    assert follow(known, "a", 5) is None
    assert follow(known, "b", 4) is None
    assert follow(known, "b", 8) == Step((Position("c", 5), Position("b", 8), Position("a", 5)), lost=2)
    assert follow(known, "", None) == Step(known)
    for number in range(BOOTS_MAX):
        step = follow(known, f"new-{number}", 1)
        assert step is not None
        known = step.positions
    assert len(known) == BOOTS_MAX
    assert follow(known, "a", 5) is not None, "who reboots that often is forgotten"


def test_acknowledgements_keep_the_order_of_arrival():
    window = AckWindow()
    tickets = [window.open(mid, now=float(mid), size_bytes=10) for mid in range(4)]
    assert window.complete(tickets[2]) == []
    assert window.complete(tickets[1]) == []
    assert window.complete(tickets[0]) == [0, 1, 2]
    assert window.complete(tickets[0]) == []
    assert (len(window), window.size_bytes) == (1, 10)
    assert window.complete(tickets[3]) == [3]


def test_who_waits_too_long_does_not_hold_up_the_others():
    window = AckWindow()
    tickets = [window.open(mid, now=float(mid), size_bytes=0) for mid in range(4)]
    assert window.complete(tickets[1]) == []
    assert window.complete(tickets[3]) == []
    assert window.complete_older(2.0) == ([0, 1], 1)
    assert window.complete(tickets[0]) == []
    assert window.complete(tickets[2]) == [2, 3]


async def test_lanes_let_in_one_by_one_in_order_and_leave_nothing():
    lanes, seen = Lanes(), []

    async def visit(number):
        async with lanes.enter("a"):
            seen.append(number)
            await asyncio.sleep(0)
            seen.append(number)

    await asyncio.gather(*(visit(number) for number in range(5)))
    assert seen == [number for number in range(5) for _ in range(2)]
    assert len(lanes) == 0


def test_recent_forgets_the_least_recent():
    recent = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent.add(key)
    assert ("a" in recent, "b" in recent, "c" in recent) == (True, False, True)


def test_waits_grow_to_their_bound_and_are_spread():
    waits = [
        [full_jitter_s(attempt, Random(seed), base_s=0.2, max_s=10.0) for seed in range(200)] for attempt in (0, 3, 99)
    ]
    for bound, found in zip((0.2, 1.6, 10.0), waits, strict=True):
        assert all(0 < wait <= bound for wait in found)
        assert max(found) > 0.9 * bound
        assert min(found) < 0.1 * bound


def test_only_a_connection_that_lasted_makes_the_next_wait_short_again():
    reconnects = Reconnects(ReconnectLimits(base_s=1.0, max_s=8.0, stable_s=5.0), Random(1))
    attempts = []
    for lived_s in (0.0, 4.9, 0.0, 5.1, 0.0):
        assert 0.0 < reconnects.wait_s(lived_s) <= min(8.0, 2.0**reconnects.attempt)
        attempts.append(reconnects.attempt)
    assert attempts == [1, 2, 3, 0, 1]


async def test_who_stays_connected_tries_again_whatever_happens():
    failures = iter([MeshError(Code.UNAVAILABLE, "gone"), TimeoutError(), ValueError("odd"), None])
    troubles, done = [], asyncio.Event()

    async def live(up):
        up()
        failure = next(failures)
        if failure is None:
            done.set()
            await asyncio.Event().wait()
        raise failure

    quick = ReconnectLimits(base_s=1e-6, max_s=1e-6)
    staying = asyncio.create_task(stay_connected(live, name="b", limits=quick, on_trouble=troubles.append))
    await done.wait()
    staying.cancel()
    await asyncio.gather(staying, return_exceptions=True)
    assert staying.cancelled()
    assert troubles[0] == "gone"
    assert len(troubles) == 3


def test_broker_urls():
    assert parse_url("mqtt://127.0.0.1:2000/local/cam") == ("127.0.0.1", 2000, "local/cam")
    assert parse_url("mqtt://[::1]") == ("::1", 1883, "")
    for bad in ("http://x", "mqtt://", "mqtt://h:99999", "h:1883"):
        with pytest.raises(MeshError):
            parse_url(bad)
