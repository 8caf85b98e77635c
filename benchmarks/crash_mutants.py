"""Agents with one mistake each, made from the trace of the real one: the judgement must find every mistake.

A trace says exactly what an agent without a certain line would have done: the same calls, but for those of that line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from benchmarks.crash_explore import first_fault
from benchmarks.crash_points import AGENT, JOURNAL, METADATA, STORE
from benchmarks.crash_scenario import Recording
from benchmarks.crash_trace import Call
from model_sync.agent.journal import decode_record
from model_sync.replica.state import State
from tests.integration.agent_parts import MODEL

MODEL_FOLDER = f"{STORE}/{MODEL}"
POINTER = f"{MODEL_FOLDER}/serving.json"
NOTHING = Call(name="nothing", path="")
AROUND = 14
"""Calls before and after a changed one at which a power cut is tried."""
PLACES = 12
"""Changed places that are tried, evenly over the trace."""
PER_POSITION = 6
Mutate: TypeAlias = Callable[[Sequence[Call]], list[Call]]


def without_sync(concerns: Callable[[str], bool]) -> Mutate:
    """An agent that forgets the fsync of these paths."""

    def mutate(calls: Sequence[Call]) -> list[Call]:
        return [NOTHING if call.name == "sync" and concerns(call.path) else call for call in calls]

    return mutate


def in_place(path: str) -> Mutate:
    """An agent that writes this file itself instead of replacing it."""

    def mutate(calls: Sequence[Call]) -> list[Call]:
        made: list[Call] = []
        for call in calls:
            if not is_replacement(call.path, path):
                made.append(call)
            elif call.name == "rename":
                made.append(NOTHING)
            else:
                made.append(replace(call, path=path, truncates=call.name == "open"))
        return made

    return mutate


def record_late(*states: State) -> Mutate:
    """An agent that does what a journal record announces first, and writes the record then."""

    def mutate(calls: Sequence[Call]) -> list[Call]:
        made = list(calls)
        for start in [at for at, call in enumerate(calls) if _announces(call, states)]:
            end = _end_of_deed(calls, start)
            block = [at for at in range(start - 2, start + 2) if at >= 0 and calls[at].path == JOURNAL]
            rest = [calls[at] for at in range(block[0], end) if at not in block]
            made[block[0] : end] = [*rest, *(calls[at] for at in block)]
        return made

    return mutate


def _announces(call: Call, states: tuple[State, ...]) -> bool:
    record = decode_record(call.data.rstrip(b"\n")) if call.name == "write" and call.path == JOURNAL else None
    return record is not None and record.state in states


def _end_of_deed(calls: Sequence[Call], start: int) -> int:
    """Behind the pointer or the removals that follow a record: the next status says that all is done."""
    for at in range(start + 1, len(calls)):
        if calls[at].path.startswith(f"{AGENT}/.status.json"):
            return at
    return len(calls)


def is_replacement(path: str, of: str) -> bool:
    """Whether `path` is the file that is going to replace `of`."""
    folder, _, name = of.rpartition("/")
    return path.startswith(f"{folder}/.{name}.")


def is_staged_file(path: str) -> bool:
    """Whether it is a file below the staging folder."""
    return path.startswith(f"{STORE}/.staging/") and path.count("/") > 3


MUTANTS: dict[str, tuple[Mutate, bool]] = {
    "the pointer's folder is not synced": (without_sync(lambda path: path == MODEL_FOLDER), False),
    "the pointer's bytes are not synced": (without_sync(lambda path: is_replacement(path, POINTER)), False),
    "the pointer is written in place": (in_place(POINTER), False),
    "the journal is compacted in place": (in_place(JOURNAL), False),
    "the journal is not synced": (without_sync(lambda path: path == JOURNAL), False),
    "files are committed before they are synced": (without_sync(is_staged_file), False),
    "the metadata is not synced": (without_sync(lambda path: path.startswith(METADATA)), False),
    "the store's own name is not synced": (without_sync(lambda path: path == ""), False),
    "the pointer is written before the journal": (record_late(State.ACTIVATE), True),
}
"""What was done wrong → the change, and whether it reorders: then only what the mutant itself promised counts."""


def first_fault_of(name: str, recording: Recording, folder: Path) -> str:
    """The first violation that a mutant is found out by, "" if it goes unnoticed."""
    mutate, reorders = MUTANTS[name]
    calls = mutate(recording.calls)
    changed = [at for at, call in enumerate(calls) if call != recording.calls[at]]
    near = {at + step for at in _spread(changed) for step in range(-2, AROUND)} | {*_spread(range(len(calls)))}
    return first_fault(recording, calls, near, calls if reorders else recording.calls, folder, per=PER_POSITION)


def _spread(places: Sequence[int]) -> Sequence[int]:
    return places[:: max(1, len(places) // PLACES)]
