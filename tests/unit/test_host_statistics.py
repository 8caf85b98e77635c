"""Statistics and metrics: quantiles within a sixteenth, counters that add up, errors that mean the model's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from nearcast.errors import Code
from nearcast.serving.metrics import HostCollector
from nearcast.serving.statistics import Statistics, bucket_of, bucket_start_us, quantile_us


@given(st.integers(0, 2**33))
def test_a_duration_lies_in_its_bucket(duration_us: int) -> None:
    index = bucket_of(duration_us)
    assert bucket_start_us(index) <= duration_us
    assert duration_us < bucket_start_us(index + 1) or index == 255
    assert bucket_start_us(index + 1) - bucket_start_us(index) <= max(1, duration_us / 8)


@given(st.lists(st.integers(1, 10_000_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
def test_quantiles_are_near_the_true_ones(durations: list[int], q: float) -> None:
    counts = [0] * 256
    for duration in durations:
        counts[bucket_of(duration)] += 1
    exact = float(np.quantile(durations, q, method="inverted_cdf"))
    assert abs(quantile_us(counts, q) - exact) <= max(1.0, exact / 8)


def test_no_samples_are_zero() -> None:
    assert quantile_us([0] * 256, 0.99) == 0.0


def test_only_the_models_own_failures_are_errors() -> None:
    statistics = Statistics()
    statistics.answer(10, 90)
    for code in (Code.INTERNAL, Code.INVALID_REQUEST, Code.OVERLOADED, Code.DEADLINE):
        statistics.fail(code)
    assert (statistics.requests, statistics.errors, statistics.answered) == (5, 1, 1)


def test_recent_quantiles_forget() -> None:
    statistics = Statistics()
    for _ in range(50):
        statistics.answer(0, 100)
    assert statistics.recent_us(20.0, (0.5,))[0] < 120
    for now in (40.0, 60.0, 80.0):
        for _ in range(50):
            statistics.answer(0, 5000)
        recent = statistics.recent_us(now, (0.05,))
    assert recent[0] > 4000
    assert Statistics().recent_us(0.0, (0.5,)) == []


def test_metrics_are_what_dashboards_expect() -> None:
    statistics = Statistics()
    statistics.answer(20, 30)
    statistics.answer(0, 5000)
    statistics.fail(Code.INTERNAL)
    statistics.release("idle", 3)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(HostCollector({("digits", 2): statistics}, lambda: {("digits", 2): 7}))
    text = generate_latest(registry).decode()
    for line in (
        'nearcast_requests_total{code="OK",model="digits",version="2"} 2.0',
        'nearcast_requests_total{code="INTERNAL",model="digits",version="2"} 1.0',
        'nearcast_batches_total{model="digits",reason="idle",version="2"} 1.0',
        'nearcast_in_flight{model="digits",version="2"} 7.0',
        'nearcast_request_duration_seconds_bucket{le="6.4e-05",model="digits",version="2"} 1.0',
        'nearcast_request_duration_seconds_bucket{le="+Inf",model="digits",version="2"} 2.0',
        'nv_inference_request_success{model="digits",version="2"} 2.0',
        'nv_inference_compute_infer_duration_us{model="digits",version="2"} 5030.0',
    ):
        assert line in text, text
