"""What may happen to a channel: a pure function from the present document and a command to the next document.

The controller asks here and signs the answer; nothing else decides. A simulated controller uses the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from model_sync.rollout.document import ChannelDocument, Pick, Rollout
from nearcast.errors import Code, MeshError

Action: TypeAlias = Literal["stable", "candidate", "promote", "stop", "rollback"]

MODELS_MAX = 256
"""Models in one channel: what every agent accepts by default, so that no signed document can freeze the fleet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One wish of an operator, with the facts that decide whether it may come true.

    Attributes:
        pick: the release meant; needed by stable, candidate and rollback. For promote it must be the candidate.
        share: share of the requests for a candidate, in (0, 1].
        wave: share of the nodes that install a candidate, in (0, 1].
        salt: fresh randomness for the split of a new trial; drawn by the caller.
        newest: newest release that the models role vouches for.
        rollback_ok: releases to which the present stable release may return.
        disagreement_max: share of the shadowed inputs that a candidate may answer otherwise, in [0, 1]; None = as it
            was, and any in a new trial.
        by: who wishes it; at: when, in seconds since 1970.
    """

    channel: str
    model: str
    action: Action
    pick: Pick | None = None
    share: float = 0.0
    wave: float = 1.0
    salt: str = ""
    reason: str = ""
    newest: int = 0
    rollback_ok: frozenset[int] = frozenset()
    disagreement_max: float | None = None
    by: str = ""
    at: float = 0.0

    def require_pick(self) -> Pick:
        """The release meant.

        Raises:
            MeshError: INVALID_REQUEST if the command names none.
        """
        if self.pick is None:
            raise MeshError(Code.INVALID_REQUEST, f"The action {self.action} needs a release.")
        return self.pick


def find_rollout(document: ChannelDocument | None, model: str) -> Rollout | None:
    """What the channel says about one model; None if it says nothing."""
    rollouts = document.rollouts if document else ()
    return next((entry for entry in rollouts if entry.model == model), None)


def apply(document: ChannelDocument | None, command: Command) -> ChannelDocument:
    """The next document of the channel, its `intent` one higher. `document` None = the channel has none yet.

    Raises:
        MeshError: CONFLICT if the channel's state does not allow the action, INVALID_REQUEST if the command is
            incomplete, FORBIDDEN for a rollback to a release that nobody vouched for as a target.
    """
    if document and document.channel != command.channel:
        raise MeshError(Code.INVALID_REQUEST, f"The document is of channel {document.channel}, not {command.channel}.")
    current = find_rollout(document, command.model)
    changed = msgspec.structs.replace(_ACTIONS[command.action](current, command), by=command.by, at=command.at)
    others = [entry for entry in (document.rollouts if document else ()) if entry.model != command.model]
    if len(others) >= MODELS_MAX:
        raise MeshError(Code.CONFLICT, f"Channel {command.channel} holds {MODELS_MAX} models, which is the bound.")
    rollouts = tuple(sorted((*others, changed), key=lambda entry: entry.model))
    return ChannelDocument(channel=command.channel, intent=document.intent + 1 if document else 1, rollouts=rollouts)


def _require_current(current: Rollout | None, command: Command) -> Rollout:
    if current is None:
        raise MeshError(
            Code.CONFLICT,
            f"Channel {command.channel} has no stable release of {command.model}; make one stable first.",
        )
    return current


def _lowers(current: Rollout, pick: Pick, command: Command) -> bool:
    # A node that slept through a rollback still holds the newer release. Until the channel is back at the newest one,
    # every document must say that it lowers on purpose, or such a node would refuse it.
    return current.rollback and pick.release < command.newest


def _settle(current: Rollout, pick: Pick, command: Command) -> Rollout:
    return Rollout(
        model=command.model,
        stable=pick,
        rollback=_lowers(current, pick, command),
        disagreement_max=current.disagreement_max if pick == current.candidate else 1.0,
        reason=command.reason,
    )


def _stable(current: Rollout | None, command: Command) -> Rollout:
    pick = command.require_pick()
    if current is None:
        return Rollout(model=command.model, stable=pick, reason=command.reason)
    if current.candidate is not None:
        if current.candidate != pick:
            raise MeshError(
                Code.CONFLICT,
                f"{command.model} {current.candidate.release} is on trial in channel {command.channel}; "
                "promote or stop it first.",
            )
        return _settle(current, pick, command)
    _require_newer(current, pick, command)
    return _settle(current, pick, command)


def _require_newer(current: Rollout, pick: Pick, command: Command) -> None:
    if pick == current.stable:
        raise MeshError(Code.CONFLICT, f"Channel {command.channel} already serves {command.model} {pick.release}.")
    if pick.release <= current.stable.release:
        raise MeshError(
            Code.CONFLICT,
            f"Channel {command.channel} serves {command.model} {current.stable.release}, which is newer than "
            f"{pick.release}; use a rollback to go back.",
        )


def _candidate(current: Rollout | None, command: Command) -> Rollout:
    current = _require_current(current, command)
    pick = command.require_pick()
    if not 0.0 < command.share <= 1.0 or not 0.0 < command.wave <= 1.0:
        raise MeshError(Code.INVALID_REQUEST, "A trial needs a share and a wave above 0 and at most 1.")
    if current.candidate == pick:
        # The same trial, wider or narrower: keeping the salt keeps everyone who is in it where they are.
        return msgspec.structs.replace(
            current,
            share=command.share,
            wave=command.wave,
            disagreement_max=_differing(command, current.disagreement_max),
            reason=command.reason,
        )
    if current.candidate is not None:
        raise MeshError(
            Code.CONFLICT,
            f"{command.model} {current.candidate.release} is on trial in channel {command.channel} already; "
            "promote or stop it first.",
        )
    _require_newer(current, pick, command)
    if not command.salt:
        raise MeshError(Code.INVALID_REQUEST, "A new trial needs a salt.")
    return msgspec.structs.replace(
        current,
        candidate=pick,
        share=command.share,
        wave=command.wave,
        salt=command.salt,
        disagreement_max=_differing(command, 1.0),
        reason=command.reason,
    )


def _differing(command: Command, otherwise: float) -> float:
    return otherwise if command.disagreement_max is None else command.disagreement_max


def _require_trial(current: Rollout | None, command: Command) -> tuple[Rollout, Pick]:
    current = _require_current(current, command)
    if current.candidate is None:
        raise MeshError(
            Code.CONFLICT, f"No release of {command.model} is on trial in channel {command.channel}; nothing to do."
        )
    if command.pick is not None and command.pick != current.candidate:
        raise MeshError(
            Code.CONFLICT,
            f"{command.model} {current.candidate.release} is on trial in channel {command.channel}, "
            f"not {command.pick.release}.",
        )
    return current, current.candidate


def _promote(current: Rollout | None, command: Command) -> Rollout:
    current, candidate = _require_trial(current, command)
    return _settle(current, candidate, command)


def _end_trial(current: Rollout, command: Command) -> Rollout:
    return msgspec.structs.replace(
        current, candidate=None, share=0.0, wave=1.0, salt="", disagreement_max=1.0, reason=command.reason
    )


def _stop(current: Rollout | None, command: Command) -> Rollout:
    current, _ = _require_trial(current, command)
    return _end_trial(current, command)


def _rollback(current: Rollout | None, command: Command) -> Rollout:
    current = _require_current(current, command)
    pick = command.require_pick()
    if pick == current.stable:
        if current.candidate is None:
            raise MeshError(
                Code.CONFLICT, f"Channel {command.channel} already serves {command.model} {pick.release} alone."
            )
        return _end_trial(current, command)
    if pick.release > current.stable.release:
        raise MeshError(
            Code.CONFLICT,
            f"{command.model} {pick.release} is newer than the stable release {current.stable.release}; "
            "push it or promote it instead.",
        )
    if pick.release not in command.rollback_ok:
        allowed = ", ".join(str(release) for release in sorted(command.rollback_ok, reverse=True)) or "none"
        raise MeshError(
            Code.FORBIDDEN,
            f"{command.model} {current.stable.release} may not be rolled back to {pick.release}; allowed: {allowed}.",
        )
    return Rollout(model=command.model, stable=pick, rollback=True, reason=command.reason)


_ACTIONS: dict[Action, Callable[[Rollout | None, Command], Rollout]] = {
    "stable": _stable,
    "candidate": _candidate,
    "promote": _promote,
    "stop": _stop,
    "rollback": _rollback,
}
