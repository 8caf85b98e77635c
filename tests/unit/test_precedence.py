"""The loop goes before what is ordinary while it is quiet; threads that run models give way; nobody inherits either."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.serving import loop_rank
from nearcast.serving.loop_rank import (
    BUSY_SHARE,
    FIRST_WINDOW_S,
    LOADING_SHARE,
    ORDINARY_WINDOW_S,
    ORDINARY_WINDOW_S_MAX,
    QUIET_SHARE,
    LoopRank,
)
from nearcast.serving.precedence import NICENESS, LoopPrecedence, give_way_to_loop, yield_to_serving

on_linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"), reason="asks Linux"
)
REAL_TIME = getattr(os, "SCHED_RR", 2)


def policy() -> int:
    """Of the calling thread, and whether its children start as ordinary ones."""
    return os.sched_getscheduler(0)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def is_granted() -> bool:
    """Whether a thread of this process, which then ends, may be real-time."""

    def ask() -> bool:
        try:
            os.sched_setscheduler(0, REAL_TIME, os.sched_param(1))
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_only_a_quiet_loop_is_first(shares: list[float]) -> None:
    rank, now, used_s = LoopRank(0.0, 0.0), 0.0, 0.0
    for share in shares:
        was_first, window_s = rank.is_first, rank.window_s
        assert window_s == FIRST_WINDOW_S if was_first else ORDINARY_WINDOW_S <= window_s <= ORDINARY_WINDOW_S_MAX
        now, used_s = now + window_s, used_s + share * window_s
        changed = rank.look(now, used_s)
        assert changed == (rank.is_first is not was_first)
        assert rank.share == pytest.approx(share, abs=1e-6)
        if abs(share - BUSY_SHARE) > 1e-6 and abs(share - QUIET_SHARE) > 1e-6:
            assert rank.is_first == (share < (BUSY_SHARE if was_first else QUIET_SHARE))


def test_a_flood_that_looks_quiet_because_it_gets_little_is_first_less_and_less() -> None:
    rank, now, used_s = LoopRank(0.0, 0.0), 0.0, 0.0
    first_s, ordinary_s = 0.0, []
    for _ in range(40):
        share, window_s = (0.95, rank.window_s) if rank.is_first else (0.1, rank.window_s)
        if rank.is_first:
            first_s += window_s
        else:
            ordinary_s.append(window_s)
        now, used_s = now + window_s, used_s + share * window_s
        rank.look(now, used_s)
    assert ordinary_s == [min(ORDINARY_WINDOW_S_MAX, ORDINARY_WINDOW_S * 2**time) for time in range(20)]
    assert first_s <= 0.01 * now
    assert not rank.is_first
    for share in (0.1, 0.1, 0.9):
        now, used_s = now + rank.window_s, used_s + share * rank.window_s
        rank.look(now, used_s)
    assert rank.window_s == ORDINARY_WINDOW_S, "it was quiet for a while"


@given(st.lists(st.floats(0, 1), max_size=5), st.lists(st.floats(0, 1), max_size=5))
def test_while_a_version_loads_it_is_first_up_to_a_higher_share_and_then_as_before(
    before: list[float], meanwhile: list[float]
) -> None:
    rank, now, used_s, flooded_last = LoopRank(0.0, 0.0), 0.0, 0.0, False

    def look(share: float) -> None:
        nonlocal now, used_s, flooded_last
        flooded_last = rank.is_first and share > LOADING_SHARE
        now, used_s = now + rank.window_s, used_s + share * rank.window_s
        rank.look(now, used_s)

    for share in before:
        look(share)
    was_first, flooded, window_s = rank.is_first, flooded_last, rank.window_s
    rank.begin_load(now, used_s)
    assert rank.is_first is not flooded, "whoever has just used more than that waits for a while"
    for share in meanwhile:
        look(share)
        if abs(share - LOADING_SHARE) > 1e-6:
            assert rank.is_first == (share < LOADING_SHARE)
    kept = rank.is_first
    rank.end_load(now, used_s)
    assert rank.is_first <= kept
    if was_first and all(share < LOADING_SHARE - 1e-6 for share in meanwhile):
        assert rank.is_first
    if not was_first and not meanwhile:
        assert rank.is_first is False
        assert rank.window_s == window_s, "a load is no reason to look less often"


GAP_AND_LOAD = st.tuples(st.floats(0, 0.2) | st.floats(0, 2), st.floats(0, 0.2) | st.floats(0, 5))
LOADS = st.lists(GAP_AND_LOAD, min_size=1, max_size=60) | GAP_AND_LOAD.map(lambda each: 60 * [each])


def drive(
    gaps_and_loads: list[tuple[float, float]], share_first: Callable[[int], float], share_ordinary: float
) -> tuple[LoopRank, float, float]:
    """The rank, the time that has passed, and that in which the loop was first; looked at as often as it asks for."""
    rank, now, used_s, first_s, looks = LoopRank(0.0, 0.0), 0.0, 0.0, 0.0, 0
    for gap_and_load in gaps_and_loads:
        for lasting_s, change in zip(gap_and_load, (rank.begin_load, rank.end_load), strict=True):
            end = now + lasting_s
            while True:
                then = min(end, now + rank.window_s)
                if rank.is_first:
                    first_s += then - now
                used_s += (then - now) * (share_first(looks) if rank.is_first else share_ordinary)
                now, looks = then, looks + 1
                if now >= end:
                    break
                rank.look(now, used_s)
            change(now, used_s)
    return rank, now, first_s


@settings(max_examples=60, deadline=None)
@given(LOADS, st.lists(st.floats(LOADING_SHARE + 0.01, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_a_flooded_loop_is_first_a_sixth_of_the_time_however_loads_come(
    gaps_and_loads: list[tuple[float, float]], shares: list[float], ordinary: float
) -> None:
    _, now, first_s = drive(gaps_and_loads, lambda look: shares[look % len(shares)], ordinary)
    sixth = FIRST_WINDOW_S / (FIRST_WINDOW_S + ORDINARY_WINDOW_S)
    assert first_s <= FIRST_WINDOW_S + 1.01 * sixth * now + 1e-6


@settings(max_examples=40, deadline=None)
@given(LOADS, st.floats(0, 0.9 * QUIET_SHARE))
def test_a_quiet_loop_is_first_after_its_first_window_however_loads_come(
    gaps_and_loads: list[tuple[float, float]], share: float
) -> None:
    rank, now, first_s = drive(gaps_and_loads, lambda _: share, share)
    assert first_s >= now - ORDINARY_WINDOW_S - 1e-6
    if now > ORDINARY_WINDOW_S + 0.01:
        assert rank.is_first


@settings(max_examples=40, deadline=None)
@given(LOADS, st.floats(BUSY_SHARE + 0.01, LOADING_SHARE - 0.01))
def test_a_half_busy_loop_is_first_during_every_load_and_only_then(
    gaps_and_loads: list[tuple[float, float]], share: float
) -> None:
    rank, _, first_s = drive(gaps_and_loads, lambda _: share, share)
    assert first_s == pytest.approx(sum(load_s for _, load_s in gaps_and_loads), abs=1e-6)
    assert not rank.is_first


def test_a_look_at_no_time_changes_nothing() -> None:
    rank = LoopRank(5.0, 1.0)
    assert not rank.look(5.0, 2.0)
    assert not rank.is_first


@on_linux
def test_a_models_thread_is_nicer_than_the_loops() -> None:
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1, initializer=give_way_to_loop) as models:
        assert models.submit(niceness).result() == min(19, before.submit(niceness).result() + NICENESS)


@on_linux
def test_a_thread_that_loads_interrupts_nobody_and_keeps_its_share() -> None:
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1, initializer=yield_to_serving) as loader:
        assert loader.submit(policy).result() == os.SCHED_BATCH
        assert loader.submit(niceness).result() == before.submit(niceness).result()


@on_linux
def test_without_real_time_the_loop_stays_ordinary_and_its_threads_start_as_such() -> None:
    async def serve() -> None:
        precedence, before = LoopPrecedence(real_time=False), niceness()
        precedence.start()
        assert policy() == os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
        assert niceness() == before
        assert await asyncio.to_thread(policy) == os.SCHED_OTHER
        precedence.stop()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()


@on_linux
@pytest.mark.skipif(not is_granted(), reason="the system grants no real-time priority")
def test_the_loop_is_real_time_while_it_is_quiet_and_nobody_inherits_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_rank, "ORDINARY_WINDOW_S", 0.02)
    monkeypatch.setattr(loop_rank, "FIRST_WINDOW_S", 0.02)
    first, ordinary = REAL_TIME | os.SCHED_RESET_ON_FORK, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK

    async def until(wanted: int, meanwhile: Callable[[], None]) -> None:
        async with asyncio.timeout(10):
            while policy() != wanted:
                meanwhile()
                await asyncio.sleep(0.001)

    def work() -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass

    def shown() -> float:
        (family,) = precedence.collect()
        return float(family.samples[0].value)

    async def serve() -> None:
        assert shown() == 0.0  # imports a library, which must not be taken for a flood
        precedence.start()
        loads = Future[None](), Future[None]()
        for load in loads:
            precedence.lead(load)
        assert (policy(), shown()) == (first, 1.0)
        loads[0].set_result(None)
        await asyncio.sleep(0)
        assert (policy(), shown()) == (first, 1.0)
        loads[1].set_result(None)
        await asyncio.sleep(0)
        assert (policy(), shown()) == (ordinary, 0.0)
        await until(first, lambda: None)
        assert (policy(), shown()) == (first, 1.0)
        assert await asyncio.to_thread(policy) == os.SCHED_OTHER
        child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"], capture_output=True, check=True
        )
        assert int(child.stdout) == os.SCHED_OTHER
        await until(ordinary, work)
        assert shown() == 0.0
        await until(first, lambda: None)
        precedence.stop()
        assert (policy(), shown()) == (ordinary, 0.0)

    precedence = LoopPrecedence(real_time=True)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_ordinary", "_ask_for_short_slices", "_become_real_time"):
        monkeypatch.setattr(f"nearcast.serving.precedence.{name}", lambda: True)
    monkeypatch.setattr(loop_rank, "FIRST_WINDOW_S", 20.0)  # longer than any machine stops
    monkeypatch.setattr(loop_rank, "ORDINARY_WINDOW_S", 30.0)


@pytest.mark.usefixtures("granted")
async def test_loads_that_come_often_put_off_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), list[float]()
    call_later = loop.call_later

    def count(delay: float, *arguments: Any) -> asyncio.TimerHandle:
        timers.append(delay)
        return call_later(delay, *arguments)

    monkeypatch.setattr(loop, "call_later", count)
    own = LoopPrecedence(real_time=True)
    own.start()
    for _ in range(20):
        load = Future[None]()
        own.lead(load)
        load.set_result(None)
        await asyncio.sleep(0)
    own.stop()
    assert timers[0] == 30.0
    assert len(timers) == 2, "one look while it is the first, and none put off"
    assert timers[1] == pytest.approx(20.0, abs=5)


@pytest.mark.usefixtures("granted")
async def test_a_load_that_nobody_waits_for_any_more_is_one_until_its_thread_is_done() -> None:
    own, done = LoopPrecedence(real_time=True), threading.Event()
    own.start()
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(done.wait)
        own.lead(work)
        waiter = asyncio.wrap_future(work)
        await asyncio.sleep(0)
        while not work.running():  # the thread takes it at once
            await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.sleep(0)
        assert own._rank.is_first
        done.set()
    await asyncio.sleep(0)
    assert not own._rank.is_first
    own.stop()


@pytest.mark.usefixtures("granted")
async def test_a_load_whose_begin_fails_ends_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    own, load = LoopPrecedence(real_time=True), Future[None]()
    own.start()
    with monkeypatch.context() as patch:
        patch.setattr("nearcast.serving.precedence._become_real_time", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            own.lead(load)
    load.set_result(None)
    await asyncio.sleep(0)
    assert own._loads == 0
    own.stop()


@pytest.mark.skipif(platform.system() != "Linux", reason="asks Linux")
@pytest.mark.parametrize("reason", ["unknown", "refused"])
def test_a_thread_that_loads_interrupts_nobody_where_short_slices_cannot_be_asked_for(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "unknown":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    else:
        monkeypatch.setattr("nearcast.serving.precedence._SYSCALLS", {platform.machine(): -1})
    with ThreadPoolExecutor(1, initializer=yield_to_serving) as loader:
        assert loader.submit(policy).result() == os.SCHED_BATCH


THREADS_OF_A_REAL_TIME_LOOP = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
from nearcast.serving.precedence import give_way_to_loop, yield_to_serving

os.nice(5)
os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
for prepare in (lambda: None, give_way_to_loop, yield_to_serving):
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        print(thread.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result())
"""


@on_linux
@pytest.mark.skipif(not is_granted(), reason="the system grants no real-time priority")
def test_the_niceness_of_an_operator_reaches_the_threads_of_a_real_time_loop() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    told = subprocess.run([sys.executable, "-c", THREADS_OF_A_REAL_TIME_LOOP], capture_output=True, check=True)
    assert [int(line) for line in told.stdout.split()] == [0, min(19, own + 5 + NICENESS), min(19, own + 5)]


@on_linux
def test_what_an_operator_has_chosen_stays() -> None:
    async def serve() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        precedence = LoopPrecedence(real_time=True)
        precedence.start()
        precedence.stop()
        assert policy() == os.SCHED_BATCH

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()
