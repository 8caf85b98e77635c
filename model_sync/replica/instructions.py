"""What a replica machine asks of its shell, in order. `Remember` is durable before the next begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from model_sync.replica.state import Goal, Memory, State
from nearcast.store.pointer import Pointer


@dataclass(frozen=True, slots=True)
class Remember:
    """Append to the journal and fsync."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class Run:
    """Work on one step (PLAN … GATE) of a goal, with or without `deltas`; answer `Done` or `Failed`."""

    job: int
    step: State
    goal: Goal
    deltas: bool = True


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop that job; its answer will be ignored."""

    job: int


@dataclass(frozen=True, slots=True)
class WritePointer:
    """Replace the pointer atomically and durably."""

    pointer: Pointer


@dataclass(frozen=True, slots=True)
class Refresh:
    """Tell the host to follow the pointer; answer `Loaded` once `release` is hot, or `Failed` (job 0: nothing)."""

    job: int
    release: int | None


@dataclass(frozen=True, slots=True)
class Watch:
    """Sample the host's counters of `release` until `Cancel`; answer `Sampled` each time."""

    job: int
    release: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Remove a goal's partial downloads; with `installed` also its folder."""

    goal: Goal
    installed: bool


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove the folders of all releases but these."""

    keep: frozenset[int]


Instruction: TypeAlias = Remember | Run | Cancel | WritePointer | Refresh | Watch | Discard | Collect
