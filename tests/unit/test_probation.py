"""What a version on trial is sent back for: errors, a slower p99, other answers; each with a share and a number."""

from __future__ import annotations

import pytest

from model_sync.replica.events import Booted, Done, Intended, Loaded, Sampled, Ticked
from model_sync.replica.machine import Replica
from model_sync.replica.probation import Probation
from model_sync.replica.state import Goal, Memory, ReplicaLimits, State, Want
from nearcast.serving.statistics import bucket_of

LIMITS = ReplicaLimits()


def answers(fast: int, slow: int = 0, *, fast_ms: float = 2.0, slow_ms: float = 100.0) -> dict[str, int]:
    return {str(bucket_of(int(fast_ms * 1000))): fast, str(bucket_of(int(slow_ms * 1000))): slow}


@pytest.mark.parametrize(
    ("latency", "reference", "fails"),
    [
        (answers(190, 10), answers(1000), True),
        (answers(189, 10), answers(1000), False),  # 199 answers are not enough
        (answers(190, 10), answers(199), False),
        (answers(300, 2), answers(1000), False),
        (answers(190, 10), answers(980, 20), False),
        (answers(300, fast_ms=11.0), answers(1000), False),  # 9 ms more are within the slack
        (answers(300, fast_ms=60.0), answers(1000, fast_ms=40.0), False),  # half as much again is within the factor
        (answers(300, fast_ms=90.0), answers(1000, fast_ms=40.0), True),
    ],
)
def test_the_p99(latency: dict[str, int], reference: dict[str, int], fails: bool) -> None:
    reason = Probation().judge(Sampled(1, 2000, latency=latency, reference=reference), LIMITS)
    assert bool(reason) is fails
    assert ("p99" in reason) is fails


def test_only_answers_since_the_trial_began_count() -> None:
    began = Loaded(1, requests=500, latency=answers(400, 100), compared=60, disagreed=60)
    probation = Probation(began=began, disagreement_max=0.05)
    now = Sampled(2, 800, latency=answers(700, 100), reference=answers(1000), compared=160, disagreed=61)
    assert not probation.judge(now, LIMITS)
    restarted = Sampled(2, 250, latency=answers(200, 50), reference=answers(1000))
    assert "p99" in probation.judge(restarted, LIMITS), "the host counts from zero again"


@pytest.mark.parametrize(
    ("compared", "disagreed", "bound", "fails"),
    [(50, 3, 0.05, True), (49, 49, 0.05, False), (60, 3, 0.05, False), (60, 60, 1.0, False), (50, 1, 0.0, True)],
)
def test_other_answers(compared: int, disagreed: int, bound: float, fails: bool) -> None:
    now = Sampled(1, compared=compared, disagreed=disagreed)
    reason = Probation(disagreement_max=bound).judge(now, LIMITS)
    assert bool(reason) is fails
    assert Probation().judge(now, ReplicaLimits(disagreement_share_max=bound)) == reason


def goal(release: int) -> Goal:
    return Goal(release=release, sha256=f"{release}" * 64)


def on_probation(want: Want) -> tuple[Replica, int]:
    """Release 1 committed, and what `want` says on probation; the number of the job that watches it."""
    machine = Replica("edge-1", Memory(model="digits"), None, {})
    machine.handle(0.0, Booted())
    for one in (Want(intent=1, stable=goal(1)), want):
        machine.handle(0.0, Intended(one))
        while machine.state not in (State.PROBATION, State.IDLE):
            job = machine._job
            machine.handle(0.0, Loaded(job) if machine.state is State.ACTIVATE else Done(job))
        if one is not want:
            machine.handle(LIMITS.probation_s, Ticked())
    assert machine.state is State.PROBATION
    return machine, machine._job


def test_enough_good_requests_end_the_probation_early() -> None:
    machine, job = on_probation(Want(intent=2, stable=goal(2)))
    machine.handle(0.1, Sampled(job, requests=LIMITS.probation_requests - 1))
    assert machine.state is State.PROBATION
    machine.handle(0.2, Sampled(job, requests=LIMITS.probation_requests, errors=3))
    assert machine.state is State.IDLE
    assert machine.memory.committed == 2


def test_the_signed_bound_condemns_a_candidate_that_answers_otherwise() -> None:
    want = Want(intent=2, stable=goal(1), candidate=goal(2), share=0.1, salt="s", disagreement_max=0.1)
    machine, job = on_probation(want)
    machine.handle(0.1, Sampled(job, requests=10, compared=100, disagreed=10))
    assert machine.state is State.PROBATION
    machine.handle(0.2, Sampled(job, requests=10, compared=100, disagreed=11))
    assert machine.state is State.ROLLBACK
    assert "11 of 100 inputs got another answer" in machine.error
    assert machine.pointer.candidate is None
    assert [ban.release for ban in machine.memory.bans] == [2]


def test_a_slow_stable_returns_to_last_good() -> None:
    machine, job = on_probation(Want(intent=2, stable=goal(2)))
    assert machine.pointer.last_good == 1
    machine.handle(0.1, Sampled(job, requests=300, latency=answers(200, 100), reference=answers(5000)))
    assert machine.state is State.ROLLBACK
    assert machine.pointer.stable == 1
