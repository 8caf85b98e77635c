"""The whole transition table of a replica; the machine holds no other rule about which event matters in which state.

What is not listed is ignored in that state: a report that failed, an answer to a job that was cancelled, a second poll.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from model_sync.replica.events import (
    Booted,
    CheckFailed,
    Done,
    Event,
    Failed,
    Intended,
    Loaded,
    Polled,
    Sampled,
    Ticked,
)
from model_sync.replica.state import Failure, State


class Action(StrEnum):
    """What the machine does on an event."""

    RESUME = "resume"
    CHECK = "check"
    REST = "rest"
    RECONCILE = "reconcile"
    ADVANCE = "advance"
    FAIL = "fail"
    EXPIRE = "expire"
    TRY = "try"
    JUDGE = "judge"
    CONCLUDE = "conclude"
    RETURNED = "returned"
    RETRY = "retry"
    TAKE_TURN = "take_turn"
    HOLD = "hold"
    CLEAN = "clean"
    QUARANTINE = "quarantine"
    ROLL_BACK = "roll_back"
    FALL_BACK = "fall_back"


_STEP: Mapping[type[Event], Action] = {
    Done: Action.ADVANCE,
    Failed: Action.FAIL,
    Ticked: Action.EXPIRE,
    Intended: Action.RECONCILE,
}

TABLE: Mapping[State, Mapping[type[Event], Action]] = {
    State.IDLE: {Booted: Action.RESUME, Polled: Action.CHECK, Intended: Action.RECONCILE},
    State.CHECK: {Intended: Action.RECONCILE, CheckFailed: Action.REST, Ticked: Action.REST},
    State.PLAN: _STEP,
    State.FETCH: _STEP,
    State.PATCH: _STEP,
    State.VERIFY: _STEP,
    State.STAGE: _STEP,
    State.GATE: _STEP,
    State.SPREAD: {Ticked: Action.TAKE_TURN, Intended: Action.RECONCILE},
    State.ACTIVATE: {
        Loaded: Action.TRY,
        Failed: Action.FAIL,
        Ticked: Action.EXPIRE,
        Intended: Action.RECONCILE,
    },
    State.PROBATION: {Sampled: Action.JUDGE, Ticked: Action.CONCLUDE, Intended: Action.RECONCILE},
    State.ROLLBACK: {
        Loaded: Action.RETURNED,
        Failed: Action.RETURNED,
        Ticked: Action.RETURNED,
        Intended: Action.RECONCILE,
    },
    State.HOLD: {Ticked: Action.RETRY, Intended: Action.RECONCILE},
}

NEXT: Mapping[State, State] = {
    State.PLAN: State.FETCH,
    State.FETCH: State.PATCH,
    State.PATCH: State.VERIFY,
    State.VERIFY: State.STAGE,
    State.STAGE: State.GATE,
    State.GATE: State.ACTIVATE,
}

FAILURES: Mapping[tuple[State, Failure], Action] = {
    **{
        (state, failure): action
        for state in (State.PLAN, State.FETCH, State.PATCH, State.VERIFY, State.STAGE, State.GATE)
        for failure, action in (
            (Failure.TRANSIENT, Action.HOLD),
            (Failure.FULL, Action.CLEAN),
            (Failure.BAD, Action.QUARANTINE),
            (Failure.DELTA, Action.FALL_BACK),
        )
    },
    (State.ACTIVATE, Failure.TRANSIENT): Action.HOLD,
    (State.ACTIVATE, Failure.FULL): Action.HOLD,
    (State.ACTIVATE, Failure.BAD): Action.ROLL_BACK,
    (State.ACTIVATE, Failure.DELTA): Action.HOLD,
}

EXPIRIES: Mapping[State, Action] = {
    State.PLAN: Action.HOLD,
    State.FETCH: Action.HOLD,
    State.PATCH: Action.FALL_BACK,
    State.VERIFY: Action.HOLD,
    State.STAGE: Action.HOLD,
    State.GATE: Action.QUARANTINE,
    State.ACTIVATE: Action.ROLL_BACK,
}
