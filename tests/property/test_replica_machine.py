"""A replica's random life: new documents, failing steps, crashes between any two instructions, damaged folders."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from model_sync.replica.instructions import Cancel, Collect, Discard, Refresh, Remember, Run, Watch, WritePointer
from model_sync.replica.machine import Replica
from model_sync.replica.state import Failure, Goal, Memory, ReplicaLimits, State, Want
from nearcast.store.pointer import Pointer

RELEASES = st.integers(1, 5)
STEPS = {State.PLAN, State.FETCH, State.PATCH, State.VERIFY, State.STAGE, State.GATE}


def goal_of(release: int) -> Goal:
    sha256 = f"{release:x}" * 64
    return Goal(release=release, sha256=sha256[:64], rollback_ok=tuple(range(max(1, release - 2), release)))


class World(RuleBasedStateMachine):
    """The disk (journal, pointer, folders) outlives the machine; everything else dies with a crash."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.intent = 0
        self.memory = Memory(model="digits")
        self.pointer: Pointer | None = None
        self.folders: dict[int, str] = {}
        self.passed_gate: set[str] = set()
        self.want: Want | None = None
        self.runs: list[Run] = []
        self.refresh: Refresh | None = None
        self.watch: Watch | None = None
        self.committed: int | None = None
        self.wants: list[Want] = []

    @initialize()
    def start(self) -> None:
        self.boot(stop_after=None)

    def boot(self, stop_after: int | None) -> None:
        self.runs, self.refresh, self.watch = [], None, None
        limits = ReplicaLimits(apply_spread_s=5.0)
        self.machine = Replica("edge-1", self.memory, self.pointer, self.folders, limits=limits)
        self.apply(self.machine.handle(self.now, Booted()), stop_after)

    def send(self, event: object, stop_after: int | None = None) -> None:
        self.apply(self.machine.handle(self.now, event), stop_after)  # type: ignore[arg-type]

    def apply(self, instructions: list, stop_after: int | None) -> None:
        for position, one in enumerate(instructions):
            if stop_after is not None and position >= stop_after:
                self.boot(None)
                return
            self.carry_out(one)

    def carry_out(self, one: object) -> None:
        match one:
            case Remember(memory):
                self.check_commit(memory)
                self.check_end_of_trial(memory)
                self.memory = memory
            case WritePointer(pointer):
                self.check_point(pointer)
                self.pointer = pointer
            case Run():
                self.check_not_banned(one.goal)
                self.check_run(one)
                self.runs = [one]
            case Cancel(job):
                self.runs = [run for run in self.runs if run.job != job]
                self.refresh = None if self.refresh and self.refresh.job == job else self.refresh
                self.watch = None if self.watch and self.watch.job == job else self.watch
            case Refresh(job):
                self.refresh = one if job else self.refresh
            case Watch():
                self.watch = one
            case Discard(goal, installed):
                if installed:
                    self.remove(goal.release)
            case Collect(keep):
                for release in set(self.folders) - keep:
                    self.remove(release)

    def remove(self, release: int) -> None:
        for pointer in (self.pointer or Pointer(), self.memory.previous or Pointer()):
            pinned = (pointer.stable, pointer.candidate, pointer.last_good)
            assert release not in pinned or release not in self.folders, "I8: a pinned folder was removed"
        self.folders.pop(release, None)

    def check_commit(self, memory: Memory) -> None:
        old, new = self.committed, memory.committed
        if new is not None and old is not None and new < old:
            allowed = [w for w in self.wants if w.rollback and w.stable is not None and w.stable.release == new]
            assert allowed, "I3: the committed release fell without a signed rollback"
        self.committed = new

    def check_point(self, new: Pointer) -> None:
        """What a boot must know of a pointer is durable before the pointer is."""
        old = self.pointer or Pointer()
        self.check_verdicts()
        goal = self.machine.memory.goal
        if self.machine.state is State.ROLLBACK and goal and goal.sha256 in {ban.sha256 for ban in self.memory.bans}:
            served = (new.stable, new.candidate, new.last_good)
            assert goal.release not in served, "what was condemned just now is served on"
        for release in {new.stable, new.candidate} - {old.stable, old.candidate, None}:
            returning = release in (old.last_good, self.memory.committed)
            on_trial = self.memory.goal is not None and self.memory.goal.release == release
            assert on_trial or returning, "a crash now would leave a new release served without a trial"
            assert not on_trial or self.memory.previous is not None, "a crash now would forget the way back"

    def check_verdicts(self) -> None:
        verdicts = {ban.sha256 for ban in self.machine.memory.bans}
        assert verdicts <= {ban.sha256 for ban in self.memory.bans}, "I6: a crash now would forget a verdict"

    def check_run(self, run: Run) -> None:
        self.check_verdicts()
        assert self.memory.delta_failed == self.machine.memory.delta_failed, "a crash now would try the delta again"
        assert run.deltas == (self.memory.delta_failed != run.goal.sha256)
        if run.step is State.GATE:
            assert (self.memory.state, self.memory.goal) == (State.GATE, run.goal), "a crash in the gate is not counted"

    def check_end_of_trial(self, new: Memory) -> None:
        old, pointer = self.memory, self.pointer or Pointer()
        if old.previous is not None and new.previous is None and new.state is not State.COMMIT and old.goal is not None:
            assert old.goal.release not in (pointer.stable, pointer.candidate), "it is served on, and tried no more"

    def check_not_banned(self, goal: Goal) -> None:
        for ban in self.machine.memory.bans:
            if ban.sha256 == goal.sha256:
                assert self.want is not None
                assert self.want.intent > ban.intent, "I6: a quarantined manifest was tried again by the same document"
                assert self.want.salt != ban.salt

    # What the operator does.

    @rule(
        stable=RELEASES,
        candidate=st.none() | RELEASES,
        rollback=st.booleans(),
        wave=st.sampled_from([0.0, 1.0]),
        share=st.floats(0, 1),
        salt=st.sampled_from("abc"),
        stop=st.none() | st.integers(0, 4),
    )
    def publish(self, stable, candidate, rollback, wave, share, salt, stop) -> None:
        self.announce(stable, candidate, rollback, wave, share, salt, stop)

    @precondition(lambda self: self.pointer is not None and self.pointer.stable is not None)
    @rule(candidate=st.none() | RELEASES, salt=st.sampled_from("abc"), stop=st.none() | st.integers(0, 4))
    def canary(self, candidate, salt, stop) -> None:
        """Beside what serves, another release, or none any more: what an operator does most."""
        assert self.pointer is not None
        self.announce(self.pointer.stable, candidate, False, 1.0, 0.5, salt, stop)

    def announce(self, stable, candidate, rollback, wave, share, salt, stop) -> None:
        self.intent += 1
        self.want = Want(
            intent=self.intent,
            stable=goal_of(stable),
            candidate=goal_of(candidate) if candidate else None,
            rollback=rollback,
            wave=wave,
            share=share,
            salt=salt,
        )
        self.wants.append(self.want)
        self.send(Polled())
        self.send(Intended(self.want), stop)
        if stop is None and self.machine.state in STEPS:
            current = self.machine.memory.goal
            wanted = {goal.sha256 for goal in (self.want.stable, self.want.candidate) if goal}
            assert current is not None
            assert current.sha256 in wanted, "I12: an old intent is still being fetched"

    @rule(offline=st.booleans())
    def check_again(self, offline: bool) -> None:
        self.send(Polled())
        if offline or self.want is None:
            self.send(CheckFailed("offline"))
        else:
            self.send(Intended(self.want))

    # What the shell answers.

    @rule(answers=st.integers(1, 12))
    def go_well(self, answers: int) -> None:
        """A stretch without faults: without it, few lives would ever get as far as a second release."""
        for _ in range(answers):
            if self.runs:
                self.finish_step("done", None)
            elif self.refresh is not None:
                self.host_answers("hot", None)
            elif self.watch is not None or self.machine.state is State.SPREAD:
                self.now = self.machine.deadline
                self.watch = None
                self.send(Ticked())
            else:
                return

    @precondition(lambda self: self.runs)
    @rule(outcome=st.sampled_from(["done", "done", "done", *Failure]), stop=st.none() | st.integers(0, 4))
    def step_ends(self, outcome: str, stop: int | None) -> None:
        self.finish_step(outcome, stop)

    def finish_step(self, outcome: str, stop: int | None) -> None:
        run = self.runs.pop()
        if outcome != "done":
            self.send(Failed(run.job, Failure(outcome), "it broke."), stop)
            return
        if run.step is State.STAGE:
            self.folders[run.goal.release] = run.goal.sha256
        if run.step is State.GATE:
            self.passed_gate.add(run.goal.sha256)
        self.send(Done(run.job), stop)

    @precondition(lambda self: self.runs)
    @rule()
    def gate_refuses(self) -> None:
        """The deepest failure: without a rule of its own, few lives would see what comes after it."""
        while self.runs and self.runs[0].step is not State.GATE:
            self.finish_step("done", None)
        if self.runs:
            self.finish_step(Failure.BAD, None)

    @precondition(lambda self: self.refresh is not None)
    @rule(
        outcome=st.sampled_from(["hot", "hot", "hot", Failure.TRANSIENT, Failure.BAD]),
        stop=st.none() | st.integers(0, 4),
    )
    def host_says(self, outcome: str, stop: int | None) -> None:
        self.host_answers(outcome, stop)

    def host_answers(self, outcome: str, stop: int | None) -> None:
        refresh, self.refresh = self.refresh, None
        assert refresh is not None
        self.send(Loaded(refresh.job) if outcome == "hot" else Failed(refresh.job, Failure(outcome), "no."), stop)

    @precondition(lambda self: self.watch is not None)
    @rule(errors=st.integers(0, 10), heard=st.booleans(), stop=st.none() | st.integers(0, 4))
    def sample(self, errors: int, heard: bool, stop: int | None) -> None:
        assert self.watch is not None
        self.send(Sampled(self.watch.job, requests=10, errors=errors, heard=heard), stop)

    @rule(seconds=st.sampled_from([0.1, 6.0, 400.0, 5000.0]), stop=st.none() | st.integers(0, 4))
    def time_passes(self, seconds: float, stop: int | None) -> None:
        self.now += seconds
        self.send(Ticked(), stop)

    @rule()
    def crash(self) -> None:
        self.boot(None)

    @rule(release=RELEASES)
    def crash_and_damage(self, release: int) -> None:
        self.folders.pop(release, None)
        self.boot(None)

    @rule()
    def report_fails(self) -> None:
        before = (self.machine.state, self.machine.memory, self.machine.pointer, self.machine.deadline)
        assert self.machine.handle(self.now, ReportFailed("no route")) == []
        after = (self.machine.state, self.machine.memory, self.machine.pointer, self.machine.deadline)
        assert before == after, "I11"

    # What must always hold.

    @invariant()
    def serves_only_what_is_whole_and_gated(self) -> None:
        pointer = self.pointer or Pointer()
        for release in (pointer.stable, pointer.candidate, pointer.last_good):
            if release is not None:
                assert release in self.folders, f"I2: release {release} is pointed to but not whole"
                assert self.folders[release] in self.passed_gate, f"I1: release {release} never passed the gate"
        assert pointer.candidate is None or pointer.candidate != pointer.stable
        assert pointer.last_good is None or pointer.last_good != pointer.stable
        assert pointer.candidate is not None or pointer.share == 0.0

    @invariant()
    def disk_and_machine_agree(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.pointer == (self.pointer or Pointer())

    @invariant()
    def every_working_state_has_a_deadline(self) -> None:
        if hasattr(self, "machine"):
            assert (self.machine.state is State.IDLE) == math.isinf(self.machine.deadline)

    def teardown(self) -> None:
        """Whatever happened: with a new document and no more faults, the node ends up with what is wanted."""
        if not hasattr(self, "machine"):
            return
        self.intent += 1
        newest = Goal(release=9, sha256="9" * 64)
        self.want = Want(intent=self.intent, stable=newest, salt=f"end-{self.intent}")
        self.wants.append(self.want)
        for _ in range(60):
            self.send(Polled())
            self.send(Intended(self.want))
            while self.runs:
                run = self.runs.pop()
                if run.step is State.STAGE:
                    self.folders[run.goal.release] = run.goal.sha256
                if run.step is State.GATE:
                    self.passed_gate.add(run.goal.sha256)
                self.send(Done(run.job))
            if self.refresh is not None:
                job, self.refresh = self.refresh.job, None
                self.send(Loaded(job))
            self.now += 400.0
            self.send(Ticked())
            self.serves_only_what_is_whole_and_gated()
        assert self.machine.state is State.IDLE, self.machine.state
        assert self.pointer is not None
        assert self.pointer.stable == self.committed == 9
        assert self.machine.memory.bans == () or all(ban.sha256 != newest.sha256 for ban in self.machine.memory.bans)


TestReplica = World.TestCase
TestReplica.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


WANT = {"candidate": None, "salt": "a", "share": 0.0, "stop": None, "wave": 0.0}


def committed(*releases: int) -> World:
    """A node that went through these stable releases without a fault."""
    world = World()
    world.start()
    for release in releases:
        world.publish(stable=release, rollback=False, **WANT)
        until(world, State.IDLE)
    return world


def until(world: World, state: State) -> None:
    for _ in range(20):
        if world.machine.state is state:
            return
        world.go_well(answers=1)
    raise AssertionError(f"{world.machine.state} instead of {state}")


def test_wanting_the_old_release_again_ends_a_trial_without_a_verdict() -> None:
    world = committed(1)
    world.publish(stable=2, rollback=False, **WANT)
    until(world, State.ACTIVATE)
    world.publish(stable=1, rollback=False, **WANT)
    assert world.machine.state is State.ROLLBACK
    world.time_passes(seconds=400.0, stop=None)  # the host says nothing
    assert (world.machine.state, world.machine.pointer.stable) == (State.IDLE, 1)
    assert world.machine.memory.bans == ()


def test_a_condemned_release_is_no_place_to_fall_back_to() -> None:
    world = committed(1, 2)
    assert world.machine.pointer.last_good == 1
    world.publish(stable=1, rollback=True, **WANT)
    world.time_passes(seconds=400.0, stop=None)
    assert [ban.release for ban in world.machine.memory.bans] == [1]
    assert (world.machine.pointer.stable, world.machine.pointer.last_good) == (2, None)
