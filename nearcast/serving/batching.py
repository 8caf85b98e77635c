"""Dynamic batching as a state machine: what waits, what runs together, what is refused, why a batch was released.

Pure: it knows neither tensors nor time of its own. The shell says what happened (`add`, `cancel`, `finish`, `tick`) and
does what it is told (`Run`, `Refuse`, `Expire`). Rows are counted, not requests. By default batching is natural: a
request never waits for company, but whatever gathers while the engines are busy leaves together (the way Nagle's
algorithm gathers bytes behind an unacknowledged segment, RFC 896). A learnt window makes it wait only where that makes
everybody faster, `service_curve.best_window_s`.

Order: by arrival, where each priority level below the highest counts as `priority_age_s` of arriving later. So a
request of level p is overtaken only by what arrives within (p - 1) x `priority_age_s` after it, and nothing starves.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable
from typing import Literal, TypeAlias

import msgspec

from nearcast.serving.service_curve import ServiceCurve, best_window_s

Reason: TypeAlias = Literal["full", "window", "idle", "deadline", "alone"]
"""Why a batch left: no room for the next one, the oldest had waited long enough, an engine was free anyway, one more
row would have made somebody late, or joining rows saves nothing with this model."""
Why: TypeAlias = Literal["full", "displaced", "late", "hopeless"]
"""Why a request was refused: no room; a more important one took its place; it would miss its deadline now; it would
miss it even alone."""

_HISTORY_MAX = 64
"""Deadlines of what is over that may stay in the heap: far ones would gather there."""
_NEVER = float("inf")
_MARGIN = 0.5
"""What is to wait must have so much more time than its run needs. With less it is refused after all when a run before
it takes longer, and that has to be known at once; with more the engine waits for work (`benchmarks ar`, virtual)."""
_LIKELY = 0.5
"""Who need not wait, or has waited already, runs if it is likelier to be in time than not: to be surer of that would
leave an engine idle where run times stray far."""
_GAP_WEIGHT = 0.1
_SAVING_MIN = 0.05
"""Rows are joined if the cost of a run that does not depend on its rows is at least this share of a lone row's."""


class BatchingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one batcher. A request of more than `rows_max` rows runs alone; `engines` batches run at once.

    Attributes:
        window_s_max: longest that a request is kept waiting for company; 0 = never.
        priority_levels: 1 is the highest; a request of level 0, or beyond the lowest, has `priority_default`.
        priority_age_s: what one level is worth.
        late_quantile: what would have to wait is refused if it would miss its deadline at this quantile of the
            measured run times, and what need not at the median, if that is lower; 0 = never.
    """

    rows_max: int = 32
    queue_rows_max: int = 256
    queue_bytes_max: int = 64 * 1024 * 1024
    engines: int = 1
    window_s_max: float = 0.0
    priority_levels: int = 3
    priority_default: int = 2
    priority_age_s: float = 1.0
    late_quantile: float = 0.0


class Run(msgspec.Struct, frozen=True):
    """Run these requests together, in this order. Answer with `finish(ids[0])` when the engine is free again."""

    ids: tuple[int, ...]
    rows: int
    reason: Reason


class Refuse(msgspec.Struct, frozen=True):
    """Do not run this request. In `retry_s` seconds it would have a chance; None = not even then."""

    id: int
    why: Why
    retry_s: float | None


class Expire(msgspec.Struct, frozen=True):
    """The deadlines of these requests passed while they waited or ran; what runs goes on for nobody."""

    ids: tuple[int, ...]


Instruction: TypeAlias = Run | Refuse | Expire


class _Entry(msgspec.Struct, frozen=True):
    rows: int
    size_bytes: int
    key: Hashable
    arrived: float
    rank: float
    deadline: float | None


class Batcher:
    """Requests in, batches out; in the order of their ranks among requests that fit together (equal `key`).

    Attributes:
        curve: what runs take, from `add` with an engine free to `finish`.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.curve = ServiceCurve()
        self._config = config
        self._waiting: dict[int, _Entry] = {}
        self._order: list[tuple[float, int]] = []
        self._deadlines: list[tuple[float, int]] = []
        self._rows = 0
        self._bytes = 0
        # By the first id of each batch: when it left, its rows, its requests.
        self._running: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        # Deadlines of what waits or runs: a heap entry without one here is history.
        self._open: dict[int, float] = {}
        self._release_at: float | None = None
        self._arrived: float | None = None
        self._gap_s = _NEVER

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def rows_waiting(self) -> int:
        """Rows in the queue."""
        return self._rows

    @property
    def bytes_waiting(self) -> int:
        """Bytes in the queue."""
        return self._bytes

    @property
    def running(self) -> int:
        """Batches that were released and have not finished."""
        return len(self._running)

    @property
    def window_s(self) -> float:
        """How long a lone request is kept waiting for company now."""
        if not self._config.window_s_max or not self.curve.knows_rows:
            return 0.0
        return min(self._config.window_s_max, best_window_s(self.curve.fixed_s, self.curve.row_s, self._gap_s))

    def add(
        self,
        now: float,
        request_id: int,
        rows: int,
        *,
        key: Hashable = (),
        deadline: float | None = None,
        priority: int = 0,
        size_bytes: int = 0,
    ) -> tuple[Instruction, ...]:
        """A request arrived. `request_id` is new; `key` names what it can be joined with.

        A request without rows counts as one, since it costs a run all the same.
        """
        assert request_id not in self._waiting
        config = self._config
        if deadline is not None and deadline <= now:
            return (Expire((request_id,)),)
        if config.window_s_max:
            self._note_arrival(now)
        level = priority if 1 <= priority <= config.priority_levels else config.priority_default
        rank = now + (level - 1) * config.priority_age_s
        entry = _Entry(max(1, rows), size_bytes, key, now, rank, deadline)
        instructions: list[Instruction] = []
        if self._waiting and self._overflows(entry):
            instructions += self._expire(now)
            if not self._make_room(now, entry, instructions):
                return (*instructions, Refuse(request_id, "full", self._next_free_s(now)))
        refusal = self._refuse_late(now, request_id, entry)
        if refusal is not None:
            return (*instructions, refusal)
        self._waiting[request_id] = entry
        insort(self._order, (rank, request_id))
        self._rows += entry.rows
        self._bytes += size_bytes
        if deadline is not None:
            self._open[request_id] = deadline
            heapq.heappush(self._deadlines, (deadline, request_id))
            if len(self._deadlines) > _HISTORY_MAX + 2 * len(self._open):
                self._deadlines = [(at, one) for one, at in self._open.items()]
                heapq.heapify(self._deadlines)
        if len(self._running) < config.engines:
            instructions += self.tick(now)
        return tuple(instructions)

    def cancel(self, request_id: int) -> bool:
        """Nobody waits for this request any more; False if it has left the queue already."""
        self._open.pop(request_id, None)
        return self._take(request_id) is not None

    def is_running(self, request_id: int) -> bool:
        """Whether the request is in a batch that was released and has not finished."""
        return any(request_id in ids for _, _, ids in self._running.values())

    def finish(self, now: float, run_id: int, *, ran: bool = True) -> tuple[Instruction, ...]:
        """The batch whose first request is `run_id` has left its engine; `ran` False = without a real run."""
        started, rows, ids = self._running.pop(run_id)
        for request_id in ids:
            self._open.pop(request_id, None)
        if ran:
            self.curve.add(now, rows, max(0.0, now - started))
        return self.tick(now)

    def tick(self, now: float) -> tuple[Instruction, ...]:
        """Time has passed: at `next_wake` at the latest."""
        instructions: list[Instruction] = [*self._expire(now)]
        self._release_at = None
        while self._waiting and len(self._running) < self._config.engines:
            run = self._form(now, instructions)
            if run is not None:
                instructions.append(run)
            elif self._release_at is not None:
                break
        return tuple(instructions)

    def next_wake(self) -> float | None:
        """The instant at which `tick` has something to do; None = not before the next event."""
        while self._deadlines and self._open.get(self._deadlines[0][1]) != self._deadlines[0][0]:
            heapq.heappop(self._deadlines)
        wake = self._deadlines[0][0] if self._deadlines else None
        if self._release_at is not None and self._waiting and len(self._running) < self._config.engines:
            wake = self._release_at if wake is None else min(wake, self._release_at)
        return wake

    def wait_s(self, now: float) -> float | None:
        """How long a request that arrives now, last in rank, would wait for its run; None = unknown."""
        return self._start_s(now, self._rows, 0.5) if self.curve.is_known else None

    # Coming in.

    def _note_arrival(self, now: float) -> None:
        if self._arrived is not None:
            gap_s = now - self._arrived
            self._gap_s = gap_s if self._gap_s == _NEVER else self._gap_s + _GAP_WEIGHT * (gap_s - self._gap_s)
        self._arrived = now

    def _overflows(self, entry: _Entry, rows: int = 0, size_bytes: int = 0) -> bool:
        """Whether the queue without so many rows and bytes has no room for another request."""
        config = self._config
        return (
            self._rows - rows + entry.rows > config.queue_rows_max
            or self._bytes - size_bytes + entry.size_bytes > config.queue_bytes_max
        )

    def _make_room(self, now: float, entry: _Entry, instructions: list[Instruction]) -> bool:
        """Refuse the last in rank until the newcomer fits, if that is enough; else leave all as it is."""
        rows = size_bytes = count = 0
        for rank, request_id in reversed(self._order):
            if not self._overflows(entry, rows, size_bytes) or rank <= entry.rank:
                break
            rows += self._waiting[request_id].rows
            size_bytes += self._waiting[request_id].size_bytes
            count += 1
        if count < len(self._order) and self._overflows(entry, rows, size_bytes):
            return False
        for _, request_id in self._order[len(self._order) - count :]:
            self.cancel(request_id)
            instructions.append(Refuse(request_id, "displaced", self._next_free_s(now)))
        return True

    def _refuse_late(self, now: float, request_id: int, entry: _Entry) -> Refuse | None:
        quantile = self._config.late_quantile
        if entry.deadline is None or not quantile or not self.curve.is_known or self._may_try(now):
            return None
        if now + self.curve.quantile_s(entry.rows, min(_LIKELY, quantile)) > entry.deadline:
            return Refuse(request_id, "hopeless", None)
        if not self._waiting and len(self._running) < self._config.engines:
            return None
        place = bisect_left(self._order, (entry.rank, request_id))
        ahead = self._rows
        if place < len(self._order):
            ahead -= sum(self._waiting[behind].rows for _, behind in self._order[place:])
        cap = self._rows_cap()
        start_s = self._start_s(now, ahead // cap * cap, quantile)
        own_s = self.curve.quantile_s(ahead % cap + entry.rows, quantile)
        late_s = now + start_s + own_s * (1 + _MARGIN) - entry.deadline
        return Refuse(request_id, "late", late_s) if late_s > 0 else None

    # Going out.

    def _rows_cap(self) -> int:
        """Rows worth joining: all that may be, unless the curve says that a run costs what its rows cost."""
        curve = self.curve
        if curve.knows_rows and curve.fixed_s < _SAVING_MIN * (curve.fixed_s + curve.row_s):
            return 1
        return self._config.rows_max

    def _start_s(self, now: float, rows: int, quantile: float) -> float:
        """Seconds until an engine is free, after those that run and `rows` more in batches as large as they may be."""
        cap = self._rows_cap()
        free = [max(0.0, left + self.curve.quantile_s(n, quantile) - now) for left, n, _ in self._running.values()]
        free = sorted([*free, *[0.0] * (self._config.engines - len(free))])
        full_s = self.curve.quantile_s(cap, quantile)
        rounds, rest = divmod(-(-rows // cap), self._config.engines)
        heapq.heapify(free)
        for _ in range(rest):
            heapq.heapreplace(free, free[0] + full_s)
        return free[0] + rounds * full_s

    def _next_free_s(self, now: float) -> float:
        """Seconds until the queue moves."""
        return self._start_s(now, 0, 0.5)

    def _expire(self, now: float) -> tuple[Expire, ...]:
        expired: list[int] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            if self._open.get(request_id) == deadline:
                self.cancel(request_id)
                expired.append(request_id)
        return (Expire(tuple(expired)),) if expired else ()

    def _form(self, now: float, instructions: list[Instruction]) -> Run | None:
        """The next batch: the first in rank and, in order, those behind it that fit; None while it should wait.

        What cannot be in time any more is refused on the way.
        """
        late, ids, rows, due, reason = self._gather(now)
        for request_id in late:
            self.cancel(request_id)
            instructions.append(Refuse(request_id, "late", self._next_free_s(now)))
        if not ids:
            return None
        if reason is None:
            reason = "idle"
            window_s = self.window_s
            # Whoever is in a hurry does not wait for company: a timer may ring late by as much as a window.
            if window_s and (due == _NEVER or due - self._own_s(now, rows) > now + 2 * window_s):
                release_at = min(self._waiting[request_id].arrived for request_id in ids) + window_s
                if now < release_at:
                    self._release_at = release_at
                    return None
                reason = "window"
        for request_id in ids:
            self._take(request_id)
        self._running[ids[0]] = (now, rows, tuple(ids))
        return Run(tuple(ids), rows, reason)

    def _gather(self, now: float) -> tuple[list[int], list[int], int, float, Reason | None]:
        """Who is late; who runs, their rows, the first deadline among them; why no more of them, None = nobody else."""
        cap, rows_max = self._rows_cap(), self._config.rows_max
        # The time of a run at the quantile, unless nobody has a deadline.
        fixed_s = self._own_s(now, 0) if self._open else 0.0
        row_s = self._own_s(now, 1) - fixed_s if self._open else 0.0
        spread, quantile = self.curve.spread, self._config.late_quantile
        likely = spread(min(_LIKELY, quantile)) / spread(quantile) if fixed_s + row_s else 0.0
        late: list[int] = []
        ids: list[int] = []
        rows, due, key = 0, _NEVER, None
        for _, request_id in self._order:
            entry = self._waiting[request_id]
            if ids and entry.key != key:
                continue
            deadline = _NEVER if entry.deadline is None else entry.deadline
            if now + (fixed_s + entry.rows * row_s) * likely > deadline:
                late.append(request_id)
                continue
            total = rows + entry.rows
            if ids and total > cap:
                return late, ids, rows, due, "full" if total > rows_max else "alone"
            due_then = min(due, deadline)
            if ids and now + fixed_s + total * row_s > due_then:
                return late, ids, rows, due, "deadline"
            ids.append(request_id)
            rows, due, key = total, due_then, entry.key
            if rows >= cap:
                return late, ids, rows, due, "full" if rows >= rows_max else "alone"
        return late, ids, rows, due, None

    def _own_s(self, now: float, rows: int) -> float:
        """Time that a run must be given; 0 while unknown, or if late work is run all the same."""
        quantile = self._config.late_quantile
        if not quantile or not self.curve.is_known or self._may_try(now):
            return 0.0
        return self.curve.quantile_s(rows, quantile)

    def _may_try(self, now: float) -> bool:
        """Whether to learn anew from one run, late as it may be; what comes meanwhile is judged as before."""
        return not self._running and not self.curve.is_fresh(now)

    def _take(self, request_id: int) -> _Entry | None:
        entry = self._waiting.pop(request_id, None)
        if entry is not None:
            del self._order[bisect_left(self._order, (entry.rank, request_id))]
            self._rows -= entry.rows
            self._bytes -= entry.size_bytes
        return entry
