"""Remembering which manifests failed here, under which document, so that they are not tried again by themselves."""

from __future__ import annotations

from msgspec.structs import replace

from model_sync.replica.state import BanRecord, Goal, Memory, Want
from nearcast.store.pointer import Pointer


def ban(memory: Memory, goal: Goal, want: Want | None, pointer: Pointer, reason: str, bans_max: int) -> Memory:
    """The memory with `goal` in quarantine; the oldest ban goes when there are more than `bans_max`."""
    record = BanRecord(
        sha256=goal.sha256,
        release=goal.release,
        intent=max(memory.intent, want.intent if want is not None else 0),
        salt=want.salt if want is not None else pointer.salt,
        reason=reason,
    )
    others = tuple(old for old in memory.bans if old.sha256 != goal.sha256)
    gated = {release: sha256 for release, sha256 in memory.gated.items() if sha256 != goal.sha256}
    return replace(memory, bans=(*others, record)[-bans_max:], gated=gated)
