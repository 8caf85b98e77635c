"""What a channel document means for one node: which of its goals are admitted here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model_sync.replica.state import Goal, Memory, Want
from model_sync.replica.wave import in_wave
from model_sync.trust.admission import Ban, Standing, require_not_banned, require_not_older
from nearcast.errors import Code, MeshError
from nearcast.store.pointer import Pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The goals of a document that this node pursues, and in words why it refused one ("" = none refused)."""

    stable: Goal | None
    candidate: Goal | None
    refusal: str = ""


def aim_of(want: Want, memory: Memory, pointer: Pointer, installed: Mapping[int, str], node: str) -> Aim:
    """Admit the goals of `want` one by one; a refused one never hinders the other."""
    refusals: list[str] = []
    standing = Standing(
        floor=memory.committed or 0,
        stable=memory.committed,
        last_good=pointer.last_good,
        rollback_ok=memory.rollback_ok,
    )

    def admit(goal: Goal | None) -> Goal | None:
        if goal is None:
            return None
        try:
            _admit(goal, want, memory, standing, installed)
        except MeshError as error:
            refusals.append(error.message)
            return None
        return goal

    stable = admit(want.stable)
    candidate = want.candidate if in_wave(node, want.salt, want.wave) else None
    answering = stable.release if stable is not None else pointer.stable or memory.committed
    if candidate is not None and candidate.release == answering:
        candidate = None
    candidate = admit(candidate)
    return Aim(stable=stable, candidate=candidate, refusal=" ".join(refusals))


def _admit(goal: Goal, want: Want, memory: Memory, standing: Standing, installed: Mapping[int, str]) -> None:
    if goal.refusal:
        raise MeshError(Code.UNTRUSTED, goal.refusal)
    require_not_older(memory.model, goal.release, standing, rollback=want.rollback)
    bans = [
        Ban(sha256=one.sha256, release=one.release, intent=one.intent, salt=one.salt, reason=one.reason)
        for one in memory.bans
    ]
    require_not_banned(memory.model, goal.sha256, bans, intent=want.intent, salt=want.salt)
    if installed.get(goal.release, goal.sha256) != goal.sha256:
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused {memory.model} release {goal.release}: it is installed with another manifest, and releases never "
            "change; push a new release.",
        )
