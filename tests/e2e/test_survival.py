"""What dies beside the requests: sync process, agent, broker. And what ends politely: a node on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time

import numpy as np

from nearcast.wire.tensors import to_raw
from tests.e2e.fleet import Traffic, is_html, nearcast, page
from tests.e2e.ways import load_node, open_way
from tests.integration.mqtt_parts import Device, user_of

RATE_PER_S = 100.0
DRAIN_S_MAX = 5.0
REPEAT_S = 1.0


async def test_serving_goes_on_without_the_sync_process(fleet):
    async with (
        open_way("client", fleet) as way,
        Traffic("client", way.ask, rate_per_s=RATE_PER_S) as traffic,
        Traffic("to the cloud", way.ask_far, rate_per_s=RATE_PER_S / 2) as far,
    ):
        await asyncio.sleep(0.3)
        fleet.mesh.kill("sync", signal.SIGKILL)
        await asyncio.to_thread(fleet.until_ended, "sync", 5.0)
        lost = await asyncio.to_thread(nearcast, "nodes", "list", home=fleet.operator)
        assert lost.returncode == 69
        assert "cannot be reached" in lost.stderr
        await asyncio.sleep(1.0)
        await asyncio.to_thread(fleet.restart, "sync")
        await asyncio.sleep(2.0)  # a controller that has just started knows nobody; the nodes know each other still
    assert [s.error for s in traffic.failures] == []
    assert [s.error for s in far.failures] == []
    assert set(far.served_by()) == {"cloud-1"}
    assert len(traffic.samples) >= RATE_PER_S
    # The nodes find it again by themselves, and hear of the next change.
    bundle, release = await asyncio.to_thread(fleet.make_release)
    await asyncio.to_thread(fleet.push, bundle, channel="stable", share=0.5)
    await asyncio.to_thread(fleet.until_candidate, release)
    await asyncio.to_thread(fleet.roll_back)
    await asyncio.to_thread(fleet.until_candidate, None)


async def test_a_killed_agent_is_started_again(fleet):
    before = fleet.agent("edge-1").pid
    async with open_way("client", fleet) as way, Traffic("client", way.ask, rate_per_s=RATE_PER_S) as traffic:
        os.kill(before, signal.SIGKILL)
        await asyncio.to_thread(fleet.until, lambda: has_checked(fleet.agent("edge-1"), before), "a new agent's check")
    assert [s.error for s in traffic.failures] == []
    models = fleet.agent("edge-1").models
    assert {name: model.stable for name, model in models.items()} == {"digits": 1, "magika": 1, "wake_word": 1}
    os.kill(fleet.agent("edge-1").pid, 0)


def test_a_request_that_was_accepted_outlives_the_broker(fleet, figure):
    answered = fleet.counter("edge-1", "nc_mqtt_requests_total", status="200")
    with Device(int(fleet.address("broker", "mqtt").rpartition(":")[2]), "survivor", session_expiry_s=60) as device:
        keys = {ask(device) for _ in range(60)}
        fleet.until(lambda: len(accepted(fleet, "pending")) >= 8, "eight accepted requests")
        fleet.mesh.kill("broker", signal.SIGKILL)
        in_inbox = accepted(fleet, "pending", "done")
        pending = accepted(fleet, "pending")
        fleet.until(lambda: not accepted(fleet, "pending"), "answers without a broker")
        fleet.restart("broker")
        replies = collect(device, keys)
    assert pending, "the broker was to die before everything was answered"
    assert in_inbox <= keys
    figure(f"{len(pending)} accepted requests unanswered when the broker died, {len(keys)} in all, all answered")
    for key, payloads in replies.items():
        assert len(set(payloads)) == 1, f"two different answers to {key!r}"
        assert is_html(np.frombuffer(payloads[0], "<f4"))
    assert fleet.counter("edge-1", "nc_mqtt_requests_total", status="200") - answered == len(keys), "each ran once"


async def test_a_node_that_is_told_to_end_finishes_what_it_has(fleet, figure):
    async with open_way("client", fleet) as way, Traffic("client", way.ask, rate_per_s=2 * RATE_PER_S) as traffic:
        await asyncio.sleep(0.5)
        work, in_flight = await load_node(way, "edge-2", at_least=1)
        began = time.monotonic()
        fleet.mesh.kill("edge-2", signal.SIGTERM)
        code = await asyncio.to_thread(fleet.until_ended, "edge-2", DRAIN_S_MAX)
        took = time.monotonic() - began
        lost = [error for error in await asyncio.gather(*work) if error]
        await asyncio.to_thread(fleet.restart, "edge-2")
    figure(f"{in_flight} in flight at SIGTERM, ended after {took:.2f} s, {len(traffic.failures)} failed")
    assert code == 0
    assert in_flight > 0
    assert lost == []
    assert [s.error for s in traffic.failures] == []


def has_checked(agent, before):
    """Whether this is another agent than that one, and it has looked at the repository."""
    return agent.pid != before and agent.succeeded_at > 0 and not agent.error


def ask(device, key=None):
    """Send magika a page; returns the correlation."""
    return device.ask(
        to_raw(page()), model="magika", correlation=key, ttl_ms="30000", name="bytes", dtype="INT32", shape="1,2048"
    )


def collect(device, keys):
    """Wait for all replies; what stays unanswered is sent again under its old correlation, as a device would do."""
    replies: dict[bytes, list[bytes]] = {key: [] for key in keys}
    until, repeat_at = time.monotonic() + 15.0, time.monotonic() + REPEAT_S
    while not all(replies.values()):
        assert time.monotonic() < until, f"{sum(not r for r in replies.values())} of {len(keys)} were never answered"
        if time.monotonic() >= repeat_at and device.client.is_connected():
            for key in [key for key, found in replies.items() if not found]:
                ask(device, key)
            repeat_at = time.monotonic() + REPEAT_S
        if device.replies.empty():
            time.sleep(0.01)
            continue
        reply = device.reply()
        if reply.properties.CorrelationData in replies:
            assert user_of(reply)["status"] == "200", user_of(reply)
            replies[reply.properties.CorrelationData].append(reply.payload)
    return replies


def accepted(fleet, *states):
    """Correlations of the survivor's requests in the inbox of edge-1."""
    path = fleet.mesh.data_dir / "edge-1" / "inbox.sqlite"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        marks = ",".join("?" * len(states))
        rows = connection.execute(
            f"SELECT correlation FROM inbox WHERE device = 'survivor' AND state IN ({marks})", states
        ).fetchall()
    finally:
        connection.close()
    return {row[0] for row in rows}
