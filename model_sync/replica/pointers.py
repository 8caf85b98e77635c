"""The pointer before and after each kind of change. All functions are total: any pointer in, a valid one out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from model_sync.replica.reconcile import Aim
from model_sync.replica.state import Goal, Memory, Want
from nearcast.store.pointer import Pointer


def adopt(pointer: Pointer, memory: Memory, installed: Mapping[int, str]) -> Memory:
    """What is remembered beside this pointer: without a journal, what it serves was gated and committed."""
    committed, gated = memory.committed, dict(memory.gated)
    if committed is None and memory.previous is None:
        committed = pointer.stable
        for release in (pointer.stable, pointer.last_good):
            if release is not None and release in installed:
                gated[str(release)] = installed[release]
    return replace(memory, committed=committed, gated=gated, intent=max(memory.intent, pointer.intent))


def follow(pointer: Pointer, want: Want, aim: Aim) -> Pointer:
    """After all that needs no installation and no trial: shares, salt, a dropped candidate, the intent."""
    if pointer.stable is None:
        return pointer
    kept = aim.candidate is not None and aim.candidate.release == pointer.candidate
    in_place = want.stable is None or (aim.stable is not None and aim.stable.release == pointer.stable)
    return replace(
        pointer,
        candidate=pointer.candidate if kept else None,
        share=want.share if kept else 0.0,
        salt=want.salt,
        intent=max(pointer.intent, want.intent) if in_place else pointer.intent,
    )


def activate(pointer: Pointer, memory: Memory, goal: Goal, want: Want | None, installed: Collection[int]) -> Pointer:
    """With `goal` on trial in the slot that `memory` names; the committed release becomes `last_good`."""
    share, salt = (want.share, want.salt) if want is not None else (pointer.share, pointer.salt)
    intent = max(pointer.intent, want.intent if want is not None else 0)
    if memory.slot == "candidate":
        return replace(pointer, candidate=goal.release, share=share, salt=salt, intent=intent)
    candidate = pointer.candidate if pointer.candidate != goal.release else None
    if want is not None and (want.candidate is None or want.candidate.release != candidate):
        candidate = None
    good = memory.committed
    if good == goal.release:  # a trial is given up and the committed release itself returns
        good = memory.previous.last_good if memory.previous is not None else pointer.last_good
    return Pointer(
        stable=goal.release,
        candidate=candidate,
        share=share if candidate is not None else 0.0,
        salt=salt,
        last_good=good if good in installed and good != goal.release else None,
        intent=intent,
    )


def give_back(pointer: Pointer, memory: Memory) -> Pointer:
    """As before the trial of the goal in `memory`; the intent does not fall, so that readers see a newer word."""
    base = pointer if memory.slot == "candidate" or memory.previous is None else memory.previous
    failed = memory.goal.release if memory.goal is not None else None
    is_banned = memory.goal is not None and any(ban.sha256 == memory.goal.sha256 for ban in memory.bans)
    candidate = base.candidate if base.candidate != failed else None
    return replace(
        base,
        candidate=candidate,
        share=base.share if candidate is not None else 0.0,
        last_good=None if is_banned and base.last_good == failed else base.last_good,
        intent=pointer.intent,
    )


def repair(pointer: Pointer, memory: Memory, installed: Collection[int]) -> Pointer:
    """Without releases whose folder is gone or damaged: `last_good` or the committed release step in for `stable`."""
    stable = pointer.stable
    for stand_in in (pointer.last_good, memory.committed, None):
        if stable in installed:
            break
        stable = stand_in
    candidate = pointer.candidate if pointer.candidate in installed and pointer.candidate != stable else None
    candidate = candidate if stable is not None else None
    return replace(
        pointer,
        stable=stable,
        last_good=pointer.last_good if pointer.last_good in installed and pointer.last_good != stable else None,
        candidate=candidate,
        share=pointer.share if candidate is not None else 0.0,
    )


def without(pointer: Pointer, release: int) -> Pointer:
    """With nothing falling back to or trying `release`."""
    candidate = None if pointer.candidate == release else pointer.candidate
    return replace(
        pointer,
        candidate=candidate,
        share=pointer.share if candidate is not None else 0.0,
        last_good=None if pointer.last_good == release else pointer.last_good,
    )


def kept_releases(pointer: Pointer, memory: Memory, want: Want | None) -> frozenset[int]:
    """What garbage collection leaves: what is served, what can be fallen back to, what is wanted."""
    pointers = [pointer, memory.previous or pointer]
    releases = {one for p in pointers for one in (p.stable, p.candidate, p.last_good)}
    banned = {ban.sha256 for ban in memory.bans}
    goals = [memory.goal, *((want.stable, want.candidate) if want is not None else ())]
    releases |= {goal.release for goal in goals if goal is not None and goal.sha256 not in banned}
    return frozenset(one for one in (*releases, memory.committed) if one is not None)
