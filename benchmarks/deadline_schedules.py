"""Random schedules in virtual time: the batcher itself, a simulated engine, and a shell as late as real timers are.

Each schedule is one node: arrivals (steady, in bursts or closed-loop), rows, priorities and deadlines are random; runs
stray from what they should take, some of them far, some never end. What is judged is when each request got its answer.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass

from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run

TIMER_LATE_S_MAX = 0.002
"""How late a timer of a busy loop rings here."""
STUCK_SHARE = 0.002
SLOW_SHARE = 0.02


@dataclass(slots=True)
class Outcome:
    """What became of the requests of some schedules. `latest_s`: the latest answer, from its deadline on."""

    requests: int = 0
    answered: int = 0
    refused: int = 0
    expired: int = 0
    latest_s: float = float("-inf")

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.requests + other.requests,
            self.answered + other.answered,
            self.refused + other.refused,
            self.expired + other.expired,
            max(self.latest_s, other.latest_s),
        )


def play(seed: int) -> Outcome:
    """One schedule from its seed to the last answer.

    Raises:
        AssertionError: if a request gets no answer, or two, or expired work is run.
    """
    return _Node(random.Random(seed)).play()


class _Node:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.fixed_s, self.row_s = chance.choice(((0.2, 0.0), (0.004, 0.001), (0.0, 0.01), (0.03, 0.0002)))
        self.engines = chance.choice((1, 1, 2))
        self.batcher = Batcher(
            BatchingConfig(
                rows_max=chance.choice((1, 8, 32)),
                engines=self.engines,
                queue_rows_max=chance.choice((4, 64, 256)),
                window_s_max=chance.choice((0.0, 0.001, 0.01)),
                late_quantile=chance.choice((0.0, 0.95)),
            )
        )
        self.load = chance.choice((0.3, 0.9, 1.5, 3.0))
        self.now = 0.0
        self.events: list[tuple[float, int, str, int]] = []
        self.serial = 0
        self.deadlines: dict[int, float | None] = {}
        self.open: set[int] = set()
        self.batches: dict[int, tuple[int, ...]] = {}
        self.timer = 0
        self.timer_at = 0.0
        self.outcome = Outcome()

    def play(self) -> Outcome:
        for at, request_id in self._arrivals():
            self._at(at, "add", request_id)
        while self.events:
            self.now, serial, kind, which = heapq.heappop(self.events)
            if kind == "add":
                self._add(which)
            elif kind == "finish":
                self._finish(which)
            elif serial == self.timer:
                self.timer = 0
                self._obey(self.batcher.tick(self.now))
        stuck = {request_id for request_id in self.open if self.deadlines[request_id] is None}
        assert self.open == stuck, "only who set no deadline waits for an engine that never ends"
        return self.outcome

    def _arrivals(self) -> Iterator[tuple[float, int]]:
        capacity = self.engines / (self.fixed_s + self.row_s)
        at = 0.0
        for request_id in range(self.chance.randrange(2, 40)):
            if self.chance.random() < 0.6:
                at += self.chance.expovariate(self.load * capacity)
            yield at, request_id

    def _add(self, request_id: int) -> None:
        chance = self.chance
        rows = chance.choice((0, 1, 1, 1, 2, 5))
        alone_s = self.fixed_s + max(1, rows) * self.row_s
        deadline = None if chance.random() < 0.1 else self.now + alone_s * chance.choice((0.5, 1.1, 2.0, 5.0, 20.0))
        self.deadlines[request_id] = deadline
        self.open.add(request_id)
        self.outcome.requests += 1
        self._obey(
            self.batcher.add(
                self.now,
                request_id,
                rows,
                key=chance.choice("aaab"),
                deadline=deadline,
                priority=chance.choice((0, 0, 1, 2, 3)),
            )
        )
        if chance.random() < 0.02 and request_id in self.open:  # its client hangs up
            self.batcher.cancel(request_id)
            self.open.discard(request_id)

    def _obey(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(ids, rows, _):
                    self._run(ids, rows)
                case Refuse(request_id, _, _):
                    self.outcome.refused += 1
                    self._answer(request_id)
                case Expire(ids):
                    for request_id in ids:
                        self.outcome.expired += 1
                        self._answer(request_id)
        wake = self.batcher.next_wake()
        if wake is not None and (not self.timer or wake < self.timer_at):
            self.timer_at = wake
            self.timer = self._at(max(self.now, wake) + self.chance.random() * TIMER_LATE_S_MAX, "wake", 0)

    def _run(self, ids: tuple[int, ...], rows: int) -> None:
        chance = self.chance
        deadlines = [self.deadlines[request_id] for request_id in ids]
        assert all(deadline is None or deadline > self.now for deadline in deadlines), "expired work must not run"
        took_s = (self.fixed_s + rows * self.row_s) * chance.uniform(0.95, 1.05)
        if chance.random() < SLOW_SHARE:
            took_s *= 10
        if chance.random() < STUCK_SHARE:
            return
        self.batches[ids[0]] = ids
        self._at(self.now + took_s, "finish", ids[0])

    def _finish(self, run_id: int) -> None:
        ids = self.batches.pop(run_id)
        self._obey(self.batcher.finish(self.now, run_id))
        for request_id in ids:
            if request_id in self.open:
                self.outcome.answered += 1
                self._answer(request_id)

    def _answer(self, request_id: int) -> None:
        self.open.remove(request_id)
        deadline = self.deadlines[request_id]
        if deadline is not None:
            self.outcome.latest_s = max(self.outcome.latest_s, self.now - deadline)

    def _at(self, at: float, kind: str, which: int) -> int:
        self.serial += 1
        heapq.heappush(self.events, (at, self.serial, kind, which))
        return self.serial
