"""A node that serves no models itself, such as a stand-alone router, only follows the channel with its pointer."""

from __future__ import annotations

from msgspec.structs import replace

from model_sync.replica.reconcile import aim_of
from model_sync.replica.state import Memory, Want
from nearcast.store.pointer import Pointer


def follow_channel(memory: Memory, pointer: Pointer, want: Want) -> tuple[Memory, Pointer, str]:
    """The memory and the pointer that `want` leads to, and why a goal was refused ("" = none was).

    The candidate counts whatever the wave: some node has it, and the router has to split for that one.
    """
    if want.intent < memory.intent:
        return memory, pointer, f"Refused intent {want.intent}: intent {memory.intent} is obeyed."
    everywhere = Want(
        intent=want.intent,
        stable=want.stable,
        candidate=want.candidate,
        wave=1.0,
        share=want.share,
        salt=want.salt,
        rollback=want.rollback,
    )
    aim = aim_of(everywhere, memory, pointer, {}, node="")
    stable = aim.stable.release if aim.stable is not None else pointer.stable
    candidate = aim.candidate.release if aim.candidate is not None and stable is not None else None
    last_good = pointer.stable if stable != pointer.stable else pointer.last_good
    new = Pointer(
        stable=stable,
        candidate=candidate,
        share=want.share if candidate is not None else 0.0,
        salt=want.salt,
        last_good=last_good,
        intent=want.intent if aim.stable is not None or want.stable is None else pointer.intent,
    )
    if aim.stable is not None:
        memory = replace(memory, committed=aim.stable.release, rollback_ok=aim.stable.rollback_ok)
    return replace(memory, intent=want.intent), new, aim.refusal
