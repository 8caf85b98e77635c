from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_sync.replica.pause import PAUSE_S_MIN, check_pause_s, hint_pause_s
from simulations.herd import HerdSpec, simulate_herd
from simulations.network import Network, fair_rates, loss_rate_bytes_per_s
from simulations.scenarios.sync_fanout import FULL, release, rollback
from simulations.sync_fleet import FleetSpec
from simulations.sync_node import Payload
from simulations.world import World

FLOWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)
CAPACITIES = st.lists(st.floats(1.0, 100.0), min_size=5, max_size=5)


@settings(max_examples=100, deadline=None)
@given(FLOWS, CAPACITIES, CAPACITIES, st.sampled_from([0.5, 5.0, float("inf")]))
def test_rates_are_max_min_fair(flows, up, down, cap):
    sources, sinks = (np.array([flow[side] for flow in flows]) for side in (0, 1))
    rates = fair_rates(sources, sinks, np.array(up), np.array(down), cap)
    used_up = np.bincount(sources, rates, minlength=5)
    used_down = np.bincount(sinks, rates, minlength=5)
    assert np.all(used_up <= np.array(up) * (1 + 1e-6))
    assert np.all(used_down <= np.array(down) * (1 + 1e-6))
    for source, sink, rate in zip(sources, sinks, rates, strict=True):
        # A flow is bounded by the cap, or by a full link on which nobody gets more.
        top_up = used_up[source] >= up[source] * (1 - 1e-6) and rate >= rates[sources == source].max() * (1 - 1e-6)
        top_down = used_down[sink] >= down[sink] * (1 - 1e-6) and rate >= rates[sinks == sink].max() * (1 - 1e-6)
        assert rate >= cap * (1 - 1e-6) or top_up or top_down


def test_a_flow_takes_as_long_as_its_bytes_over_its_share():
    world = World(1)
    network = Network(world, rtt_s=0.05, loss=0.0)
    places = [network.add(up=1_000.0, down=1_000.0) for _ in range(3)]
    ends = {}
    for sink in places[1:]:
        network.send(places[0], sink, 500.0, lambda sink=sink: ends.setdefault(sink, world.now))
    network.cancel(network.send(places[1], places[2], 1e9, lambda: ends.setdefault("cancelled", 0)))
    world.run(until_s=5.0)
    assert ends == {places[1]: pytest.approx(1.0), places[2]: pytest.approx(1.0)}
    assert network.sent_bytes[places[0]] == pytest.approx(1_000.0)


def test_loss_bounds_one_connection():
    assert loss_rate_bytes_per_s(0.05, 0.01) * 8 / 1e6 == pytest.approx(2.84, abs=0.01)
    assert loss_rate_bytes_per_s(0.05, 0.0) == float("inf")


def test_peers_spare_the_origin_and_the_same_seed_runs_the_same():
    spec = FleetSpec(nodes=12)
    payload = Payload(sha256="a" * 64, size_bytes=12_000_000)
    first, again = (release(spec, payload, until_s=120.0) for _ in range(2))
    assert first == again
    assert first.origin_bytes < 3 * payload.size_bytes
    assert first.fetched_p99_s < 2.5 * payload.size_bytes / spec.down


def test_without_peers_the_origin_is_shared_out():
    spec = FleetSpec(nodes=20, knows_peers=False)
    result = release(spec, FULL, until_s=200.0)
    # 20 nodes share 200 Mbit/s, but one connection with 1 % loss reaches 2.84 Mbit/s only.
    assert result.fetched_p99_s == pytest.approx(FULL.size_bytes * 8 / 2.84e6, rel=0.02)


def test_a_rollback_reaches_those_who_wait_at_once_and_the_others_by_their_next_poll():
    assert rollback(FleetSpec(nodes=50), until_s=10.0) < 1.0
    assert 1.0 < rollback(FleetSpec(nodes=50, hint_waiters_max=10, poll_s=5.0), until_s=20.0) <= 11.0


def test_a_fleet_comes_back_spread_out():
    result = simulate_herd(HerdSpec(agents=2_000, waiters_max=200, observed_s=120.0))
    assert result.peak_per_s < 3 * result.mean_per_s


@given(st.integers(0, 10_000), st.floats(0, 0.999999), st.floats(0.1, 3_600), st.floats(0, 600))
def test_pauses_are_bounded_and_jitter_comes_after_the_cap(failures, drawn, poll_s, retry_s):
    pause = check_pause_s(lambda: drawn, poll_s=poll_s, failures=failures, retry_s=retry_s)
    assert max(PAUSE_S_MIN, retry_s) <= pause <= max(PAUSE_S_MIN, retry_s + 2 * poll_s)
    assert hint_pause_s(lambda: 0.0, failures=failures, cap_s=poll_s) == PAUSE_S_MIN
    long = check_pause_s(lambda: 0.999, poll_s=poll_s, failures=10_000)
    assert long == pytest.approx(max(PAUSE_S_MIN, min(2 * poll_s, 2.0**16) * 0.999))
