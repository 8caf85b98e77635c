"""Pure parts of downloading: the order of sources, the rate, the budget of a day."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_sync.agent.install.fetch import AllowanceError, runs
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.source import RETRY_AFTER_S_MAX, RetryLaterError, StatusError, asked_pause_s
from model_sync.replica.allowance import DAY_S, Spent, TokenBucket
from model_sync.replica.mirrors import PENALTY_BASE_S, PENALTY_CAP_S, MirrorHealth
from nearcast.clock import ManualClock


def test_a_failed_source_stands_behind_for_a_bounded_time() -> None:
    health = MirrorHealth(3)
    assert health.order(0.0) == (0, 1, 2)
    health.failed(0.0, 0)
    assert health.order(0.0) == (1, 2, 0)
    assert health.order(PENALTY_BASE_S) == (0, 1, 2)
    for _ in range(50):
        health.failed(100.0, 0)
    assert health.order(100.0 + PENALTY_CAP_S - 1.0) == (1, 2, 0)
    assert health.order(100.0 + PENALTY_CAP_S) == (0, 1, 2), "never for longer than the cap"


def test_among_failed_ones_the_first_to_recover_is_asked_first() -> None:
    health = MirrorHealth(2)
    health.failed(0.0, 0)
    health.failed(0.0, 0)
    health.failed(0.0, 1)
    assert health.order(0.0) == (1, 0)
    health.served(0)
    health.failed(20.0, 0)
    assert health.order(20.0 + PENALTY_BASE_S) == (0, 1), "a success forgets the failures before it"


def test_a_pause_is_obeyed_and_then_over() -> None:
    health = MirrorHealth(2)
    health.failed(0.0, 0, retry_s=30.0)
    assert health.order(10.0) == (1,)
    health.failed(0.0, 1, retry_s=60.0)
    assert health.order(10.0) == ()
    assert health.pause_s(10.0) == 20.0
    assert health.order(30.0) == (0,)


def test_the_pause_that_a_source_may_ask_for_is_bounded() -> None:
    error = StatusError("http://x", 503, retry_s=1e9)
    assert error.retry_s == RETRY_AFTER_S_MAX
    outer = ValueError("cannot be checked")
    outer.__cause__ = error
    assert asked_pause_s(outer) == RETRY_AFTER_S_MAX
    assert asked_pause_s(ValueError()) == 0.0
    assert RetryLaterError("no", retry_s=-5.0).retry_s == 0.0


@given(
    rate=st.floats(1e3, 1e8),
    sizes=st.lists(st.integers(1, 2**18), min_size=1, max_size=200),
    idle=st.lists(st.floats(0.0, 2.0), min_size=200, max_size=200),
)
def test_a_token_bucket_keeps_the_rate(rate: float, sizes: list[int], idle: list[float]) -> None:
    bucket, now, taken, burst = TokenBucket(rate, rate / 4), 0.0, 0, rate / 4
    for size, pause in zip(sizes, idle, strict=False):
        taken += size
        now += bucket.take(now, size)
        assert taken <= burst + rate * now * (1 + 1e-9) + 1.0, "who waits as told is never above the rate"
        now += pause


def test_no_rate_no_wait() -> None:
    assert TokenBucket(0.0, 0.0).take(0.0, 10**9) == 0.0


def test_a_day_ends_and_a_clock_that_goes_back_opens_none() -> None:
    spent = Spent().add(10 * DAY_S + 5.0, 700)
    assert spent.left_bytes(10 * DAY_S + 6.0, 1000) == 300
    assert spent.left_bytes(11 * DAY_S, 1000) == 1000
    assert spent.left_bytes(0.0, 1000) == 300
    assert spent.add(0.0, 400).left_bytes(0.0, 1000) == 0


def test_the_budget_outlives_the_agent(tmp_path: Path) -> None:
    clock, stop = ManualClock(), threading.Event()

    def meter() -> Meter:
        return Meter(tmp_path / "downloads.json", clock, bytes_per_s_max=0.0, bytes_per_day_max=1000)

    first = meter()
    first.require(1000, "digits release 1")
    first.take(900, stop)
    first.save()
    again = meter()
    with pytest.raises(AllowanceError, match="download_bytes_per_day_max"):
        again.require(200, "digits release 1")
    again.require(100, "digits release 1")
    with pytest.raises(AllowanceError):
        again.take(101, stop)
    (tmp_path / "downloads.json").write_text("{torn")
    meter().require(1000, "digits release 1")


def test_runs_of_chunks() -> None:
    assert runs({0, 1, 2, 5, 7, 8}) == (range(3), range(5, 6), range(7, 9))
    assert runs(set()) == ()
