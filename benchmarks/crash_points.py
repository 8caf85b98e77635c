"""Where a trace is: which crash point comes next, and what must not be lost any more.

The points are the boundaries between the states of an installation: C1 follows CHECK, C2 PLAN, C3 FETCH, C4 PATCH, C5
VERIFY, C6 STAGE, C7 GATE, C8 ACTIVATE, C9 PROBATION, C10 COMMIT, C11 the collection, C12 the return to the last good
release. A call belongs to the point that ends the state in which it was made; states are read from what the agent
itself writes, its status and its journal.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from benchmarks.crash_disk import Disk, Image
from benchmarks.crash_trace import Call
from model_sync.agent.journal import decode_record
from model_sync.agent.status import AgentStatus
from model_sync.replica.state import Memory, State
from nearcast.store import Pointer

STORE = "store"
AGENT = f"{STORE}/.agent"
JOURNAL = f"{AGENT}/journal"
STATUS = f"{AGENT}/status.json"
METADATA = f"{AGENT}/metadata"
ROOTS = f"{METADATA}/root_history"
POINTS = tuple(f"C{number}" for number in range(1, 13))
POINT_OF = {
    State.CHECK: "C1",
    State.PLAN: "C2",
    State.FETCH: "C3",
    "PATCH": "C4",
    State.VERIFY: "C5",
    State.STAGE: "C6",
    State.GATE: "C7",
    State.ACTIVATE: "C8",
    State.PROBATION: "C9",
    State.COMMIT: "C10",
    State.ROLLBACK: "C12",
}
ELSEWHERE = "C11"
"""Idle, holding, collecting: after the report of one installation and before the next check."""


@dataclass(slots=True)
class Known:
    """What one position promises; sequences hold what was written so far, counts how much of it may not be lost."""

    index: int = -1
    point: str = ELSEWHERE
    records: list[Memory] = field(default_factory=list)
    records_durable: int = 0
    pointers: list[Pointer] = field(default_factory=list)
    pointers_durable: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    staged_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def promise(self) -> tuple[object, ...]:
        """What an image is judged by; the same image may be fine at first and a loss later."""
        return self.records_durable, self.pointers_durable, *sorted(self.versions.items())

    @property
    def is_committed(self) -> bool:
        """Whether a first release was committed for good: from then on the node always serves."""
        durable = self.records[: self.records_durable]
        return self.pointers_durable > 0 and any(record.committed is not None for record in durable)


def positions(calls: Sequence[Call], model: str) -> Iterator[Known]:
    """What is known after each call."""
    disk, known, state = Disk(), Known(), ""
    pointer, folder = f"{STORE}/{model}/serving.json", f"{STORE}/{model}"
    for index, call in enumerate(calls):
        disk.apply(call)
        known.index = index
        if call.name == "write" and call.path == JOURNAL:
            records = [record for record in map(decode_record, call.data.split(b"\n")) if record is not None]
            known.records += [record for record in records if record.model == model]
            state = records[-1].state if records and records[-1].state in _PASSING else state
        elif call.name == "sync" and call.path == JOURNAL:
            known.records_durable = len(known.records)
        elif call.name == "rename" and call.other == pointer:
            known.pointers.append(msgspec.json.decode(disk.read(pointer) or b"", type=Pointer))
        elif call.name == "sync" and call.path == folder:
            known.pointers_durable = len(known.pointers)
        elif call.name == "rename" and call.other == STATUS:
            status = msgspec.json.decode(disk.read(STATUS) or b"", type=AgentStatus)
            state = status.models[model].state if model in status.models else state
            if status.serial > known.versions.get("timestamp", 0):
                known.versions = versions_of(next(disk.images(0)))
        elif call.name == "write" and call.path.startswith(f"{STORE}/.staging/"):
            known.staged_bytes[call.path] = len(disk.read(call.path) or b"")
        known.point = POINT_OF.get(state, ELSEWHERE)
        yield known


_PASSING = (State.COMMIT, State.ROLLBACK)


def versions_of(image: Image) -> dict[str, int]:
    """Version of each role in the metadata folder; of root the last one of an unbroken walk from the first."""
    found, roots = {}, set()
    for path, content in image.items():
        if not isinstance(content, bytes) or not path.startswith(f"{METADATA}/") or not path.endswith(".json"):
            continue
        name = path[len(METADATA) + 1 : -len(".json")]
        try:
            version = int(json.loads(content)["signed"]["version"])
        except (ValueError, KeyError, TypeError):
            continue
        if name.startswith("root_history/"):
            roots.add(version)
        else:
            found[name] = version
    return found | {"root": next(number for number in itertools.count() if number + 1 not in roots)}
