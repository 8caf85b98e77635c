"""Statistics and metrics: quantiles within a sixteenth, counters that add up, errors that mean the model's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from nearcast.errors import Code
from nearcast.serving.metrics import HostCollector
from nearcast.serving.nv_metrics import NvCollector
from nearcast.serving.statistics import RUN_SIZES_MAX, Statistics, bucket_of, bucket_start_us, quantile_us


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
    statistics.refuse("late")
    registry = CollectorRegistry(auto_describe=True)
    registry.register(HostCollector({("digits", 2): statistics}, lambda: {("digits", 2): 7}))
    text = generate_latest(registry).decode()
    for line in (
        'nearcast_requests_total{code="OK",model="digits",version="2"} 2.0',
        'nearcast_requests_total{code="INTERNAL",model="digits",version="2"} 1.0',
        'nearcast_batches_total{model="digits",reason="idle",version="2"} 1.0',
        'nearcast_queue_refusals_total{model="digits",reason="late",version="2"} 1.0',
        'nearcast_in_flight{model="digits",version="2"} 7.0',
        'nearcast_request_duration_seconds_bucket{le="6.4e-05",model="digits",version="2"} 1.0',
        'nearcast_request_duration_seconds_bucket{le="+Inf",model="digits",version="2"} 2.0',
    ):
        assert line in text, text


def test_the_names_of_triton_dashboards_are_all_there() -> None:
    statistics = Statistics()
    statistics.answer(20, 30)
    statistics.answer(0, 5000)
    statistics.read_s += 8e-6
    statistics.ran(4, 1.0, 1.00503, requests=2, before_s=1e-5, after_s=3e-6)
    statistics.hit(3)
    statistics.miss(2)
    for code in (Code.INTERNAL, Code.OVERLOADED, Code.DEADLINE, Code.CANCELLED, Code.INVALID_REQUEST):
        statistics.fail(code)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(NvCollector({("digits", 2): statistics}, lambda: {("digits", 2): 7}))
    generate_latest(registry)
    text = generate_latest(registry).decode()
    of = 'model="digits",version="2"'
    for line in (
        f"nv_inference_request_success{{{of}}} 2.0",
        'nv_inference_request_failure{model="digits",reason="REJECTED",version="2"} 2.0',
        'nv_inference_request_failure{model="digits",reason="CANCELED",version="2"} 1.0',
        'nv_inference_request_failure{model="digits",reason="BACKEND",version="2"} 1.0',
        'nv_inference_request_failure{model="digits",reason="OTHER",version="2"} 1.0',
        f"nv_inference_count{{{of}}} 4.0",
        f"nv_inference_exec_count{{{of}}} 1.0",
        f"nv_inference_pending_request_count{{{of}}} 7.0",
        f"nv_inference_request_duration_us{{{of}}} 5056.0",
        f"nv_inference_queue_duration_us{{{of}}} 12.0",
        f"nv_inference_compute_input_duration_us{{{of}}} 28.0",
        f"nv_inference_compute_infer_duration_us{{{of}}} 5010.0",
        f"nv_inference_compute_output_duration_us{{{of}}} 6.0",
        f"nv_cache_num_hits_per_model{{{of}}} 1.0",
        f"nv_cache_num_misses_per_model{{{of}}} 1.0",
        f"nv_cache_hit_duration_per_model{{{of}}} 3.0",
        f"nv_cache_miss_duration_per_model{{{of}}} 2.0",
        "nv_cpu_memory_total_bytes ",
        "nv_cpu_memory_used_bytes ",
    ):
        assert line in text, text


def test_runs_are_counted_by_their_rows_within_a_bound() -> None:
    statistics = Statistics()
    for rows in range(1, RUN_SIZES_MAX + 100):
        statistics.ran(rows, 0.0, 0.001)
    statistics.ran(3, 0.0, 0.002)
    counts = statistics.counts("digits", "2", wall_offset_s=0.0, memory_bytes=5)
    assert counts.runs == RUN_SIZES_MAX + 100
    assert len(counts.runs_by_rows) == RUN_SIZES_MAX
    assert counts.runs_by_rows[3] == (2, 0, 3_000_000, 0)
    assert counts.memory_bytes == 5
