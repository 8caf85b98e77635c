"""The replica machine by example: the table is complete, and each path through it does what it should, in order."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model_sync.replica.events import (
    Booted,
    CheckFailed,
    Done,
    Failed,
    Intended,
    Loaded,
    Polled,
    ReportFailed,
    Sampled,
    Ticked,
)
from model_sync.replica.follow import follow_channel
from model_sync.replica.instructions import Cancel, Discard, Refresh, Remember, Run, Watch, WritePointer
from model_sync.replica.machine import Replica
from model_sync.replica.probation import Probation
from model_sync.replica.state import Failure, Goal, Memory, ReplicaLimits, State, Want
from model_sync.replica.transitions import EXPIRIES, FAILURES, NEXT, TABLE, Action
from model_sync.replica.wave import in_wave, seed
from nearcast.store.pointer import Pointer

STEPS = (State.PLAN, State.FETCH, State.PATCH, State.VERIFY, State.STAGE, State.GATE)


def goal(release: int, **fields: Any) -> Goal:
    return Goal(release=release, sha256=f"{release:x}" * 64, **fields)


def want(intent: int, stable: Goal | int, candidate: Goal | int | None = None, **fields: Any) -> Want:
    stable = goal(stable) if isinstance(stable, int) else stable
    candidate = goal(candidate) if isinstance(candidate, int) else candidate
    return Want(intent=intent, stable=stable, candidate=candidate, **fields)


class Driver:
    """Drives a machine and answers its jobs."""

    def __init__(
        self,
        memory: Memory | None = None,
        pointer: Pointer | None = None,
        installed: Any = None,
        *,
        limits: ReplicaLimits | None = None,
    ) -> None:
        self.now = 0.0
        self.machine = Replica("edge-1", memory or Memory(model="digits"), pointer, installed or {}, limits=limits)
        self.out: list[Any] = self.machine.handle(0.0, Booted())

    def send(self, event: Any) -> list[Any]:
        self.out = self.machine.handle(self.now, event)
        return self.out

    def intend(self, wanted: Want) -> list[Any]:
        self.send(Polled())
        return self.send(Intended(wanted))

    @property
    def job(self) -> int:
        return next(one.job for one in reversed(self.out) if isinstance(one, Run | Refresh | Watch) and one.job)

    def run_to(self, state: State) -> None:
        while self.machine.state is not state:
            self.send(Loaded(self.job) if self.machine.state is State.ACTIVATE else Done(self.job))

    def conclude(self) -> list[Any]:
        self.now = self.machine.deadline
        return self.send(Ticked())

    def install(self, wanted: Want) -> None:
        self.intend(wanted)
        self.run_to(State.PROBATION)
        self.conclude()


def kinds(out: list[Any]) -> list[type]:
    return [type(one) for one in out]


def test_every_state_is_in_the_table_or_passed_through() -> None:
    assert set(TABLE) == set(State) - {State.COMMIT, State.QUARANTINE}


def test_every_working_state_ends_by_its_deadline() -> None:
    for state, row in TABLE.items():
        assert (Ticked in row) == (state is not State.IDLE)
        if row.get(Ticked) is Action.EXPIRE:
            assert state in EXPIRIES


def test_every_failure_has_an_answer() -> None:
    for state, row in TABLE.items():
        if row.get(Failed) is Action.FAIL:
            for failure in Failure:
                assert (state, failure) in FAILURES


def test_every_working_state_hears_a_newer_intent() -> None:
    assert all(Intended in row for row in TABLE.values())


def test_no_state_hears_a_failed_report() -> None:
    assert not any(ReportFailed in row for row in TABLE.values())


def test_the_pipeline_in_order() -> None:
    driver = Driver()
    driver.intend(want(1, 1))
    seen = [driver.machine.state]
    while driver.machine.state in STEPS:
        driver.send(Done(driver.job))
        seen.append(driver.machine.state)
    assert seen == [*STEPS, State.ACTIVATE]
    assert [NEXT[state] for state in STEPS] == seen[1:]
    assert kinds(driver.out) == [Remember, WritePointer, Refresh], "durable before visible, visible before told"
    driver.send(Loaded(driver.job))
    assert kinds(driver.out) == [Remember, Watch]
    driver.conclude()
    assert driver.machine.state is State.IDLE
    assert math.isinf(driver.machine.deadline)
    assert driver.machine.pointer == Pointer(stable=1, intent=1)
    assert driver.machine.memory.committed == 1


def test_a_share_a_stop_and_a_promotion_need_no_job() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.install(want(2, 1, 2, share=0.1, salt="s"))
    out = driver.intend(want(3, 1, 2, share=0.6, salt="s"))
    assert kinds(out) == [WritePointer, Refresh]
    out = driver.intend(want(4, 1))
    assert kinds(out) == [WritePointer, Refresh]
    assert driver.machine.pointer == Pointer(stable=1, intent=4)
    driver.intend(want(5, 1, 2, share=0.1, salt="t"))
    assert driver.machine.state is State.ACTIVATE, "it is still here and gated"
    driver.run_to(State.PROBATION)
    driver.conclude()
    out = driver.intend(want(6, 2))
    assert kinds(out) == [Remember, WritePointer, Refresh]
    assert driver.machine.pointer == Pointer(stable=2, last_good=1, intent=6)


def test_a_newer_intent_cancels_a_download() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.intend(want(2, 2))
    driver.send(Done(driver.job))
    fetch = driver.job
    assert driver.machine.state is State.FETCH
    out = driver.intend(want(3, 1))
    assert Cancel(fetch) in out
    assert driver.machine.state is State.IDLE
    assert driver.send(Done(fetch)) == [], "the answer of a cancelled job counts no more"


def test_the_same_intent_again_leaves_a_download_alone() -> None:
    driver = Driver()
    driver.intend(want(1, 1))
    driver.send(Done(driver.job))
    assert driver.send(Intended(want(1, 1))) == []
    assert driver.machine.state is State.FETCH


def test_an_older_document_is_refused() -> None:
    driver = Driver()
    driver.install(want(5, 2))
    driver.intend(want(4, 3))
    assert driver.machine.state is State.IDLE
    assert "Refused the channel document of intent 4" in driver.machine.error


@pytest.mark.parametrize("state", STEPS)
def test_a_step_that_takes_too_long_ends(state: State) -> None:
    driver = Driver()
    driver.intend(want(1, 1))
    driver.run_to(state)
    driver.now = driver.machine.deadline - 0.01
    assert driver.send(Ticked()) == []
    out = driver.conclude()
    if state is State.GATE:
        assert driver.machine.state is State.IDLE
        assert driver.machine.memory.bans[0].release == 1
    else:
        assert driver.machine.state is (State.PLAN if state is State.PATCH else State.HOLD)
        assert isinstance(out[0], Cancel)
    assert f"{state} took longer" in driver.machine.error


def test_retries_back_off_with_full_jitter_below_the_cap() -> None:
    limits = ReplicaLimits(backoff_base_s=1.0, backoff_cap_s=60.0)
    machine = Replica("edge-1", Memory(model="digits"), None, {}, limits=limits, draw=lambda: 0.999)
    machine.handle(0.0, Booted())
    machine.handle(0.0, Polled())
    out, now, waits = machine.handle(0.0, Intended(want(1, 1))), 0.0, []
    for _ in range(10):
        job = next(one.job for one in out if isinstance(one, Run))
        machine.handle(now, Failed(job, Failure.TRANSIENT, "offline."))
        assert machine.state is State.HOLD
        waits.append(machine.deadline - now)
        now = machine.deadline
        out = machine.handle(now, Ticked())
    assert waits[:3] == pytest.approx([2.0, 4.0, 8.0], rel=0.01)
    assert max(waits) <= 60.0


def test_a_full_disk_gives_its_partial_files_back() -> None:
    driver = Driver()
    driver.intend(want(1, 1))
    driver.send(Done(driver.job))
    out = driver.send(Failed(driver.job, Failure.FULL, "The disk is full."))
    assert Discard(goal(1), installed=False) in out
    assert driver.machine.state is State.HOLD
    assert driver.machine.memory.bans == ()


def test_probation_rolls_back_and_quarantines() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.intend(want(2, 2))
    driver.run_to(State.PROBATION)
    watch = driver.job
    driver.send(Sampled(watch, requests=20, errors=4))
    assert driver.machine.state is State.PROBATION
    out = driver.send(Sampled(watch, requests=25, errors=5))
    assert kinds(out) == [Cancel, Remember, WritePointer, Refresh]
    assert driver.machine.pointer == Pointer(stable=1, intent=2)
    driver.send(Loaded(driver.job))
    assert driver.machine.state is State.IDLE
    assert [ban.release for ban in driver.machine.memory.bans] == [2]
    assert driver.machine.memory.committed == 1
    driver.intend(want(2, 2))
    assert driver.machine.state is State.IDLE, "not by the same document"
    driver.intend(want(3, 1, 2, share=0.1, salt="new"))
    assert driver.machine.state is State.PLAN, "a new rollout asks again"


@pytest.mark.parametrize(
    ("requests", "errors", "fails"),
    [(4, 4, False), (5, 5, True), (25, 5, True), (26, 5, False), (1000, 199, False), (1000, 200, True)],
)
def test_the_judgement(requests: int, errors: int, fails: bool) -> None:
    probation = Probation(began=Loaded(1, requests=100, errors=7))
    assert bool(probation.judge(Sampled(2, 100 + requests, 7 + errors), ReplicaLimits())) is fails


def test_the_judgement_after_the_host_restarted() -> None:
    probation = Probation(began=Loaded(1, requests=100, errors=7))
    assert not probation.judge(Sampled(2, 4, 4), ReplicaLimits())
    assert probation.judge(Sampled(2, 5, 5), ReplicaLimits())


def test_boots_in_probation_are_counted() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.intend(want(2, 2))
    driver.run_to(State.PROBATION)
    memory, pointer, installed = driver.machine.memory, driver.machine.pointer, driver.machine.installed
    for boot in (1, 2):
        driver = Driver(memory, pointer, installed)
        assert driver.machine.state is State.ACTIVATE, f"boot {boot}"
        memory, pointer = driver.machine.memory, driver.machine.pointer
    driver = Driver(memory, pointer, installed)
    assert driver.machine.state is State.ROLLBACK
    assert driver.machine.pointer == Pointer(stable=1, intent=2)


def test_an_orderly_end_in_probation_is_not_counted() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    assert driver.machine.leave() == [], "nothing is on trial"
    driver.intend(want(2, 2))
    driver.run_to(State.PROBATION)
    for boot in range(5):
        (remembered,) = driver.machine.leave()
        assert isinstance(remembered, Remember)
        driver = Driver(remembered.memory, driver.machine.pointer, driver.machine.installed)
        assert driver.machine.state is State.ACTIVATE, f"boot {boot}"
    for _ in range(2):
        driver = Driver(driver.machine.memory, driver.machine.pointer, driver.machine.installed)
        assert driver.machine.state is State.ACTIVATE
    driver = Driver(driver.machine.memory, driver.machine.pointer, driver.machine.installed)
    assert driver.machine.state is State.ROLLBACK, "the third end without a word counts, whatever came before"


def test_a_signed_rollback_is_not_on_trial() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.install(want(2, goal(2, rollback_ok=(1,))))
    out = driver.intend(want(3, 1, rollback=True))
    assert kinds(out) == [Remember, WritePointer, Refresh]
    driver.send(Loaded(driver.job))
    assert driver.machine.state is State.IDLE
    assert driver.machine.memory.committed == 1


def test_offline_changes_nothing_but_the_text() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    before = driver.machine.memory, driver.machine.pointer
    driver.send(Polled())
    assert driver.send(CheckFailed("offline.")) == []
    assert (driver.machine.memory, driver.machine.pointer) == before
    assert driver.machine.error == "offline."
    assert driver.machine.state is State.IDLE


def test_a_lost_journal_starts_from_the_pointer() -> None:
    driver = Driver(Memory(model="digits"), Pointer(stable=3, last_good=2, intent=9), {3: "3" * 64, 2: "2" * 64})
    assert driver.out == []
    driver.intend(want(10, 2))
    assert "older than release 3" in driver.machine.error
    driver.intend(want(11, 2, rollback=True))
    assert driver.machine.pointer.stable == 2, "last_good is here and needs no download"


def test_seeds_are_uniform_and_waves_nest() -> None:
    nodes = [f"edge-{index}" for index in range(2000)]
    small = {node for node in nodes if in_wave(node, "s", 0.1)}
    large = {node for node in nodes if in_wave(node, "s", 0.5)}
    other = {node for node in nodes if in_wave(node, "t", 0.1)}
    assert small < large
    assert 140 < len(small) < 260
    assert 900 < len(large) < 1100
    assert len(small & other) < 50, "another rollout picks other nodes"
    assert all(in_wave(node, "s", 1.0) and not in_wave(node, "s", 0.0) for node in nodes)
    assert seed("edge-1", "s") == seed("edge-1", "s")


def test_following_keeps_to_the_same_rules() -> None:
    memory, pointer, error = follow_channel(Memory(model="digits"), Pointer(), want(1, 1, 2, wave=0.0, share=0.5))
    assert (pointer, error) == (Pointer(stable=1, candidate=2, share=0.5, intent=1), "")
    memory, pointer, error = follow_channel(memory, pointer, want(2, goal(2, rollback_ok=(1,))))
    assert pointer == Pointer(stable=2, last_good=1, intent=2)
    kept = pointer
    memory, pointer, error = follow_channel(memory, pointer, want(3, 1))
    assert pointer.stable == kept.stable
    assert "older than release 2" in error
    memory, pointer, error = follow_channel(memory, pointer, want(4, 1, rollback=True))
    assert (pointer.stable, error) == (1, "")
    assert follow_channel(memory, pointer, want(1, 3))[1] == pointer
