"""The words of the replica machine: states, what a channel wants, what a node remembers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from nearcast.store.manifest import ModelName, Release, Sha256
from nearcast.store.pointer import Pointer


class State(StrEnum):
    """Where one model is. COMMIT and QUARANTINE are passed through within one call; in SPREAD a release that is ready
    waits for this node's turn.
    """

    IDLE = "IDLE"
    CHECK = "CHECK"
    PLAN = "PLAN"
    FETCH = "FETCH"
    PATCH = "PATCH"
    VERIFY = "VERIFY"
    STAGE = "STAGE"
    GATE = "GATE"
    SPREAD = "SPREAD"
    ACTIVATE = "ACTIVATE"
    PROBATION = "PROBATION"
    COMMIT = "COMMIT"
    ROLLBACK = "ROLLBACK"
    QUARANTINE = "QUARANTINE"
    HOLD = "HOLD"


class Failure(StrEnum):
    """Why a step failed, as far as the machine cares.

    `transient`: network, host unreachable, bytes of a mirror that are not the signed ones (a mirror can only delay).
    `full`: quota or disk. `bad`: the signed bytes themselves do not work here. `delta`: a shorter way did not lead to
    the signed bytes, or cannot be gone here.
    """

    TRANSIENT = "transient"
    FULL = "full"
    BAD = "bad"
    DELTA = "delta"


Slot = Literal["stable", "candidate"]
DeltaFailurePolicy = Literal["full", "retry", "fail"]


class Goal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A release to have, by the digest of its manifest.

    `rollback_ok`: where a signed rollback from it may return. `refusal`: why it is not trusted; "" = both roles agree.
    """

    release: Release
    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    rollback_ok: tuple[Release, ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What the channel document of `intent` says about this model; None as `stable` = nothing any more."""

    intent: int
    stable: Goal | None
    candidate: Goal | None = None
    wave: float = 1.0
    share: float = 0.0
    salt: str = ""
    rollback: bool = False
    disagreement_max: float = 1.0


class BanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quarantined manifest, as stored."""

    sha256: Sha256
    release: Release
    intent: int
    salt: str
    reason: str


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one model's machine must not forget; each journal record holds all of it, so that the last one is enough.

    Attributes:
        intent: newest document obeyed.
        committed: release that passed probation as stable; also the floor of the release counter.
        rollback_ok: where a signed rollback from `committed` may return.
        gated: manifest digests of the installed releases that passed the gate, by release in decimal.
        goal, slot: what is being installed or tried, and as what.
        previous: pointer to return to; present from ACTIVATE until COMMIT or the end of ROLLBACK.
        boots: starts of the agent, or silent probations, since the goal was activated; those after an orderly end do
            not count.
        delta_failed: manifest digest of the goal whose delta failed; it is not tried with deltas again.
    """

    model: ModelName
    state: State = State.IDLE
    intent: int = 0
    committed: Release | None = None
    rollback_ok: tuple[Release, ...] = ()
    gated: dict[str, Sha256] = {}
    goal: Goal | None = None
    slot: Slot = "stable"
    previous: Pointer | None = None
    boots: int = 0
    bans: tuple[BanRecord, ...] = ()
    delta_failed: Sha256 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """Bounds of one machine; seconds. The shell fills it from its configuration.

    Attributes:
        apply_spread_s: a new stable release is activated within this time, each node at its own moment.
        retry_after_s_max: how long a source that asks for a pause is obeyed at most.
        on_delta_failure: what follows a failed delta: the `full` file, the same again (`retry`), or nothing (`fail`).
        metered: a failed delta is never followed by the full file.
    """

    check_s: float = 60.0
    plan_s: float = 10.0
    fetch_s: float = 3600.0
    patch_s: float = 300.0
    verify_s: float = 300.0
    stage_s: float = 300.0
    gate_s: float = 120.0
    activate_s: float = 60.0
    probation_s: float = 5.0
    backoff_base_s: float = 1.0
    backoff_cap_s: float = 300.0
    apply_spread_s: float = 0.0
    retry_after_s_max: float = 600.0
    on_delta_failure: DeltaFailurePolicy = "full"
    metered: bool = False
    boots_max: int = 2
    error_share_max: float = 0.2
    errors_min: int = 5
    p99_factor_max: float = 2.0
    p99_slack_us: float = 10_000.0
    answers_min: int = 200
    disagreement_share_max: float = 1.0
    compared_min: int = 50
    probation_requests: int = 1_000
    bans_max: int = 64

    @property
    def full_refusal(self) -> str:
        """Why the full file may not follow a failed delta; "" = it may."""
        if self.on_delta_failure == "full" and not self.metered:
            return ""
        setting = "`metered`" if self.metered else "`on_delta_failure`"
        return f"The delta failed, and {setting} forbids the full file; allow it, or push a new release."

    def of(self, state: State) -> float:
        """Seconds that a working state may last."""
        return {
            State.CHECK: self.check_s,
            State.PLAN: self.plan_s,
            State.FETCH: self.fetch_s,
            State.PATCH: self.patch_s,
            State.VERIFY: self.verify_s,
            State.STAGE: self.stage_s,
            State.GATE: self.gate_s,
            State.SPREAD: self.apply_spread_s,
            State.ACTIVATE: self.activate_s,
            State.ROLLBACK: self.activate_s,
            State.PROBATION: self.probation_s,
        }[state]
