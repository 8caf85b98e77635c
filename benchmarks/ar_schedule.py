"""Cameras in virtual time: the batcher itself, an engine whose runs stray, and what each frame is told when.

As many frames as `benchmarks.ar` sends, without a network, a machine or a clock: what is left is the judgement of who
is let in. Runs take what the model takes or more, as the machine has other things to do.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run

FPS = 30.0
MODEL_S = 0.0052
WARM_S = 1.0
"""Of frames that do not count: nothing is known about the model yet."""
JITTER_S = 0.0008
"""Of a frame's arrival."""
AT_ONCE_S = 0.004
"""In the server; the way there and back makes it 5 ms."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How far runs stray: each by some percent (a normal deviate of `stray`), a few by up to `slow_s_max` beyond."""

    stray: float
    slow_share: float
    slow_s_max: float


QUIET = Machine(0.06, 0.02, 0.004)
BUSY = Machine(0.4, 0.05, 0.012)


@dataclass(slots=True)
class Outcome:
    """Frames by their end; `others_late` were told after `AT_ONCE_S`."""

    answered: int = 0
    others: int = 0
    others_late: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.answered + other.answered, self.others + other.others, self.others_late + other.others_late)

    @property
    def answered_share(self) -> float:
        """Of all frames."""
        return self.answered / (self.answered + self.others)

    @property
    def at_once_share(self) -> float:
        """Of the others."""
        return 1 - self.others_late / self.others


def play(
    seed: int, machine: Machine = QUIET, *, cameras: int = 14, seconds: float = 60.0, timeout_s: float = 0.0135
) -> Outcome:
    """One schedule from its seed to the last frame's end."""
    return _Node(random.Random(seed), machine, timeout_s).play(cameras, int(seconds * FPS))


class _Node:
    def __init__(self, chance: random.Random, machine: Machine, timeout_s: float) -> None:
        self.chance = chance
        self.machine = machine
        self.timeout_s = timeout_s
        self.batcher = Batcher(BatchingConfig(rows_max=1, late_quantile=0.95))
        self.events: list[tuple[float, int]] = []
        self.now = 0.0
        self.wake = math.inf
        self.sent: dict[int, float] = {}
        self.running = -1
        self.outcome = Outcome()

    def play(self, cameras: int, frames: int) -> Outcome:
        arrivals: list[float] = []
        for _ in range(cameras):
            phase = self.chance.random()
            arrivals += [(phase + index) / FPS + self.chance.uniform(0, JITTER_S) for index in range(frames)]
        self.events = [(at, frame) for frame, at in enumerate(sorted(arrivals))]
        while self.events or self.wake < math.inf:
            if self.wake < (self.events[0][0] if self.events else math.inf):
                self.now, self.wake = self.wake, math.inf
                self._obey(self.batcher.tick(self.now))
                continue
            self.now, frame = heapq.heappop(self.events)
            if frame == self.running:
                self.running = -1
                self._finish(frame)
            else:
                self.sent[frame] = self.now
                self._obey(self.batcher.add(self.now, frame, 1, deadline=self.now + self.timeout_s))
        return self.outcome

    def _finish(self, frame: int) -> None:
        sent = self.sent.pop(frame, None)
        if sent is not None and sent >= WARM_S:
            self.outcome.answered += 1
        self._obey(self.batcher.finish(self.now, frame))

    def _obey(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(ids, _, _):
                    self.running = ids[0]
                    took_s = MODEL_S * math.exp(abs(self.chance.gauss(0, self.machine.stray)))
                    if self.chance.random() < self.machine.slow_share:
                        took_s += self.chance.uniform(0, self.machine.slow_s_max)
                    heapq.heappush(self.events, (self.now + took_s, self.running))
                case Refuse(frame, _, _):
                    self._tell(frame)
                case Expire(frames):
                    for frame in frames:
                        self._tell(frame)
        wake = self.batcher.next_wake()
        self.wake = math.inf if wake is None else max(self.now, wake)

    def _tell(self, frame: int) -> None:
        sent = self.sent.pop(frame)
        if sent >= WARM_S:
            self.outcome.others += 1
            self.outcome.others_late += self.now - sent > AT_ONCE_S
