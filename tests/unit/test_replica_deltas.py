"""The replica machine by example: failed deltas, pauses that sources ask for, turns, and every event in every state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model_sync.replica.events import (
    Booted,
    CheckFailed,
    Done,
    Event,
    Failed,
    Intended,
    Loaded,
    Polled,
    ReportFailed,
    Sampled,
    Ticked,
)
from model_sync.replica.instructions import Cancel, Discard, Refresh, Remember, Run, WritePointer
from model_sync.replica.machine import Replica
from model_sync.replica.state import Failure, Memory, ReplicaLimits, State
from model_sync.replica.transitions import TABLE
from model_sync.replica.wave import seed
from tests.unit.test_replica_transitions import Driver, goal, kinds, want


def in_patch(**limits: Any) -> Driver:
    driver = Driver(limits=ReplicaLimits(**limits))
    driver.install(want(1, 1))
    driver.intend(want(2, 2))
    driver.run_to(State.PATCH)
    return driver


def run_of(out: list[Any]) -> Run:
    return next(one for one in out if isinstance(one, Run))


def test_a_failed_delta_is_followed_by_the_full_file() -> None:
    driver = in_patch()
    out = driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    assert kinds(out) == [Cancel, Remember, Discard, Run]
    assert out[1].memory.delta_failed == goal(2).sha256, "durable before the next try"
    assert run_of(out) == Run(driver.job, State.PLAN, goal(2), deltas=False)
    driver.run_to(State.PROBATION)
    driver.conclude()
    assert driver.machine.pointer.stable == 2
    driver.intend(want(3, 3))
    assert run_of(driver.out).deltas, "another release may have a delta that works"


def test_a_failed_delta_is_not_tried_again_after_a_restart() -> None:
    driver = in_patch()
    driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    again = Driver(driver.machine.memory, driver.machine.pointer, driver.machine.installed)
    again.intend(want(2, 2))
    assert not run_of(again.out).deltas


@pytest.mark.parametrize("limits", [{"metered": True}, {"on_delta_failure": "fail"}])
def test_no_full_file_behind_the_operators_back(limits: dict[str, Any]) -> None:
    driver = in_patch(**limits)
    out = driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    assert kinds(out) == [Cancel, Remember]
    assert driver.machine.state is State.HOLD
    assert "forbids the full file" in driver.machine.error
    for _ in range(3):
        driver.conclude()
        assert driver.out == []
        assert driver.machine.state is State.HOLD
    allowed = Driver(driver.machine.memory, driver.machine.pointer, driver.machine.installed)
    allowed.intend(want(2, 2))
    assert run_of(allowed.out) == Run(allowed.job, State.PLAN, goal(2), deltas=False), "the operator allowed it"
    driver.intend(want(3, 3))
    assert run_of(driver.out).deltas, "a newer release is another matter"


def test_a_policy_may_try_the_same_delta_again() -> None:
    driver = in_patch(on_delta_failure="retry")
    driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    assert driver.machine.state is State.HOLD
    driver.conclude()
    assert run_of(driver.out).deltas


def test_a_patch_that_takes_too_long_is_a_failed_delta() -> None:
    driver = in_patch()
    driver.conclude()
    assert run_of(driver.out) == Run(driver.job, State.PLAN, goal(2), deltas=False)


def test_a_shell_that_reports_a_failed_delta_without_one_makes_no_loop() -> None:
    driver = in_patch()
    driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    driver.send(Failed(driver.job, Failure.DELTA, "wrong result."))
    assert driver.machine.state is State.HOLD


def test_a_pause_that_a_source_asks_for_is_obeyed_and_bounded() -> None:
    for asked_s, expected_s in ((0.0, 1.0), (120.0, 121.0), (1e9, 601.0)):
        driver = in_patch()
        driver.send(Failed(driver.job, Failure.TRANSIENT, "busy.", retry_s=asked_s))
        assert driver.machine.deadline - driver.now == pytest.approx(expected_s)


def spread_driver(**limits: Any) -> Driver:
    driver = Driver(limits=ReplicaLimits(apply_spread_s=1000.0, **limits))
    driver.install(want(1, goal(1)))
    assert driver.machine.pointer.stable == 1, "the first release never waits"
    driver.intend(want(2, goal(2, rollback_ok=(1,))))
    driver.run_to(State.SPREAD)
    return driver


def test_a_new_stable_waits_for_its_turn() -> None:
    driver = spread_driver()
    assert kinds(driver.out) == [Remember]
    assert driver.machine.deadline - driver.now == 1000.0 * seed("edge-1", goal(2).sha256)
    assert driver.intend(want(2, goal(2))) == [], "the same document again changes nothing"
    deadline = driver.machine.deadline
    driver.now = deadline - 0.01
    assert driver.send(Ticked()) == []
    driver.now = deadline
    driver.send(Ticked())
    assert driver.machine.pointer.stable == 2


def test_a_rollback_does_not_wait() -> None:
    driver = spread_driver()
    driver.conclude()
    driver.run_to(State.PROBATION)
    driver.conclude()
    assert driver.machine.memory.committed == 2
    driver.intend(want(3, 1, rollback=True))
    assert driver.machine.pointer.stable == 1


def test_a_newer_document_ends_the_wait() -> None:
    driver = spread_driver()
    driver.intend(want(3, 1))
    assert driver.machine.state is State.IDLE
    assert driver.machine.pointer.stable == 1


def test_restarts_while_waiting_are_no_sign_against_the_release() -> None:
    driver = spread_driver()
    for _ in range(5):
        machine = driver.machine
        driver = Driver(machine.memory, machine.pointer, machine.installed, limits=ReplicaLimits(apply_spread_s=1000.0))
        driver.intend(want(2, goal(2)))
        assert driver.machine.state is State.SPREAD
    assert driver.machine.memory.bans == ()


def test_turns_are_spread_evenly() -> None:
    turns = sorted(seed(f"edge-{index}", goal(2).sha256) for index in range(1000))
    assert all(abs(turn - index / 1000) < 0.05 for index, turn in enumerate(turns))


def test_a_verdict_is_durable_before_the_next_goal_begins() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.intend(want(2, 2, 3))
    driver.run_to(State.GATE)
    out = driver.send(Failed(driver.job, Failure.BAD, "wrong answers."))
    assert run_of(out).goal == goal(3)
    remembered = next(one for one in out if isinstance(one, Remember))
    assert [ban.release for ban in remembered.memory.bans] == [2]
    assert out.index(remembered) < out.index(run_of(out))


def test_a_dropped_candidate_leaves_the_pointer_before_its_trial_is_forgotten() -> None:
    driver = Driver()
    driver.install(want(1, 1))
    driver.intend(want(2, 1, 2, share=0.5))
    driver.run_to(State.PROBATION)
    out = driver.intend(want(3, 1))
    assert kinds(out)[:4] == [Cancel, WritePointer, Refresh, Remember]
    assert out[3].memory.previous is None


def machine_in(state: State) -> tuple[Replica, float]:
    driver = Driver(limits=ReplicaLimits(apply_spread_s=1000.0))
    if state is State.IDLE:
        return driver.machine, 0.0
    driver.install(want(1, goal(1)))
    if state is State.CHECK:
        driver.send(Polled())
        return driver.machine, driver.now
    driver.intend(want(2, 2))
    if state is State.HOLD:
        driver.send(Failed(driver.job, Failure.TRANSIENT, "offline."))
    elif state is State.ROLLBACK:
        driver.run_to(State.SPREAD)
        driver.conclude()
        driver.send(Failed(driver.job, Failure.BAD, "it does not load."))
    elif state in (State.ACTIVATE, State.PROBATION):
        driver.run_to(State.SPREAD)
        driver.conclude()
        driver.run_to(state)
    else:
        driver.run_to(state)
    return driver.machine, driver.now


def events_for(job: int) -> list[Event]:
    return [
        Booted(),
        Polled(),
        CheckFailed("offline."),
        Intended(want(3, 3)),
        Intended(want(1, 1)),
        Done(job),
        Loaded(job),
        *(Failed(job, failure, "it broke.") for failure in Failure),
        Sampled(job, requests=10, errors=9),
        Ticked(),
        ReportFailed("no route."),
    ]


@pytest.mark.parametrize("state", sorted(TABLE))
def test_every_event_in_every_state(state: State) -> None:
    for place in range(len(events_for(0))):
        machine, now = machine_in(state)
        assert machine.state is state
        event = events_for(machine._job)[place]
        before = (machine.state, machine.memory, machine.pointer, machine.deadline, machine.error)
        out = machine.handle(now, event)
        heard = type(event) in TABLE[state]
        if not heard:
            assert out == [], event
            assert (machine.state, machine.memory, machine.pointer, machine.deadline, machine.error) == before, event
        if hasattr(event, "job"):
            stale, _ = machine_in(state)
            assert stale.handle(now, replace(event, job=event.job - 1)) == [], "the answer of an older job"  # type: ignore[type-var, arg-type]
        on_trial = state in (State.ACTIVATE, State.PROBATION, State.ROLLBACK)  # ends by itself within its deadline
        if heard and isinstance(event, Intended) and event.want.intent == 3 and not on_trial:
            assert machine.memory.goal == goal(3), "a newer intent wins at once"


def test_memory_without_the_new_field_is_read() -> None:
    assert Memory(model="digits").delta_failed is None
