"""Dynamic batching as a state machine: what waits, what runs together, why it was released.

Pure: it knows neither tensors nor time of its own. The shell says what happened (`add`, `cancel`, `finish`, `tick`) and
does what it is told (`Run`, `Refuse`, `Expire`). Rows are counted, not requests. With `window_s` 0 batching is natural:
a request never waits for company, but whatever gathers while the engines are busy leaves together (the way Nagle's
algorithm gathers bytes behind an unacknowledged segment, RFC 896).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason: TypeAlias = Literal["full", "window", "idle"]
"""Why a batch left: no room for the next one, the oldest had waited long enough, or an engine was free anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """Bounds of one batcher. A request of more than `rows_max` rows runs alone; `engines` batches run at once."""

    rows_max: int = 32
    window_s: float = 0.0
    queue_rows_max: int = 256
    engines: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """Run these requests together, in this order. Answer with `finish` when the engine is free again."""

    ids: tuple[int, ...]
    rows: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refuse:
    """The queue has no room for this request."""

    id: int


@dataclass(frozen=True, slots=True)
class Expire:
    """The deadlines of these requests passed while they waited."""

    ids: tuple[int, ...]


Instruction: TypeAlias = Run | Refuse | Expire


@dataclass(frozen=True, slots=True)
class _Entry:
    rows: int
    key: Hashable
    arrived: float
    deadline: float | None


class Batcher:
    """Requests in, batches out; first come, first served among requests that fit together (equal `key`)."""

    def __init__(self, config: BatchingConfig) -> None:
        self._config = config
        self._waiting: dict[int, _Entry] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._rows = 0
        self._running = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def rows_waiting(self) -> int:
        """Rows in the queue."""
        return self._rows

    @property
    def running(self) -> int:
        """Batches that were released and have not finished."""
        return self._running

    def add(
        self, now: float, request_id: int, rows: int, *, key: Hashable = (), deadline: float | None = None
    ) -> tuple[Instruction, ...]:
        """A request arrived. `request_id` is new; `key` names what it can be joined with.

        A request without rows counts as one, since it costs a run all the same.
        """
        rows = max(1, rows)
        if deadline is not None and deadline <= now:
            return (Expire((request_id,)),)
        if self._waiting and self._rows + rows > self._config.queue_rows_max:
            expired = self._expire(now)
            if self._waiting and self._rows + rows > self._config.queue_rows_max:
                return (*expired, Refuse(request_id))
            return (*expired, *self._enqueue(now, request_id, _Entry(rows, key, now, deadline)))
        return self._enqueue(now, request_id, _Entry(rows, key, now, deadline))

    def cancel(self, request_id: int) -> bool:
        """Nobody waits for this request any more; False if it has left the queue already."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return False
        self._rows -= entry.rows
        return True

    def finish(self, now: float) -> tuple[Instruction, ...]:
        """A batch has left its engine."""
        assert self._running > 0
        self._running -= 1
        return self.tick(now)

    def tick(self, now: float) -> tuple[Instruction, ...]:
        """Time has passed: at `next_wake` at the latest."""
        instructions: list[Instruction] = [*self._expire(now)]
        while self._waiting and self._running < self._config.engines:
            run = self._form(now)
            if run is None:
                break
            instructions.append(run)
        return tuple(instructions)

    def next_wake(self) -> float | None:
        """The instant at which `tick` has something to do; None = not before the next event."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        wake = self._deadlines[0][0] if self._deadlines else None
        if self._waiting and self._running < self._config.engines:
            window = next(iter(self._waiting.values())).arrived + self._config.window_s
            wake = window if wake is None else min(wake, window)
        return wake

    def _enqueue(self, now: float, request_id: int, entry: _Entry) -> tuple[Instruction, ...]:
        assert request_id not in self._waiting
        self._waiting[request_id] = entry
        self._rows += entry.rows
        if entry.deadline is not None:
            heapq.heappush(self._deadlines, (entry.deadline, request_id))
        return self.tick(now) if self._running < self._config.engines else ()

    def _expire(self, now: float) -> tuple[Expire, ...]:
        expired: list[int] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request_id = heapq.heappop(self._deadlines)[1]
            if self.cancel(request_id):
                expired.append(request_id)
        return (Expire(tuple(expired)),) if expired else ()

    def _form(self, now: float) -> Run | None:
        """The next batch: the oldest request and, in order, those behind it that fit; None while it should wait."""
        oldest = next(iter(self._waiting.values()))
        ids: list[int] = []
        rows, full = 0, False
        for request_id, entry in self._waiting.items():
            if entry.key != oldest.key:
                continue
            if ids and rows + entry.rows > self._config.rows_max:
                full = True
                break
            ids.append(request_id)
            rows += entry.rows
            if rows >= self._config.rows_max:
                full = True
                break
        if not full and now < oldest.arrived + self._config.window_s:
            return None
        for request_id in ids:
            self.cancel(request_id)
        self._running += 1
        reason: Reason = "full" if full else "window" if self._config.window_s > 0 else "idle"
        return Run(tuple(ids), rows, reason)
