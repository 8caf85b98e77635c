"""The replica machine: brings one model on one node to what its channel wants, through every crash and failure.

`transitions.TABLE` says which event matters when; this file says what is done then. Two kinds of change are kept apart:
what needs a release that is not ready (PLAN … GATE, minutes), and what is a matter of the pointer alone (shares, a
dropped candidate, a return to a release still here), which happens in the same call that brings the document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from model_sync.replica import pointers
from model_sync.replica.events import Booted, CheckFailed, Event, Failed, Intended, Loaded, Sampled, Ticked
from model_sync.replica.instructions import (
    Cancel,
    Collect,
    Discard,
    Instruction,
    Refresh,
    Remember,
    Run,
    Watch,
    WritePointer,
)
from model_sync.replica.probation import Probation
from model_sync.replica.quarantine import ban
from model_sync.replica.reconcile import Aim, aim_of
from model_sync.replica.spread import wait_for_turn_s
from model_sync.replica.state import Goal, Memory, ReplicaLimits, Slot, State, Want
from model_sync.replica.transitions import EXPIRIES, FAILURES, NEXT, TABLE, Action
from nearcast.store.pointer import Pointer

_ON_TRIAL = (State.ACTIVATE, State.PROBATION)
_STEPS = (State.PLAN, State.FETCH, State.PATCH, State.VERIFY, State.STAGE, State.GATE)


class Replica:
    """One model on one node.

    Args:
        node: name of the node, for the waves.
        memory: the last journal record of the model, or a fresh one.
        pointer: the pointer on disk.
        installed: manifest digests, by release, of the folders whose files were verified just now.
        draw: uniform numbers in [0, 1) for the jitter of retries.
    """

    def __init__(
        self,
        node: str,
        memory: Memory,
        pointer: Pointer | None,
        installed: Mapping[int, str],
        *,
        limits: ReplicaLimits | None = None,
        draw: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.node = node
        self.memory = memory
        self.pointer = pointer or Pointer()
        self.installed = dict(installed)
        self.state = State.IDLE
        self.deadline = math.inf
        self.error = ""
        self._limits = limits or ReplicaLimits()
        self._draw = draw
        self._want: Want | None = None
        self._job = 0
        self._attempts = 0
        self._probation = Probation()
        self._resume = State.PLAN
        self._actions: Mapping[Action, Callable[[float, Event], list[Instruction]]] = {
            Action.RESUME: self._on_resume,
            Action.CHECK: self._on_check,
            Action.REST: self._on_rest,
            Action.RECONCILE: self._on_reconcile,
            Action.ADVANCE: self._on_advance,
            Action.FAIL: self._on_fail,
            Action.EXPIRE: self._on_expire,
            Action.TRY: self._on_try,
            Action.JUDGE: self._on_judge,
            Action.CONCLUDE: self._on_conclude,
            Action.RETURNED: self._on_returned,
            Action.RETRY: self._on_retry,
            Action.TAKE_TURN: self._on_take_turn,
        }
        self._failure_actions: Mapping[Action, Callable[[float, str], list[Instruction]]] = {
            Action.HOLD: self._hold,
            Action.CLEAN: self._clean,
            Action.QUARANTINE: self._quarantine,
            Action.ROLL_BACK: self._roll_back,
            Action.FALL_BACK: self._fall_back,
        }
        self.memory = pointers.adopt(self.pointer, memory, self.installed)

    def handle(self, now: float, event: Event) -> list[Instruction]:
        """Take one event at the monotonic instant `now`; what the state does not listen to changes nothing."""
        action = TABLE[self.state].get(type(event))
        job = getattr(event, "job", self._job)
        if action is None or job != self._job:
            return []
        return self._actions[action](now, event)

    def leave(self) -> list[Instruction]:
        """The agent ends by order: the start that follows is no sign against the version on trial."""
        memory = self.memory
        if memory.goal is None or memory.state not in (State.GATE, *_ON_TRIAL):
            return []
        self.memory = replace(memory, boots=memory.boots - 1)
        return [Remember(self.memory)]

    # Boot.

    def _on_resume(self, now: float, event: Event) -> list[Instruction]:
        assert isinstance(event, Booted)
        memory = self.memory
        if memory.goal is not None and memory.state in (State.GATE, *_ON_TRIAL):
            boots = memory.boots + 1
            self.memory = replace(memory, boots=boots)
            if boots > self._limits.boots_max:
                reason = f"the agent was stopped {boots} times while it was tried."
                ended = self._roll_back(now, reason) if memory.previous else self._quarantine(now, reason)
                return [*ended, *self._repair()]
            if memory.previous is None:
                return [*self._repair(), Remember(self.memory)]
            repaired = self._repair()
            fits = memory.slot == "stable" or self.pointer.stable not in (None, memory.goal.release)
            if memory.goal.release in self.installed and fits:
                return [*repaired, *self._activate(now)]
            self.error = "The version on trial was damaged by the last stop; it is fetched again."
            return [*repaired, *self._return(now)]
        return self._return(now) if memory.previous is not None else self._repair()

    def _repair(self) -> list[Instruction]:
        """Point away from folders that are gone or damaged; they are fetched again like any release."""
        new = pointers.repair(self.pointer, self.memory, self.installed)
        if new == self.pointer:
            return []
        self.error = "A version folder was damaged or missing after the last stop; it is fetched again."
        return self._point(new)

    # Checks.

    def _on_check(self, now: float, event: Event) -> list[Instruction]:
        del event
        self._enter(State.CHECK, now)
        return []

    def _on_rest(self, now: float, event: Event) -> list[Instruction]:
        self.error = event.reason if isinstance(event, CheckFailed) else "The check of the metadata took too long."
        self._enter(State.IDLE, now)
        return []

    def _on_reconcile(self, now: float, event: Event) -> list[Instruction]:
        assert isinstance(event, Intended)
        if event.want.intent < self.memory.intent:
            self.error = (
                f"Refused the channel document of intent {event.want.intent}: intent {self.memory.intent} is obeyed."
            )
            if self.state is State.CHECK:
                self._enter(State.IDLE, now)
            return []
        self._want = event.want
        return self._reconcile(now)

    def _reconcile(self, now: float) -> list[Instruction]:
        want = self._want
        if want is None:
            return self._rest(now)
        aim = aim_of(want, self.memory, self.pointer, self.installed, self.node)
        out: list[Instruction] = []
        if self._is_on_trial and self._gives_up(aim):
            return self._return(now)
        ready = aim.stable is not None and self._ready(aim.stable) and aim.stable.release != self.pointer.stable
        if aim.stable is not None and ready and not (self.state is State.SPREAD and self._is_same(aim.stable)):
            return self._start(now, aim.stable, "stable", aim)
        if self._is_on_trial and self.memory.slot == "candidate":
            goal = self.memory.goal
            if goal is None or aim.candidate is None or aim.candidate.sha256 != goal.sha256:
                out += self._abandon(now)
        out += self._follow(want, aim)
        if self._is_on_trial or self.state is State.ROLLBACK:
            return out
        goal, slot = self._outstanding(aim)
        if goal is None:
            self.error = aim.refusal
            return out + self._rest(now)
        if self._is_same(goal):
            self.memory = replace(self.memory, slot=slot)
            return out
        return out + self._start(now, goal, slot, aim)

    @property
    def _is_on_trial(self) -> bool:
        suspended = self.state is State.HOLD and self.memory.previous is not None
        return self.state in _ON_TRIAL or suspended

    def _gives_up(self, aim: Aim) -> bool:
        """What served before the trial of a stable release is wanted again: a return, which nobody need judge."""
        previous, goal = self.memory.previous, self.memory.goal
        if previous is None or goal is None or aim.stable is None or self.memory.slot != "stable":
            return False
        return aim.stable.release == previous.stable != goal.release

    def _is_same(self, goal: Goal) -> bool:
        return (
            self.state in (*_STEPS, State.SPREAD, State.HOLD)
            and self.memory.goal is not None
            and self.memory.goal.sha256 == goal.sha256
        )

    def _follow(self, want: Want, aim: Aim) -> list[Instruction]:
        """Bring share, salt, candidate and intent of the pointer in line with the document, at once."""
        new = pointers.follow(self.pointer, want, aim)
        self.memory = replace(self.memory, intent=max(self.memory.intent, want.intent))
        if new == self.pointer:
            return []
        return self._point(new)

    def _outstanding(self, aim: Aim) -> tuple[Goal | None, Slot]:
        if aim.stable is not None and aim.stable.release != self.pointer.stable:
            return aim.stable, "stable"
        stable = self.pointer.stable
        if aim.candidate is not None and stable and aim.candidate.release not in (self.pointer.candidate, stable):
            return aim.candidate, "candidate"
        return None, "stable"

    def _ready(self, goal: Goal) -> bool:
        return self.installed.get(goal.release) == goal.sha256 == self.memory.gated.get(str(goal.release))

    # Steps.

    def _start(self, now: float, goal: Goal, slot: Slot, aim: Aim) -> list[Instruction]:
        out = self._stop()
        same = self.memory.goal is not None and self.memory.goal.sha256 == goal.sha256
        self._attempts = self._attempts if same else 0
        trial = self.memory.slot
        boots = self.memory.boots if same and not self._ready(goal) else 0
        self.memory = replace(self.memory, goal=goal, slot=slot, boots=boots)
        self.error = aim.refusal
        if self._is_on_trial and trial == "candidate" and self.pointer.candidate != goal.release:
            self.pointer = replace(self.pointer, candidate=None, share=0.0)  # no verdict: it is tried again later
        if self._ready(goal):
            return out + self._await_turn(now)
        return out + self._step(State.PLAN, now)

    def _stop(self) -> list[Instruction]:
        """End whatever job runs; its answer no longer counts."""
        running = self.state in (*_STEPS, *_ON_TRIAL, State.ROLLBACK)
        job, self._job = self._job, self._job + 1
        return [Cancel(job)] if running else []

    def _step(self, state: State, now: float) -> list[Instruction]:
        goal = self.memory.goal
        assert goal is not None
        deltas = self.memory.delta_failed != goal.sha256
        if state is State.PLAN and not deltas and self._limits.full_refusal and goal.release not in self.installed:
            return self._hold(now, self._limits.full_refusal)
        self._enter(state, now)
        self._job += 1
        out: list[Instruction] = []
        if state is State.PLAN:
            out += self._collect()
            if goal.release not in self.installed:
                out += self._discard(goal)
        if state is State.GATE:
            self.memory = replace(self.memory, state=State.GATE)
            out.append(Remember(self.memory))
        return [*out, Run(self._job, state, goal, deltas)]

    def _discard(self, goal: Goal) -> list[Instruction]:
        """Remove a folder that is damaged or unknown; what could fall back to it no longer does."""
        new = pointers.without(self.pointer, goal.release)
        return [*self._point(new), Discard(goal, installed=True)]

    def _on_advance(self, now: float, event: Event) -> list[Instruction]:
        del event
        goal = self.memory.goal
        assert goal is not None
        if self.state is State.STAGE:
            self.installed[goal.release] = goal.sha256
        if self.state is not State.GATE:
            following = NEXT[self.state]
            if self.state is State.PLAN and goal.release in self.installed:
                following = State.VERIFY
            return self._step(following, now)
        self.memory = replace(self.memory, gated={**self.memory.gated, str(goal.release): goal.sha256}, boots=0)
        return self._await_turn(now)

    def _on_fail(self, now: float, event: Event) -> list[Instruction]:
        assert isinstance(event, Failed)
        out = self._failure_actions[FAILURES[self.state, event.failure]](now, event.reason)
        if self.state is State.HOLD:
            self.deadline += min(event.retry_s, self._limits.retry_after_s_max)
        return out

    def _on_expire(self, now: float, event: Event) -> list[Instruction]:
        del event
        if now < self.deadline:
            return []
        reason = f"{self.state} took longer than {self._limits.of(self.state):g} s."
        return self._failure_actions[EXPIRIES[self.state]](now, reason)

    def _hold(self, now: float, reason: str) -> list[Instruction]:
        out = self._stop()
        goal = self.memory.goal
        if self.state is State.VERIFY and goal is not None and self.installed.pop(goal.release, ""):
            out += self._discard(goal)
        self._resume = State.ACTIVATE if self.state in _ON_TRIAL else State.PLAN
        self.error = reason
        self._attempts += 1
        self.state = State.HOLD
        span = min(self._limits.backoff_cap_s, self._limits.backoff_base_s * 2.0 ** min(self._attempts, 32))
        self.deadline = now + span * self._draw()
        return out

    def _clean(self, now: float, reason: str) -> list[Instruction]:
        goal = self.memory.goal
        assert goal is not None
        self._attempts = max(self._attempts, 4)
        return [*self._hold(now, reason), Discard(goal, installed=False)]

    def _fall_back(self, now: float, reason: str) -> list[Instruction]:
        """A delta failed: on to the full file if the policy says so, and never to the same delta by itself."""
        goal = self.memory.goal
        assert goal is not None
        if self._limits.on_delta_failure == "retry" or self.memory.delta_failed == goal.sha256:
            return self._hold(now, reason)
        out = self._stop()
        self.memory = replace(self.memory, state=State.IDLE, delta_failed=goal.sha256)
        self._enter(State.IDLE, now)
        self.error = reason
        return [*out, Remember(self.memory), *self._step(State.PLAN, now)]

    def _on_retry(self, now: float, event: Event) -> list[Instruction]:
        del event
        if now < self.deadline or self.memory.goal is None:
            return []
        return self._activate(now) if self._resume is State.ACTIVATE else self._step(State.PLAN, now)

    # Activation.

    def _await_turn(self, now: float) -> list[Instruction]:
        """Activate what is ready, a new stable release at the moment that is this node's own."""
        wait_s = wait_for_turn_s(self.node, self.memory, self.pointer, self._want, self._limits.apply_spread_s)
        if wait_s <= 0.0:
            return self._activate(now)
        self.memory = replace(self.memory, state=State.SPREAD)
        self._enter(State.SPREAD, now)
        self.deadline = now + wait_s
        return [Remember(self.memory)]

    def _on_take_turn(self, now: float, event: Event) -> list[Instruction]:
        del event
        return self._activate(now) if now >= self.deadline else []

    def _activate(self, now: float) -> list[Instruction]:
        goal, memory = self.memory.goal, self.memory
        assert goal is not None
        previous = memory.previous or self.pointer
        new = pointers.activate(self.pointer, memory, goal, self._want, self.installed)
        self.memory = replace(memory, state=State.ACTIVATE, previous=previous, intent=max(memory.intent, new.intent))
        self._enter(State.ACTIVATE, now)
        self._job += 1
        return [Remember(self.memory), *self._replace(new), Refresh(self._job, goal.release)]

    def _on_try(self, now: float, event: Event) -> list[Instruction]:
        assert isinstance(event, Loaded)
        goal, committed = self.memory.goal, self.memory.committed
        assert goal is not None
        returning = self.memory.slot == "stable" and committed is not None and goal.release <= committed
        if returning or self._limits.probation_s <= 0:
            return self._commit(now)
        self.memory = replace(self.memory, state=State.PROBATION)
        bound = self._want.disagreement_max if self._want is not None else 1.0
        self._probation = Probation(began=event, disagreement_max=bound)
        self._enter(State.PROBATION, now)
        self._job += 1
        return [Remember(self.memory), Watch(self._job, goal.release)]

    def _on_judge(self, now: float, event: Event) -> list[Instruction]:
        assert isinstance(event, Sampled)
        self._probation.heard = event.heard
        if event.failed:
            return self._roll_back(now, f"the model host could not serve it: {event.failed}")
        if not event.heard:
            return []
        if reason := self._probation.judge(event, self._limits):
            return self._roll_back(now, reason)
        return self._commit(now) if self._probation.asked >= self._limits.probation_requests else []

    def _on_conclude(self, now: float, event: Event) -> list[Instruction]:
        del event
        if now < self.deadline:
            return []
        if self._probation.heard:
            return self._commit(now)
        boots = self.memory.boots + 1
        self.memory = replace(self.memory, boots=boots)
        if boots > self._limits.boots_max:
            return self._roll_back(now, "the model host did not answer while it was tried.")
        return self._hold(now, "The model host did not answer during the probation; it goes on once the host is back.")

    def _commit(self, now: float) -> list[Instruction]:
        goal, slot = self.memory.goal, self.memory.slot
        assert goal is not None
        out = self._stop()
        changes = {"committed": goal.release, "rollback_ok": goal.rollback_ok} if slot == "stable" else {}
        bans = tuple(old for old in self.memory.bans if old.sha256 != goal.sha256)
        self.memory = replace(self.memory, state=State.COMMIT, goal=None, previous=None, boots=0, bans=bans, **changes)
        self.state, self._attempts, self.error = State.COMMIT, 0, ""
        return [*out, Remember(self.memory), *self._reconcile(now), *self._collect()]

    def _abandon(self, now: float) -> list[Instruction]:
        """A candidate on trial is wanted no more: no verdict, the pointer drops it in the same call."""
        out = self._stop()
        self.memory = replace(self.memory, state=State.IDLE, goal=None, previous=None, boots=0)
        self._enter(State.IDLE, now)
        return [*out, *self._point(replace(self.pointer, candidate=None, share=0.0)), Remember(self.memory)]

    # Failure of a version.

    def _roll_back(self, now: float, reason: str) -> list[Instruction]:
        goal = self.memory.goal
        assert goal is not None
        self._ban(goal, reason)
        return self._return(now)

    def _return(self, now: float) -> list[Instruction]:
        out = self._stop()
        given_back = pointers.give_back(self.pointer, self.memory)
        new = pointers.repair(given_back, self.memory, self.installed)
        self.memory = replace(self.memory, state=State.ROLLBACK)
        self._enter(State.ROLLBACK, now)
        self._job += 1
        return [*out, Remember(self.memory), *self._replace(new), Refresh(self._job, new.stable)]

    def _on_returned(self, now: float, event: Event) -> list[Instruction]:
        if isinstance(event, Ticked) and now < self.deadline:
            return []
        if not isinstance(event, Loaded):
            self.error += " The model host did not confirm the return; the pointer is in place."
        return self._after_quarantine(now)

    def _quarantine(self, now: float, reason: str) -> list[Instruction]:
        goal = self.memory.goal
        assert goal is not None
        self._ban(goal, reason)
        return [*self._stop(), *self._after_quarantine(now), Discard(goal, installed=False)]

    def _after_quarantine(self, now: float) -> list[Instruction]:
        error = self.error
        self.memory = replace(self.memory, state=State.QUARANTINE, goal=None, previous=None, boots=0)
        self.state, self._attempts = State.QUARANTINE, 0
        out = [Remember(self.memory), *self._reconcile(now), *self._collect()]
        self.error = error
        return out

    def _ban(self, goal: Goal, reason: str) -> None:
        self.memory = ban(self.memory, goal, self._want, self.pointer, reason, self._limits.bans_max)
        self.error = f"Release {goal.release} of {self.memory.model} is in quarantine: {reason}"

    # Small things.

    def _enter(self, state: State, now: float) -> None:
        self.state = state
        self.deadline = math.inf if state is State.IDLE else now + self._limits.of(state)

    def _rest(self, now: float) -> list[Instruction]:
        out = self._stop() if self.state in _STEPS else []
        changed = self.memory.goal is not None or self.memory.state is not State.IDLE
        passing = self.state in (State.COMMIT, State.QUARANTINE)
        self.memory = replace(self.memory, state=State.IDLE, goal=None, previous=None, boots=0)
        self._enter(State.IDLE, now)
        return [*out, Remember(self.memory)] if changed and not passing else out

    def _point(self, new: Pointer) -> list[Instruction]:
        """Write the pointer and tell the host, without waiting for it."""
        return [*self._replace(new), Refresh(0, new.stable)] if new != self.pointer else []

    def _replace(self, new: Pointer) -> list[Instruction]:
        self.pointer = new
        return [WritePointer(new)]

    def _collect(self) -> list[Instruction]:
        """Keep what is served, what can be fallen back to, and what is wanted; the rest goes."""
        keep = pointers.kept_releases(self.pointer, self.memory, self._want)
        if set(self.installed) <= keep:
            return []
        self.installed = {release: sha for release, sha in self.installed.items() if release in keep}
        self.memory = replace(
            self.memory, gated={key: sha for key, sha in self.memory.gated.items() if int(key) in keep}
        )
        return [Collect(keep)]
